"""Rules on tokenizer and configuration: each tripped once, each silent once; no weights are read."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from finetune_cli.engine import meta
from finetune_cli.engine.models import Location
from tests.helpers import model_folder, tiny_tokenizer
from tests.unit.checks.conftest import trips


@pytest.fixture
def copy(tiny_model_folder, tmp_path):
    """The tiny model in a folder that a test may change; without its weights."""
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


def referring(seen, ref_model=None):
    """As if the method had a reference: the policy with its adapter off, or another model."""
    from finetune_cli.methods.base import Reference

    kind = "adapter off" if ref_model is None else "model"
    wanted = Reference(
        kind=kind, model=ref_model and str(ref_model), precompute=False, because="", starts_equal=ref_model is None
    )
    resolved = seen.plan.resolved.model_copy(update={"reference": wanted})
    tokens = {}
    if ref_model is not None and (ref_model / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        tokens = AutoTokenizer.from_pretrained(ref_model).get_vocab()
    return replace(seen, plan=seen.plan.model_copy(update={"resolved": resolved}), reference_tokens=tokens)


def change(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_nothing_is_read_of_the_weights(says, copy):
    assert says(model={"name_or_path": str(copy)}, train={"max_steps": 20}) == []


def test_ft014_tokens_without_a_row(of, copy):
    assert of("FT014", model={"name_or_path": str(copy)}) == []
    change(copy, "config.json", vocab_size=300)
    (problem,) = of("FT014", model={"name_or_path": str(copy)})
    assert problem.severity == "error"
    assert "among the 300 of the embedding" in problem.message


def test_ft017_preferences_on_a_base_model(seen):
    assert trips("FT017", "model", referring(seen)) == []
    bare = replace(seen, chat=replace(seen.chat, template=None))
    assert trips("FT017", "model", bare) == [], "sft needs no instruct model"
    (problem,) = trips("FT017", "model", referring(bare))
    assert "no chat template" in problem.message


def test_ft018_an_adapter_of_another_base_as_reference(seen, tmp_path, tiny_model_folder):
    folder = tmp_path / "ref"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model_folder)}))
    ours = replace(referring(seen, folder), reference_tokens=seen.tokenizer.get_vocab())
    assert trips("FT018", "model", ours) == []
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "other/base"}')
    (problem,) = trips("FT018", "model", referring(seen, folder))
    assert (problem.severity, problem.key) == ("error", "method.ref_model")
    assert "an adapter of other/base" in problem.message


def test_ft018_a_reference_of_another_vocabulary(seen, tmp_path, tiny_model_folder):
    assert trips("FT018", "model", referring(seen, tiny_model_folder)) == []
    other = model_folder(tmp_path / "other")
    tiny_tokenizer(more=("<|odd|>",)).save_pretrained(other)
    (problem,) = trips("FT018", "model", referring(seen, other))
    assert "has another vocabulary" in problem.message


def test_ft018_a_starting_adapter_that_is_not_of_its_base(of, tmp_path, tiny_model_folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def adapter(base, name):
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
        tuned.save_pretrained(tmp_path / name)
        change(tmp_path / name, "adapter_config.json", base_model_name_or_path=str(tiny_model_folder))
        return {"lora": None, "model": {"name_or_path": str(tmp_path / name)}}

    assert of("FT018", **adapter(tiny_model_folder, "good")) == []
    wide = model_folder(tmp_path / "wide", hidden_size=64)
    (problem,) = of("FT018", **adapter(wide, "bad"))
    assert problem.severity == "error"
    assert "4 of the adapter's 4 tensors are not of this model" in problem.message


def test_ft022_frozen_weights_in_float32(of):
    asked = {"model": {"dtype": "float32"}, "train": {"precision": "bf16"}}
    (problem,) = of("FT022", **asked)
    assert "float32" in problem.message
    assert of("FT022", model={"dtype": "float32"}, train={"precision": "fp32"}) == []
    assert of("FT022", train={"precision": "bf16"}) == []
    assert of("FT022", **asked, lora=None) == [], "trained weights are float32 anyway"


def test_ft030_few_layers_or_none(of):
    assert of("FT030") == []
    assert of("FT030", lora={"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}) == []
    (problem,) = of("FT030", lora={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    assert problem.severity == "warning"
    assert "only q_proj, v_proj get an adapter (1." in problem.message
    assert "k_proj, o_proj, gate_proj, up_proj, down_proj none" in problem.message
    (problem,) = of("FT030", lora={"r": 4, "target_modules": ["query_key_value"]})
    assert problem.severity == "error"
    assert "fits no layer" in problem.message
    assert "all-linear takes them all" in problem.message


def test_ft033_the_window(of):
    assert of("FT033", "max_steps=20", data={"max_length": 256}) == []
    (problem,) = of("FT033", "max_steps=20", data={"max_length": 257})
    assert problem.key == "data.max_length"
    assert "257 is longer than the 256 tokens" in problem.message


@pytest.mark.parametrize(
    "more", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"modules_to_save": "lm_head"}]
)
def test_sizes_are_those_of_the_model_that_is_loaded(recipe_of, job_of, more):
    job, _ = job_of(recipe_of(lora={"r": 4, **more}))
    from finetune_cli.engine.lora import sizes

    location = Location(job.recipe.model.name_or_path, {})
    found = meta.look(job.recipe, location)
    assert (found.trained, found.total) == sizes(job.policy)
    assert all(p.is_meta for p in meta.empty(location).parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [{"r": 4}, None])
def test_what_is_trained_is_float32_under_every_precision(recipe_of, job_of, precision, lora):
    job, _ = job_of(recipe_of(train={"precision": precision}, lora=lora))
    assert {p.dtype for p in job.trained} == {torch.float32}


def test_a_configuration_of_an_unknown_kind_is_named(recipe_of, copy, says):
    change(copy, "config.json", model_type="odd")
    (problem,) = says(model={"name_or_path": str(copy)}, ignore=["FT033"])
    assert "cannot be" in problem.message
