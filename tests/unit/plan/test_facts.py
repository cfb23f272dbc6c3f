"""What is known of a model before its weights are read."""

import json

import pytest

from finetune_cli.errors import ModelError
from finetune_cli.plan.facts import Facts, look


def test_a_folder_tells_its_type_and_its_number_of_weights(tiny_model_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    wanted = sum(p.numel() for p in model.parameters())
    assert look(str(tiny_model_folder)) == Facts(kind="folder", model_type="llama", parameters=wanted)


def test_shards_are_added(tmp_path, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert look(str(tmp_path)).parameters == sum(p.numel() for p in model.parameters())


def test_a_folder_without_safetensors_does_not_tell(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert look(str(tmp_path)) == Facts(kind="folder", model_type="gpt2", parameters=None)


def test_an_adapter_names_its_base(tmp_path):
    (tmp_path / "config.json").write_text("{}")  # some tools leave one beside it
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    assert look(str(tmp_path)) == Facts(kind="adapter", base="org/base")


@pytest.mark.parametrize(("name", "kind"), [("builtin:x", "builtin"), ("org/model", "hub"), ("gpt2", "hub")])
def test_what_is_no_path(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert look(name) == Facts(kind=kind)


def test_a_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert look(str(tmp_path / "m.gguf")) == Facts(kind="gguf")


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (None, "{}/gone", "gone does not exist"),
        (None, "./gone", "gone does not exist"),
        (None, "{}/gone.gguf", "gone.gguf does not exist"),
        ({"m.bin": "x"}, "{}/m.bin", "is a file, not a model"),
        ({"a/weights.bin": "x"}, "{}/a", r"has no config.json \(found: weights.bin\)"),
        ({"a/config.json": "{torn"}, "{}/a", "config.json is not valid JSON"),
        ({"a/config.json": "[1]"}, "{}/a", "config.json holds no JSON object"),
        ({"a/adapter_config.json": "nope"}, "{}/a", "adapter_config.json is not valid JSON"),
        ({"a/config.json": "{}", "a/model.safetensors": "torn"}, "{}/a", "model.safetensors"),
        ({"a/config.json": "{}", "a/model.safetensors": ""}, "{}/a", "model.safetensors"),
        ({"a/config.json": b"\xff\xfe"}, "{}/a", "config.json"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, make, name, said):
    for file, text in (make or {}).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelError, match=said):
        look(name.format(tmp_path))
