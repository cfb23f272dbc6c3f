"""The recipes that people copy are valid, and become the plan they promise on the machine in their name."""

from pathlib import Path

import pytest

from finetune_cli import commands
from finetune_cli.plan.machine import Gpu, Machine
from finetune_cli.shipped import recipes_folder

COPIED = sorted(recipes_folder().glob("qwen2.5-7b-*.yaml"))
RATES = {"dpo": 5e-6, "orpo": 2e-5, "reward": 1e-4}


@pytest.mark.parametrize("path", COPIED, ids=lambda path: path.stem)
def test_it_is_planned_for_the_gpu_in_its_name(path: Path, monkeypatch: pytest.MonkeyPatch):
    _, method, kind, size = path.stem.replace("qwen2.5-7b", "qwen").split("-")
    card = Gpu(name="a GPU", memory_gib=float(size.removesuffix("gb")), compute_capability=8.9)
    machine = Machine(cpus=16, memory_gib=64, gpus=[card], cpu_bf16=False)
    monkeypatch.setattr("finetune_cli.plan.machine.look", lambda: machine)
    heard = []
    plan = commands.checked(path, [], heard.append).plan
    assert [problem for problem in heard if problem.severity == "error"] == []
    resolved = plan.resolved
    assert plan.recipe.method.name == method
    assert (plan.recipe.quantization is not None) == (kind == "qlora")
    assert (resolved.precision, resolved.learning_rate) == ("bf16", RATES[method])
    assert resolved.gradient_checkpointing
    assert resolved.gradient_accumulation_steps * plan.recipe.train.per_device_train_batch_size == 32
    assert (resolved.reference.kind if resolved.reference else None) == ("adapter off" if method == "dpo" else None)


def test_there_is_one_for_each_method_and_size():
    assert {path.stem.split("-")[2] for path in COPIED} == {"dpo", "orpo", "reward"}
    assert {path.stem.split("-", 3)[3] for path in COPIED} == {"lora-24gb", "lora-80gb", "qlora-24gb", "qlora-80gb"}
