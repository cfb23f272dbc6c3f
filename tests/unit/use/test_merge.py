"""Merging: what is saved says what base and adapter said, loads without us, and is never of 4 bits."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from finetune_cli.engine.finish import finish
from finetune_cli.engine.loop import train
from finetune_cli.errors import ModelError, RecipeError
from finetune_cli.use import merge as module
from finetune_cli.use.merge import BOUNDS, agreement, merge
from tests.helpers import finetune

LOAD = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0, -1].float().tolist()
assert not [name for name in sys.modules if name.startswith(("finetune_cli", "peft"))]
print(json.dumps({"logits": logits, "dtype": str(model.dtype), "stops": model.generation_config.eos_token_id,
                  "template": tokenizer.chat_template, "quantised": hasattr(model.config, "quantization_config")}))
"""


def plain(folder, ids):
    """What a process says that knows nothing of us."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), json.dumps(ids)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def trained(recipe_of, job_of):
    """The folder of a finished run whose adapter says something: `trained(lora={...})`."""

    def make(**sections):
        told = {"train": {"learning_rate": 5e-3, "max_steps": 4}, "eval": {"sample_prompts": 0}, **sections}
        job, progress = job_of(recipe_of(**told))
        finish(job, train(job, progress), [])
        (job.plan.run / "plan.json").write_text(job.plan.model_dump_json())
        return job.plan.run

    return make


def said_by(run, ids, tiny_model_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(run)).eval()(torch.tensor([ids])).logits[0, -1], base


@pytest.mark.parametrize(
    "lora",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}],
    ids=["plain", "rslora", "dora", "head", "pissa"],
)
def test_merged_is_base_and_adapter(lora, trained, tiny_model_folder, tmp_path):
    run = trained(lora=lora)
    folder, kind, found = merge(run)
    assert (folder, kind) == (run / "merged", "float32")
    assert found.largest < 1e-5
    assert found.same == 1.0
    ids = [20, 30, 40, 50]
    wanted, _ = said_by(run, ids, tiny_model_folder)
    loaded = plain(folder, ids)
    assert float((torch.tensor(loaded["logits"]) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert loaded["dtype"] == "torch.float32"
    assert loaded["stops"] is not None
    assert "<|im_start|>" in loaded["template"]


def test_a_merged_reward_model_is_read_at_the_last_token(trained, tiny_model_folder):
    """Padded or not: its configuration has the pad token of the run, which may be another than the base's."""
    pair = {"prompt": "one", "chosen": " two", "rejected": " three"}
    run = trained(method="reward", rows=[pair] * 8, train={"learning_rate": 1e-4, "max_steps": 4})
    folder, _, _ = merge(run, None, dtype="float32")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    short, long = [*tokenizer("one two").input_ids, tokenizer.eos_token_id], tokenizer("one two three four").input_ids
    pads = [tokenizer.pad_token_id] * (len(long) - len(short))
    with torch.no_grad():
        alone = model(torch.tensor([short])).logits[0, 0]
        assert model(torch.tensor([[*short, *pads], long])).logits[0, 0].item() == pytest.approx(float(alone), abs=1e-5)
        last = model.model(torch.tensor([short])).last_hidden_state[0, -1]
        assert float(model.score(last)) == pytest.approx(float(alone), abs=1e-5)


def test_large_models_are_saved_in_shards(trained, monkeypatch):
    monkeypatch.setattr(module, "SHARD", "60KB")
    folder, _, found = merge(trained())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(folder.glob("model-*.safetensors"))) > 1
    assert found.largest < 1e-5
    assert len(plain(folder, [20, 30])["logits"]) > 400


def test_a_run_on_four_bits_is_merged_into_the_whole_base(trained, tiny_model_folder):
    run = trained(quantization={"load_in_4bit": True})
    folder, kind, found = merge(run, dtype="bfloat16")
    assert kind == "bfloat16"
    assert 0 < found.largest < BOUNDS["bfloat16"]
    loaded = plain(folder, [20, 30])
    assert not loaded["quantised"]
    assert loaded["dtype"] == "torch.bfloat16"
    weights = load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    base = load_file(tiny_model_folder / "model.safetensors")
    adapter = load_file(run / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "BA")
    wanted = base[f"{name}.weight"].to(torch.bfloat16).float() + 2 * a @ b  # lora_alpha / r is 2
    assert torch.allclose(weights[f"{name}.weight"].float(), wanted, rtol=2**-8, atol=1e-6)


def test_a_merge_that_says_something_else_is_refused(trained, monkeypatch):
    run = trained()
    reading = module.read_back

    def spoiled(plan, folder):
        file = folder / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
        save_file(weights, file, metadata={"format": "pt"})
        return reading(plan, folder)

    monkeypatch.setattr(module, "read_back", spoiled)
    with pytest.raises(ModelError, match="is not what base and adapter are"):
        merge(run)
    assert not (run / "merged").exists()
    assert not list(run.glob("*.writing"))


def test_what_cannot_be_merged(trained, tmp_path, recipe_of):
    with pytest.raises(RecipeError, match=r"no plan\.json"):
        merge(tmp_path)
    run = trained()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(RecipeError, match="exists"):
        merge(run, tmp_path / "used")
    (run / "report.json").unlink()
    with pytest.raises(RecipeError, match="not finished"):
        merge(run)


def test_the_command(trained, tmp_path):
    run = trained()
    done = finetune("merge", str(run), "--output", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "logits differ by at most" in done.stdout
    assert (tmp_path / "out" / "config.json").is_file()
    done = finetune("merge", str(run), "--output", str(tmp_path / "out"), "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert json.loads(done.stdout)["kind"] == "recipe error"


def test_agreement_by_hand():
    one, other = torch.tensor([[1.0, -4.0], [2.0, 3.0]]), torch.tensor([[1.0, -4.0], [3.5, 3.0]])
    found = agreement([one], [other])
    assert (found.largest, found.same, found.positions) == (1.5 / 4, 0.5, 2)
