"""QLoRA: the first step on 4-bit and 8-bit weights is that of stock transformers and peft, whatever ran before it."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.helpers import questions
from tests.parity.test_sft import adapter, assert_equal_gradients, first_step

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_first_step_on_four_bits(kind, double, recipe_of, job_of, tiny_model_folder, tmp_path):
    asked = {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    compare(asked, 1e-5, recipe_of, job_of, tiny_model_folder, tmp_path)


def test_first_step_on_eight_bits(recipe_of, job_of, tiny_model_folder, tmp_path):
    """Products of 8-bit weights round their inputs row by row, pads included: near, not equal."""
    compare({"load_in_8bit": True}, 5e-2, recipe_of, job_of, tiny_model_folder, tmp_path)


def compare(asked: dict[str, Any], relative: float, recipe_of, job_of, tiny_model_folder, tmp_path) -> None:
    start = adapter(tiny_model_folder, tmp_path, "all-linear")
    path = recipe_of(
        rows=questions(4),
        lora=None,
        model={"name_or_path": str(start)},
        quantization=asked,
        train={"max_grad_norm": 0, "learning_rate": "auto"},
    )
    job, _ = job_of(path)
    assert job.policy.model.get_base_model().is_quantized
    assert {p.dtype for p in job.trained} == {torch.float32}
    loss, _, grads = first_step(job)
    base = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=BitsAndBytesConfig(**asked, bnb_4bit_compute_dtype="float32"),
        device_map={"": "cpu"},
    )
    model = PeftModel.from_pretrained(base, str(start), is_trainable=True).train()
    rows = [[*row.prefix, *row.branches[0].ids] for row in job.data.rows]
    trained = [[False] * len(row.prefix) + row.branches[0].trained for row in job.data.rows]
    total = sum(row.targets for row in job.data.rows)
    wanted = 0.0
    for ids, flags in zip(rows, trained, strict=True):  # one by one: nothing is padded
        logps = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        chosen = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        part = -chosen[torch.tensor(flags[1:])].sum() / total
        part.backward()
        wanted += float(part)
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(wanted, rel=relative)
    assert_equal_gradients(grads, theirs, relative)


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_run_on_four_bits_learns_and_leaves_the_base_as_it_was(optim, recipe_of, job_of, tiny_model_folder):
    from finetune_cli.engine.loop import Progress, train

    path = recipe_of(
        quantization={"load_in_4bit": True},
        train={"max_steps": 12, "optim": optim, "learning_rate": 4e-3, "lr_scheduler_type": "constant"},
        logging={"report_to": "none"},
    )
    lines: list[dict[str, Any]] = []
    job, _ = job_of(path, sink=lines.append)
    base = {n: p.clone() for n, p in job.policy.model.get_base_model().named_parameters() if not p.requires_grad}
    train(job, Progress())
    losses = [line["loss"] for line in lines if line["event"] == "train"]
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(p, base[n]) for n, p in job.policy.model.get_base_model().named_parameters() if n in base)
