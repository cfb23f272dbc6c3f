"""A checkpoint is whole or it is not one."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_cli.engine import checkpoint, manifest
from finetune_cli.engine.manifest import newest_whole


@pytest.fixture(scope="module")
def parts(tiny_model_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder), AutoTokenizer.from_pretrained(tiny_model_folder)


def write(run, step, parts):
    folder = run / f"checkpoint-{step}"
    model, tokenizer = parts
    training = {"optimizer": {"step": torch.tensor(step)}, "rng_0": checkpoint.rng_state()}
    checkpoint.begin(folder)
    checkpoint.write(folder, model=model, tokenizer=tokenizer, training=training, state={"global_step": step})
    return folder


def test_manifest_names_every_file_and_its_sum(tmp_path, parts):
    folder = write(tmp_path, 3, parts)
    value = json.loads((folder / "manifest.json").read_text())
    assert value["step"] == 3
    assert set(value["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, digest in value["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert manifest.damage(folder) is None
    assert not list(tmp_path.glob("*.writing"))
    assert checkpoint.load_training(folder, ["optimizer"])["optimizer"]["step"] == 3
    assert checkpoint.state(folder) == {"global_step": 3}


def test_written_again_replaces_what_was_there(tmp_path, parts):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "old.bin").write_text("old")
    (tmp_path / "checkpoint-3.writing").mkdir()
    (tmp_path / "checkpoint-3.writing" / "torn.bin").write_text("torn")
    folder = write(tmp_path, 3, parts)
    assert manifest.damage(folder) is None
    assert not {"old.bin", "torn.bin"} & {path.name for path in folder.iterdir()}


def spoil(folder, how):
    if how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "torn manifest":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text[: len(text) // 2])
    elif how == "empty manifest":
        (folder / "manifest.json").write_text("{}")
    elif how == "missing file":
        (folder / "optimizer.pt").unlink()
    elif how == "torn file":
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
    elif how == "one bit":
        data = bytearray((folder / "rng_0.pt").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "rng_0.pt").write_bytes(data)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no manifest", "no manifest"),
        ("torn manifest", "manifest cannot be read"),
        ("empty manifest", "manifest cannot be read"),
        ("missing file", "optimizer.pt is missing"),
        ("torn file", "model.safetensors is not what was written"),
        ("one bit", "rng_0.pt is not what was written"),
    ],
)
def test_damaged_ones_are_named_and_passed_over(tmp_path, parts, caplog, how, said):
    whole = write(tmp_path, 2, parts)
    damaged = write(tmp_path, 10, parts)
    (tmp_path / "checkpoint-12.writing").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    spoil(damaged, how)
    assert said in manifest.damage(damaged)
    assert manifest.found(tmp_path) == [whole, damaged]
    with caplog.at_level("WARNING", logger="finetune_cli"):
        assert newest_whole(tmp_path) == whole
    assert "checkpoint-10" in caplog.text
    assert said in caplog.text
    spoil(whole, "no manifest")
    assert newest_whole(tmp_path) is None


def test_no_folder_no_checkpoint(tmp_path):
    assert newest_whole(tmp_path) is None


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [1, 2, 3, 9, 10]), (3, None, [3, 9, 10]), (1, None, [10]), (1, 2, [2, 10]), (2, 2, [2, 10]),
        (3, 2, [2, 9, 10]), (1, 10, [10]), (3, 99, [3, 9, 10]), (9, 1, [1, 2, 3, 9, 10]),
    ],
)  # fmt: skip
def test_prune_keeps_the_best_and_the_last(tmp_path, keep, best, left):
    """By number, not by name: 10 is after 9."""
    for step in (10, 9, 3, 2, 1):
        (tmp_path / f"checkpoint-{step}").mkdir()
    manifest.prune(tmp_path, keep=keep, best=best, last=10)
    assert [manifest.step_of(folder) for folder in manifest.found(tmp_path)] == left


def test_prune_keeps_what_was_just_written_below_a_damaged_one(tmp_path):
    for step in (1, 3, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    manifest.prune(tmp_path, keep=1, best=None, last=3)
    assert [manifest.step_of(folder) for folder in manifest.found(tmp_path)] == [3]


def test_folders_of_a_checkpoint_are_sealed_too(tmp_path):
    """transformers keeps a tokenizer's further templates in a folder."""
    (tmp_path / "checkpoint-1" / "additional_chat_templates").mkdir(parents=True)
    template = tmp_path / "checkpoint-1" / "additional_chat_templates" / "tool_use.jinja"
    template.write_text("{{ messages }}")
    manifest.seal(tmp_path / "checkpoint-1", {})
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-1"
    template.write_text("{{ message }}")
    assert "tool_use.jinja is not what was written" in str(manifest.damage(tmp_path / "checkpoint-1"))


def test_all_templates_of_a_tokenizer_are_saved_and_uploaded(tmp_path, parts):
    from finetune_cli.engine.hub import result_files

    model, tokenizer = parts
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    checkpoint.save_model(model, tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    found = {f"{place}/{file.name}" for place, files in result_files(tmp_path).items() for file in files}
    assert {"./chat_template.jinja", "additional_chat_templates/tool_use.jinja"} <= found


def test_generators_go_on_where_they_were(tmp_path, parts):
    """After a write and a read, every generator draws what it would have drawn."""
    folder = write(tmp_path, 1, parts)
    wanted = torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), np.random.randn()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    checkpoint.set_rng_state(checkpoint.load_training(folder, ["rng_0"])["rng_0"])
    assert (torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist(), np.random.randn()) == wanted


def test_saving_leaves_the_model_as_it_was(tmp_path, parts):
    model, tokenizer = parts
    model.config.use_cache = False
    checkpoint.save_model(model, tokenizer, tmp_path)
    assert model.config.use_cache is False
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is True
