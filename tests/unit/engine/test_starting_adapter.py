"""A run that starts from an adapter: it is trained further, or merged and another one starts anew."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_cli.engine import hub
from finetune_cli.engine.finish import finish
from finetune_cli.engine.loop import train
from finetune_cli.use.merge import merge
from tests.helpers import finetune

IDS = torch.tensor([[20, 30, 40, 50, 60, 70]])


@pytest.fixture
def adapter(tiny_model_folder, tmp_path) -> Path:
    """One that changes much."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS, use_cache=False).logits
    return found


def both(tiny_model_folder, adapter) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, str(adapter)))


def merging(recipe_of, adapter, **sections) -> Path:
    model = {"name_or_path": str(adapter), "starting_adapter": "merge"}
    train = {"max_steps": 2, "precision": "fp32", "learning_rate": 5e-4}
    return recipe_of(model=model, train=train, eval={"sample_prompts": 0}, **sections)


def test_a_new_adapter_starts_on_the_merged_base(recipe_of, job_of, adapter, tiny_model_folder):
    job, progress = job_of(merging(recipe_of, adapter, lora={"r": 8}))
    assert torch.allclose(logits(job.generator), both(tiny_model_folder, adapter), atol=1e-4)
    assert job.plan.facts.kind == "merged"
    assert job.generator.peft_config["default"].r == 8  # not the first one's 4
    finish(job, train(job, progress), [])
    mine, run = logits(job.generator), job.plan.run
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(run / "base")
    base = AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.float32)  # as anyone would load the two
    assert torch.allclose(logits(PeftModel.from_pretrained(base, str(run))), mine, atol=1e-4)


def test_all_weights_start_from_the_merged_base(recipe_of, job_of, adapter, tiny_model_folder):
    path = merging(recipe_of, adapter, lora=None)
    job, _ = job_of(path, "learning_rate=1e-5")
    assert not hasattr(job.generator, "peft_config")
    assert torch.allclose(logits(job.generator), both(tiny_model_folder, adapter), atol=1e-4)


def test_four_bits_are_those_of_the_merged_base(recipe_of, job_of, adapter, tiny_model_folder):
    pytest.importorskip("bitsandbytes")
    job, _ = job_of(merging(recipe_of, adapter, quantization={"load_in_4bit": True}))
    kept = AutoModelForCausalLM.from_pretrained(job.plan.run / "base", dtype="auto")
    layer = job.generator.get_base_model().model.layers[0].mlp.up_proj.base_layer
    from bitsandbytes.functional import dequantize_4bit

    read = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    before = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype="auto")
    whole, unmerged = (m.model.layers[0].mlp.up_proj.weight.float() for m in (kept, before))
    assert 0 < (read - whole).abs().mean() < 0.5 * (read - unmerged).abs().mean()


def test_the_reference_of_dpo_is_the_merged_model(recipe_of, job_of, adapter, tmp_path):
    rows = [{"prompt": f"say {n}", "chosen": f"yes {n}", "rejected": f"no, not {n}"} for n in range(12)]
    model = {"name_or_path": str(adapter), "starting_adapter": "merge"}
    path = recipe_of(rows=rows, method="dpo", model=model, train={"max_steps": 1, "learning_rate": "auto"})
    job, _ = job_of(path)  # and that every margin is exactly 0 at the start is checked there
    assert job.plan.resolved.reference.kind == "adapter off"


def test_whole_runs_resume_merge_and_are_uploaded_with_their_base(recipe_of, adapter, tiny_model_folder, tmp_path):
    path = merging(recipe_of, adapter)
    done = finetune("run", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    made = (run / "base" / "model.safetensors").stat().st_mtime_ns
    done = finetune("run", str(path), "--resume", "--set", "max_steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run / "base" / "model.safetensors").stat().st_mtime_ns == made  # not made again
    folder, _, found = merge(run)
    assert found.largest < 1e-5
    assert (folder / "model.safetensors").is_file()
    assert {file.name for file in hub.result_files(run)["base"]} >= {"config.json", "model.safetensors"}
    assert "adapter" in (run / "README.md").read_text().lower()
    done = finetune("run", str(path), "--overwrite", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run / "base" / "model.safetensors").stat().st_mtime_ns != made


@pytest.mark.parametrize("merged", [False, True])
def test_what_makes_no_sense_is_refused(merged, recipe_of, adapter, tmp_path):
    """A second adapter on the first; a merge where nothing is to be merged."""
    model = {"starting_adapter": "merge"} if merged else {"name_or_path": str(adapter)}
    done = finetune("validate", str(recipe_of(model=model)), "--fast", cwd=tmp_path)
    assert done.returncode == 2
    assert "FT103" in done.stderr
    assert ("there is nothing to merge" if merged else "set model.starting_adapter: merge") in done.stderr
