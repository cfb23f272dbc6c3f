"""What is trained with each kind of adapter is what plain peft loads: the same logits, on a base nobody touched."""

import pytest
import torch

from finetune_cli.engine.finish import finish
from finetune_cli.engine.loop import train
from tests.helpers import finetune, model_folder

KINDS = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pattern": {"target_modules": r".*\.(q|v)_proj"},
    "dropout": {"lora_dropout": 0.1},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_is_trained(kind, tied, recipe_of, job_of, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if tied and kind not in ("plain", "head", "embedding"):
        pytest.skip("ties are of embedding and head alone")
    base = model_folder(tmp_path / "base", tie_word_embeddings=tied)
    path = recipe_of(
        model={"name_or_path": str(base)},
        lora=KINDS[kind],
        train={"learning_rate": 5e-3, "max_steps": 3},
        eval={"sample_prompts": 0},
    )
    job, progress = job_of(path)
    finish(job, train(job, progress), [])
    ids = torch.tensor([[20, 30, 40, 50, 60]])
    trained = job.generator.eval()
    with torch.no_grad():
        mine = trained(ids, use_cache=False).logits
        start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = start(ids).logits
        theirs = PeftModel.from_pretrained(start, str(job.plan.run)).eval()(ids).logits
    assert float((mine - before).abs().max()) > 1e-2  # something was learned
    assert torch.allclose(mine, theirs, atol=1e-4), float((mine - theirs).abs().max())


@pytest.mark.parametrize(
    ("lora", "quantization", "said"),
    [
        ({"init_lora_weights": "eva"}, None, "it needs the activations of rows"),
        ({"init_lora_weights": "pisa"}, None, "there is no such one"),
        ({"init_lora_weights": "pissa"}, {"load_in_4bit": True}, "changes the base, which is quantised"),
    ],
)
def test_what_cannot_be_loaded_again_is_refused(lora, quantization, said, recipe_of, tmp_path):
    path = recipe_of(lora=lora, quantization=quantization)
    done = finetune("validate", str(path), "--fast", cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "FT113" in done.stderr
