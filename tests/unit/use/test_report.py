"""report.html: one file, what rows say is escaped, of one run or of several beside one another."""

import json
import re
from html.parser import HTMLParser

import pytest

from finetune_cli.errors import DataError, MachineError
from finetune_cli.use import record, report

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


@pytest.fixture
def run_folder(recipe_of, tmp_path):
    """A run's folder with a real plan, and the events and the report that are given."""
    from finetune_cli import commands

    def make(name="run", *, events=(), finished=True, overrides=(), **more):
        folder = tmp_path / name
        folder.mkdir()
        plan, _, _ = commands.planned(recipe_of(), [f"output_dir={folder}", *overrides])
        (folder / "plan.json").write_text(plan.model_dump_json())
        (folder / "recipe.yaml").write_text("method: sft\n")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        told = {
            "rows": {"read": 3, "kept": 2, "dropped": {"overlength": 1}, "truncated": 0, "lengths": {"p50": 17}},
            "tokens": {"total": 90, "trained": 40}, "warnings": [], "steps": 3, "seconds": 125.0,
            "tokens_per_second": 0.72, "peak_memory_gib": 1.25, "first": {"loss": 2.0}, "last": {"loss": 1.0},
            "result": {"checkpoint": "checkpoint-3", "step": 3, "is": "last"}, "device": "cpu",
            "weights": {"trained": 10, "total": 100}, "data_fingerprint": "d" * 64,
        }  # fmt: skip
        if finished:
            (folder / "report.json").write_text(json.dumps({**told, **more}))
        return folder

    return make


def train(step, **numbers):
    return {"event": "train", "step": step, "epoch": step / 3, "loss": 3.0 - step / 2, "grad_norm": 1.0, **numbers}


def sample(step, answer, row=0, **more):
    return {"event": "sample", "step": step, "prompt": "two?", "answer": answer, "reference": "four", "row": row} | more


