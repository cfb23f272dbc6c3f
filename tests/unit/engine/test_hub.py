"""Uploads to a hub on loopback: checked first, never in the way, tried again, and nothing of this machine in them."""

import json
import threading
import time
from collections.abc import Iterator

import pytest
import yaml

from finetune_cli.engine import hub as module
from finetune_cli.engine.hub import LAST, Pusher, is_place, open_repository, placeless
from finetune_cli.errors import MachineError
from finetune_cli.recipe.sections import Save
from tests.helpers import finetune
from tests.hub_server import Hub, serving


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with serving() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", "writer")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.setattr(module, "WAITS", (0.01, 0.01, 0.01))
        yield found


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as a checkpoint is: `checkpoint(7)`."""

    def make(step):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights of %d" % step)
        config = {"base_model_name_or_path": str(tmp_path / "models" / "base"), "r": 4}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "optimizer.pt").write_bytes(b"state")
        (folder / "manifest.json").write_text(json.dumps({"recipe": {"data": str(tmp_path)}}))
        return folder

    return make


def pusher(tmp_path, strategy):
    save = Save(push_to_hub=True, hub_model_id="team/thing", hub_strategy=strategy)
    return Pusher(save, tmp_path / "run", open_repository(save, tmp_path / "run"))


# ── before the run ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_repository_is_made_and_private(hub, tmp_path):
    found = open_repository(Save(push_to_hub=True), tmp_path / "my-run")
    assert (found.id, hub.private) == ("ann/my-run", {"ann/my-run": True})
    assert (
        open_repository(Save(push_to_hub=True, hub_model_id="team/x", hub_private_repo=False), tmp_path).id == "team/x"
    )
    assert hub.private["team/x"] is False
    assert hub.commits == []


@pytest.mark.parametrize(
    ("token", "name", "said", "key"),
    [
        ("nobody", None, "does not know us", "save.push_to_hub"),
        ("reader", None, "the token of bob can only read", "save.push_to_hub"),
        ("writer", "other/thing", "ann cannot write to other", "save.hub_model_id"),
        ("writer", "team/closed", "team/closed", "save.hub_model_id"),
        ("writer", "team/no spaces", "no spaces", "save.hub_model_id"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(hub, token, name, said, key, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.closed.add("team/closed")
    with pytest.raises(MachineError, match=said) as caught:
        open_repository(Save(push_to_hub=True, hub_model_id=name), tmp_path / "run")
    (problem,) = caught.value.problems
    assert (problem.key, problem.rule) == (key, "FT025")


def test_a_hub_that_is_away_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "writer")
    with pytest.raises(MachineError, match="the hub does not know us"):
        open_repository(Save(push_to_hub=True), tmp_path / "run")


def test_a_run_that_may_not_write_does_not_start(hub, recipe_of, tmp_path):
    path = recipe_of(save={"push_to_hub": True, "hub_model_id": "other/thing"})
    done = finetune("run", str(path), cwd=tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="writer")
    assert done.returncode == 4
    assert "FT025" in done.stderr
    assert "recipe.yaml:" in done.stderr
    assert "save.hub_model_id" in done.stderr
    assert not (tmp_path / "run").exists()


# ── while it trains ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("strategy", "extra"),
    [("every_save", []), ("checkpoint", [f"{LAST}/"]), ("all_checkpoints", ["checkpoint-1/", "checkpoint-2/"])],
)
def test_strategies(hub, strategy, extra, checkpoint, tmp_path):
    push = pusher(tmp_path, strategy)
    for step in (1, 2):
        folder = checkpoint(step)
        push.saved(folder)
        deadline = time.monotonic() + 20
        while len(hub.commits) < step and time.monotonic() < deadline:
            time.sleep(0.01)
    assert push.finished() is None
    files = hub.repos["team/thing"]
    assert files["adapter_model.safetensors"] == b"weights of 2"
    assert {path.rpartition("/")[0] + "/" for path in files if "/" in path} == set(extra)
    for place in extra:
        assert files[f"{place}optimizer.pt"] == b"state"
    assert not [path for path in files if "manifest" in path]
    assert not (tmp_path / "run" / ".hub").exists() or not any((tmp_path / "run" / ".hub").iterdir())


def test_end_uploads_the_result_alone(hub, checkpoint, tmp_path):
    push = pusher(tmp_path, "end")
    push.saved(checkpoint(1))
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"result")
    (tmp_path / "run" / "plan.json").write_text("{}")
    assert push.finished() is None
    assert hub.commits == [("team/thing", "the result", ["adapter_model.safetensors"])]


def test_training_never_waits_and_old_uploads_give_way(hub, checkpoint, tmp_path):
    """Three saves while the first is held up: the second is never sent, and its checkpoint may be removed meanwhile."""
    hub.hold = threading.Event()
    push = pusher(tmp_path, "every_save")
    folders = [checkpoint(step) for step in (1, 2, 3)]
    push.saved(folders[0])
    while hub.tries == 0:
        time.sleep(0.01)
    started = threading.active_count()
    for folder in folders[1:]:
        push.saved(folder)
    assert hub.commits == []
    for folder in folders:
        for file in folder.iterdir():
            file.unlink()
    hub.hold.set()
    deadline = time.monotonic() + 20
    while len(hub.commits) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    push.finished()
    assert [message for _, message, _ in hub.commits][:2] == ["step 1", "step 3"]
    assert hub.repos["team/thing"]["adapter_model.safetensors"] == b"weights of 3"
    assert threading.active_count() <= started + 1


@pytest.mark.parametrize("fail", [[500, 503], [429], [0]], ids=["server", "busy", "broken"])
def test_what_fails_for_a_moment_is_tried_again(hub, fail, checkpoint, tmp_path):
    push = pusher(tmp_path, "every_save")
    hub.fail = list(fail)
    push.saved(checkpoint(1))
    push.finished()
    assert hub.repos["team/thing"]["adapter_model.safetensors"] == b"weights of 1"
    assert hub.tries > len(fail)


def test_what_fails_for_good_is_told_and_no_more(hub, checkpoint, tmp_path, caplog):
    push = pusher(tmp_path, "every_save")
    hub.closed.add("team/thing")
    push.saved(checkpoint(1))
    assert "403" in str(push.finished())
    assert "was not uploaded to team/thing" in caplog.text
    assert hub.commits == []


# ── what is uploaded ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_places_become_names():
    text = json.dumps({"base": "/home/me/models/base", "regex": "/x", "list": ["/data/of/mine.txt", "a/b"], "n": 1})
    assert json.loads(placeless(text)) == {"base": "base", "regex": "/x", "list": ["mine.txt", "a/b"], "n": 1}
    assert not is_place("/usr and\n/more")


def test_a_whole_run_is_uploaded_and_nothing_of_this_machine(hub, recipe_of, tmp_path):
    path = recipe_of(
        data={"eval_split": 0.2},
        save={"push_to_hub": True, "hub_model_id": "team/thing", "hub_strategy": "checkpoint", "save_steps": 1},
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "writer"}
    done = finetune("run", str(path), cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    files = hub.repos["team/thing"]
    assert files["adapter_model.safetensors"] == (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    assert {"adapter_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(files)
    assert f"{LAST}/optimizer.pt" in files
    assert not {"plan.json", "recipe.yaml", "metrics.jsonl"} & set(files)
    texts = {name: body for name, body in files.items() if name.endswith((".json", ".md", ".jinja", ".yaml"))}
    assert not [name for name, body in texts.items() if str(tmp_path).encode() in body or b"/tmp" in body]
    assert not [name for name, body in files.items() if b"writer" in body]
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "peft"
    assert front["tags"] == ["finetune", "sft", "lora"]
    assert "base_model" not in front  # a folder of this machine
    assert "| eval_loss |" in card
    assert "writer" not in (tmp_path / "run" / "plan.json").read_text()
    before = len(hub.commits)
    hub.fail = [503]
    done = finetune("push", str(tmp_path / "run"), "--json", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"repository": "team/thing", "url": f"{hub.url}/team/thing"}
    assert len(hub.commits) == before + 1


def test_a_run_ends_well_where_the_hub_has_gone(hub, recipe_of, tmp_path):
    path = recipe_of(save={"push_to_hub": True, "hub_model_id": "team/thing", "hub_strategy": "end"})
    hub.fail = [403] * 20
    done = finetune("run", str(path), cwd=tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="writer")
    assert done.returncode == 0, done.stderr
    assert "finetune push" in done.stderr
    assert (tmp_path / "run" / "report.json").exists()
    assert hub.commits == []
