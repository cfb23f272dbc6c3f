"""Tokens that are new to a model: they get a row, adapters train it, plain peft loads it, a merge keeps it."""

import subprocess
import sys

import pytest
import torch

from finetune_cli.engine import models
from finetune_cli.engine.finish import finish
from finetune_cli.engine.loop import train
from finetune_cli.use.merge import merge
from tests.helpers import finetune, model_folder, said

NEW = ["<|call|>", "<|result|>"]
ROWS = [{"messages": said(f"what is {n}?", f"<|call|>{n}<|result|>")} for n in range(12)]
PLAIN = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
assert not any(name.startswith("finetune") for name in sys.modules)
ids = AutoTokenizer.from_pretrained(sys.argv[1]).convert_tokens_to_ids(["<|call|>", "<|result|>"])
with torch.no_grad():
    torch.save(model.eval()(torch.tensor([[20, *ids, 30]])).logits, sys.argv[2])
"""


def trained(recipe_of, job_of, base, **sections):
    path = recipe_of(
        rows=ROWS,
        model={"name_or_path": str(base), "new_tokens": NEW},
        train={"max_steps": 3, "learning_rate": 5e-4, "precision": "fp32"},
        eval={"sample_prompts": 0},
        ignore=["FT107"],
        **sections,
    )
    job, progress = job_of(path)
    start = job.generator.get_input_embeddings().weight.detach().clone()
    finish(job, train(job, progress), [])
    (job.plan.run / "plan.json").write_text(job.plan.model_dump_json())
    return job, start


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_their_rows_alone_are_trained_and_plain_peft_loads_them(tied, recipe_of, job_of, tmp_path):
    base = model_folder(tmp_path / "base", tie_word_embeddings=tied)
    job, start = trained(recipe_of, job_of, base)
    numbers = job.tokenizer.convert_tokens_to_ids(NEW)
    assert numbers == [len(start) - 2, len(start) - 1]
    now = job.generator.get_input_embeddings().weight.detach()
    moved = ((now - start).abs().amax(-1) > 1e-6).nonzero()[:, 0].tolist()
    assert moved == numbers
    if not tied:
        head = job.generator.get_output_embeddings()
        assert head.token_adapter.trainable_tokens_delta["default"].requires_grad
    with torch.no_grad():
        mine = job.generator.eval()(torch.tensor([[20, *numbers, 30]]), use_cache=False).logits
    file = tmp_path / "logits.pt"
    command = [sys.executable, "-c", PLAIN, str(job.plan.run), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(file)
    assert torch.allclose(mine, theirs, atol=1e-4), float((mine - theirs).abs().max())
    folder, _, found = merge(job.plan.run)
    assert found.largest < 1e-5
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert merged.config.vocab_size == len(start)


def test_known_tokens_by_text_and_by_id(recipe_of, job_of, tiny_model_folder):
    path = recipe_of(lora={"trainable_token_indices": ["<|im_start|>", 5]})
    job, _ = job_of(path)
    delta = job.generator.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert delta.shape[0] == 2
    assert job.generator.get_input_embeddings().token_adapter.token_indices["default"] == [
        job.tokenizer.convert_tokens_to_ids("<|im_start|>"),
        5,
    ]


def test_all_weights_train_them_too(recipe_of, job_of, tiny_model_folder):
    path = recipe_of(
        rows=ROWS,
        model={"new_tokens": NEW},
        lora=None,
        train={"learning_rate": 1e-5, "precision": "fp32"},
        ignore=["FT107"],
    )
    job, _ = job_of(path)
    assert job.generator.get_input_embeddings().weight.shape[0] == len(job.tokenizer)
    assert job.generator.get_input_embeddings().weight.requires_grad


def test_new_rows_are_the_same_at_every_load(tiny_model_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.add_tokens(NEW, special_tokens=True)
    made = []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        torch.manual_seed(seed)
        models.make_room(model, tokenizer)
        made.append(model.get_input_embeddings().weight.detach())
    assert torch.equal(*made)


def test_what_is_no_token_is_named(recipe_of, tmp_path):
    path = recipe_of(lora={"trainable_token_indices": ["no such token"]})
    done = finetune("validate", str(path), cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "'no such token' is no token" in done.stderr
    assert "model.new_tokens" in done.stderr