class Reader(HTMLParser):
    """Tags, attributes and the visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += f" {data} "


def test_what_rows_say_is_escaped_everywhere(run_folder):
    events = [
        train(1, **{EVIL: 2.0}),
        sample(1, EVIL, prompt=EVIL, reference=EVIL, set=EVIL),
        {"event": "health", "step": 1, "rule": EVIL, "message": EVIL},
    ]
    folder = run_folder(
        events=events, warnings=[EVIL], rows={"read": 1, "kept": 1, "dropped": {EVIL: 1}, "truncated": 0}
    )
    (folder / "recipe.yaml").write_text(f"# {EVIL}\n")
    (folder / "error.json").write_text(json.dumps({"message": EVIL, "hint": EVIL}))
    read = Reader(report.write([folder]).read_text())
    assert read.tags.count("script") == 1
    assert "img" not in read.tags
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert read.text.count("alert(1)") >= 7


def test_nothing_is_fetched(run_folder):
    text = report.write([run_folder(events=[train(1), train(2)])]).read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"(?:src|href)=|https?://|@import|url\(", text)


def test_one_run_tells_all_of_it(run_folder):
    events = [
        train(1), {"event": "eval", "step": 1, "eval_loss": 2.5}, sample(1, "five"),
        {"event": "health", "step": 2, "rule": "loss_spike", "message": "loss 9 is far above the usual 2"},
        train(2), train(3), sample(3, "four"),
    ]  # fmt: skip
    folder = run_folder(events=events, warnings=["FT033 few steps"])
    assert report.write([folder]) == folder / "report.html"
    page = (folder / "report.html").read_text()
    text = " ".join(Reader(page).text.split())
    for told in (
        "method sft", "LoRA, r 4: 10 of 100 weights", "steps 3 of 4 rows", "90, 40 of them trained", "2.1 min",
        "1.2 GiB", "checkpoint-3 (last)", "loss 2 1", "read 3", "kept 2", "dropped: overlength 1",
        "length, p50 17 tokens", "before training FT033 few steps", "step 2 loss 9 is far above", "step 1 five",
        "step 3 four", "wanted four", "lora.r 4 recipe", "seed 42 default", "transformers", "method: sft", "d" * 64,
    ):  # fmt: skip
        assert told in text, told
    assert page.count("<dd class=good>") == 1  # the answer that is the wanted one
    assert {value for name, value in Reader(page).attributes if name == "data-name"} == {
        "loss",
        "eval_loss",
        "grad_norm",
    }


def test_what_an_answer_was_worth_and_the_numbers_of_ppo_are_on_the_page(run_folder):
    told = {"objective/kl": 0.5, "objective/scores": 0.25, "policy/clipfrac_avg": 0.1, "loss/value_avg": 1.0}
    events = [train(1, **told), sample(1, "five", reward=0.125), train(2, **told), sample(2, "four", reward=1.0)]
    page = report.write([run_folder(events=events)]).read_text()
    text = " ".join(Reader(page).text.split())
    assert "step 1 reward 0.125 five" in text
    assert "step 2 reward 1 four" in text
    assert set(told) <= {value for name, value in Reader(page).attributes if name == "data-name"}


def test_an_unfinished_run_and_one_that_failed(run_folder):
    folder = run_folder(events=[train(1), train(2)], finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # as it is being written
    text = " ".join(Reader(report.write([folder]).read_text()).text.split())
    assert "status not finished" in text
    assert "loss 2.5 2" in text
    (folder / "error.json").write_text(json.dumps({"message": "out of memory", "hint": "lower it"}))
    assert "out of memory" in Reader(report.write([folder]).read_text()).text


def test_several_runs(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = run_folder("a", events=[train(1), train(2)])
    other = run_folder(
        "b",
        events=[train(1), train(2, extra=1.0)],
        overrides=["learning_rate=1e-4"],
        last={"loss": 0.5},
        data_fingerprint="e",
    )
    path = report.write([one, other])
    assert path.name == "comparison.html"
    read = Reader(path.read_text())
    text = " ".join(read.text.split())
    assert "train.learning_rate 0.0005 0.0001" in text
    assert "loss 2 → 1 2 → 0.5" in text
    assert "output_dir" not in text
    assert "seed" not in text
    assert [value for name, value in read.attributes if name == "data-name"] == ["a", "b", "b", "a", "b"]
    differ = report.summary([one, other], path)["differing"]
    assert differ == {
        "train.learning_rate": {"a": 5e-4, "b": 1e-4},
        "rows (fingerprint)": {"a": "d" * 12, "b": "e"},
    }


def test_names_are_as_short_as_tells_them_apart(run_folder, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    records = [record.read(run_folder(f"{name}/run")) for name in "xy"]
    assert record.labels(records) == ["x/run", "y/run"]


def test_a_long_run_is_a_small_page_with_its_spike(run_folder):
    events = [train(n, learning_rate=1e-4, tokens_per_second=9e3 + n % 97, memory_gib=3.0) for n in range(1, 50_001)]
    for event in events:
        event["loss"] = 2 + (event["step"] * 7919 % 101) / 101
    events[31_233]["loss"] = 50.0
    events += [sample(n, "x" * 200, row=n % 3) for n in range(500)]
    events += [{"event": "health", "step": n, "rule": "slow", "message": "slow " * 9} for n in range(1000)]
    page = report.write([run_folder(events=events)]).read_text()
    assert len(page.encode()) < 500_000
    top = min(
        float(y) for path in re.findall(r'data-name="loss" d="([^"]+)"', page) for y in re.findall(r" ([\d.]+)", path)
    )
    assert top < 20  # 210 high, and the spike is at the top


def test_what_is_no_run(run_folder, tmp_path):
    with pytest.raises(DataError, match=r"no plan\.json"):
        report.write([tmp_path])
    folder = run_folder(events=[])
    with pytest.raises(DataError, match="twice"):
        report.write([folder, folder])
    with pytest.raises(MachineError, match="cannot be written"):
        report.write([folder], tmp_path / "nowhere" / "x.html")
    assert "Nothing has been logged yet" in report.write([folder]).read_text()
