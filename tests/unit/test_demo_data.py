"""Tests of the demo data: the files are what the script writes, and the evaluation rows are held out."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA_DIR = ROOT / "recipes" / "data"
TRAIN_FILES = ("orders_sft.jsonl", "orders_pairs.jsonl", "orders_prompts.jsonl")
ROWS = {"orders_sft.jsonl": 1600, "orders_eval.jsonl": 100, "orders_pairs.jsonl": 360, "orders_prompts.jsonl": 300}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_data", ROOT / "scripts" / "make_demo_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA_DIR / name).read_text(encoding="utf-8").splitlines()]


def prompt_and_answer(row: dict[str, Any]) -> tuple[str, str]:
    if "messages" in row:
        _, user, assistant = row["messages"]
        return user["content"], assistant["content"]
    return row["prompt"][-1]["content"], row["chosen"][0]["content"] if "chosen" in row else row["answer"]


def examples(*names: str) -> list[tuple[str, str]]:
    return [prompt_and_answer(row) for name in names for row in read(name)]


def names(rows: list[tuple[str, str]]) -> set[str]:
    return {json.loads(answer)["name"] for _, answer in rows}


def phrasing(prompt: str, answer: str) -> str:
    """The prompt with its typos mended, in lower case, less everything that the answer says and its greetings."""
    order = json.loads(answer)
    text = prompt.replace(order["name"], "<name>").replace(order["city"], "<city>").lower()
    for word, typo in script.TYPOS.items():
        text = re.sub(rf"\b{typo}\b", word, text)
    day, month = order["date"].lower().split()
    text = re.sub(rf"\b{day}(st|nd|rd|th)? ({month}|{month[:3]})\b|\b({month}|{month[:3]}) {day}\b", "<date>", text)
    numbers = r"\d+|an?|one|two|three|four|five|six|seven|eight|nine|ten|a dozen"
    for item in order["items"]:
        color = rf"{item['color']} " if item["color"] else ""
        said = rf"\b({numbers}) (?:{color}{item['item']}(es|s)?\b|{item['item']}(es|s)? \({item['color']}\))"
        text, found = re.subn(said, "<item>", text)
        assert found == 1, (prompt, answer)
    text = re.sub(r"<item>((, | and | plus )<item>)*", "<items>", text)
    text = re.sub(r"^(hi|hello|hey|hi there|good morning|good evening)[,!.] ", "", text)
    return re.sub(r" (thanks!|thank you\.|thanks a lot\.|cheers!|many thanks\.|best wishes\.)$", "", text)


def test_build_is_deterministic() -> None:
    assert script.build() == script.build() == load_script().build()


def test_files_on_disk_are_what_the_script_writes() -> None:
    assert {name: (DATA_DIR / name).read_bytes() for name in ROWS} == script.build()
    assert script.main(["--check"]) == 0


def test_check_fails_on_a_changed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "DATA_DIR", tmp_path)
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    (tmp_path / "orders_eval.jsonl").write_bytes(b"{}\n")
    assert script.main(["--check"]) == 1
    assert "orders_eval.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "count"), ROWS.items())
def test_row_counts(name: str, count: int) -> None:
    assert len(read(name)) == count


def test_files_stay_below_a_megabyte() -> None:
    assert sum((DATA_DIR / name).stat().st_size for name in ROWS) < 1_000_000


def test_every_answer_has_the_fixed_keys_and_copies_the_prompt() -> None:
    for prompt, answer in examples(*ROWS):
        order = json.loads(answer)
        assert list(order) == ["name", "city", "date", "items"]
        assert order["name"] in prompt
        assert order["city"] in prompt
        assert re.fullmatch(r"\d{1,2} [A-Z][a-z]+", order["date"])
        assert 1 <= len(order["items"]) <= 3
        for item in order["items"]:
            assert list(item) == ["qty", "color", "item"]
            assert 1 <= item["qty"] <= 20
            assert item["item"] in prompt.lower()
            assert item["color"] is None or item["color"] in prompt.lower()
        assert answer == json.dumps(order, ensure_ascii=False, separators=(",", ":"))


def test_evaluation_is_held_out() -> None:
    held_out, seen = examples("orders_eval.jsonl"), examples(*TRAIN_FILES)
    assert not {prompt for prompt, _ in held_out} & {prompt for prompt, _ in seen}
    assert not {answer for _, answer in held_out} & {answer for _, answer in seen}
    assert not names(held_out) & names(seen)
    assert not {name.split()[0] for name in names(held_out)} & {name.split()[0] for name in names(seen)}
    assert not {name.split()[1] for name in names(held_out)} & {name.split()[1] for name in names(seen)}


def test_evaluation_phrasings_are_held_out() -> None:
    held_out = {phrasing(*row) for row in examples("orders_eval.jsonl")}
    seen = {phrasing(*row) for row in examples(*TRAIN_FILES)}
    assert len(held_out) == len(script.EVAL_BODIES)
    assert len(seen) == len(script.TRAIN_BODIES)
    assert not held_out & seen


def test_no_prompt_is_used_twice() -> None:
    prompts = [prompt for prompt, _ in examples(*ROWS)]
    assert len(set(prompts)) == len(prompts) == sum(ROWS.values())


def test_chosen_differs_from_rejected() -> None:
    rows = read("orders_pairs.jsonl")
    assert all(row["chosen"] != row["rejected"] for row in rows)
    unparsable = 0
    for row in rows:
        try:
            rejected = json.loads(row["rejected"][0]["content"])
        except json.JSONDecodeError:
            unparsable += 1
        else:
            assert rejected != json.loads(row["chosen"][0]["content"])
    assert 2 * 360 // 7 <= unparsable <= 2 * 360 // 7 + 5


def test_mistakes_on_a_worked_order() -> None:
    order = script.Order("Ana Silva", "Porto", "12 March", (script.Item(3, "blue", "box"),))
    right = '{"name":"Ana Silva","city":"Porto","date":"12 March","items":[{"qty":3,"color":"blue","item":"box"}]}'
    rng = script.Random(0)
    assert script.answer_json(order) == right
    assert script.plural_item(rng, order) == right.replace("box", "boxes")
    assert script.lost_color(rng, order) == right.replace('"blue"', "null")
    assert script.missing_item(rng, order) == right.replace('{"qty":3,"color":"blue","item":"box"}', "")
    assert script.swapped_name_and_city(rng, order).startswith('{"name":"Porto","city":"Ana Silva"')
    assert script.wrong_quantity(rng, order) in {right.replace(":3,", f":{qty},") for qty in (1, 2, 4, 5)}
