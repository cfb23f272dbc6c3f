"""Runs on a CUDA device, beside the CPU where numbers can be compared. They skip themselves where there is none.

Each run is a process of its own: a process that has looked for devices once, with none to be seen, finds none again.
`GPU_TESTS_ON=cpu` runs their logic without a device.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_cli.plan.machine import look
from tests.helpers import journal, model_folder, questions, write_recipe, write_rows

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not look().gpus, reason="there is no CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]
PAIRS = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "I would rather not say."} for n in range(12)]
JUDGE = "def judge(prompts, responses, rows):\n    return [float(len(text)) for text in responses]\n"


def process(*command: str, cpu: bool = False) -> str:
    """What a Python process prints; it may see the devices unless it is to use the CPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if cpu else {}
    env = {**os.environ, "PYTHONPATH": str(ROOT), **hidden}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def model(tmp_path):
    """Heads of 32 numbers: kernels take none of 8."""
    return model_folder(tmp_path / "model", hidden_size=128, intermediate_size=256)


@pytest.fixture
def run(tmp_path, model):
    """(report, lines of the journal, plan) of a run."""

    def made(name, *, rows=None, cpu=False, **sections):
        data = {"train": str(write_rows(tmp_path / f"{name}.jsonl", questions(12) if rows is None else rows))}
        recipe = write_recipe(
            tmp_path / f"{name}.yaml",
            **{"model": {"name_or_path": str(model)}, "data": data, "output_dir": str(tmp_path / name), **sections},
        )
        process("-m", "finetune_cli", "run", str(recipe), cpu=cpu)
        told = (json.loads((tmp_path / name / f"{file}.json").read_text()) for file in ("report", "plan"))
        report, plan = told
        assert report["device"].startswith("cpu" if cpu else DEVICE)
        return report, journal(tmp_path / name), plan

    return made


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def test_kernels_are_near_float32():
    """Outputs and gradients with shared prefixes, windows and grouped heads."""
    found = json.loads(process("tests/gpu/kernels.py", DEVICE))
    assert found
    for one in found:
        most = 0.02 if one["dtype"] == "torch.bfloat16" else 0.004
        assert max(one["ours"]) < most, one


METHODS = {
    "sft": {"method": "sft"},
    "packed": {"method": {"name": "sft", "packing": True}, "train": {"per_device_train_batch_size": 1}},
    "dpo": {"method": "dpo", "rows": PAIRS},
    "orpo": {"method": "orpo", "rows": PAIRS},
    "reward": {"method": "reward", "rows": PAIRS},
    "ppo": {"method": {"name": "ppo"}, "rows": [{"prompt": f"Say {n}."} for n in range(12)]},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_bfloat16(run, tmp_path, name):
    sections = json.loads(json.dumps(METHODS[name]))
    if name == "ppo":
        (tmp_path / "judge.py").write_text(JUDGE)
        sections["method"]["reward"] = f"{tmp_path}/judge.py:judge"
    sections["train"] = {"precision": "bf16", **sections.get("train", {})}
    report, lines, plan = run(name, **sections)
    assert report["status"] == "finished"
    assert report["steps"] == 3
    assert not report["layout"]["padded"], report["layout"]
    assert all(math.isfinite(x) for x in losses(lines))
    if DEVICE == "cuda":
        assert plan["resolved"]["attn_implementation"] in ("varlen", "flash_attention_2")
        assert 0 < report["peak_memory_gib"] < 2


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": None},
        {"quantization": {"load_in_4bit": True}},
        {"train": {"precision": "bf16", "optim": "adamw_8bit"}, "lora": None},
        {"train": {"precision": "bf16", "gradient_checkpointing": True}},
        pytest.param(
            {"train": {"precision": "fp16"}}, marks=pytest.mark.skipif(DEVICE == "cpu", reason="CPUs have no fp16")
        ),
    ],
    ids=["full", "qlora", "8-bit optimiser", "checkpointing", "fp16"],
)
def test_every_kind_of_weights(run, sections):
    report, lines, _ = run("kind", **{"train": {"precision": "bf16"}, **sections})
    assert report["status"] == "finished"
    assert losses(lines)[-1] < losses(lines)[0] + 0.5
    assert all(math.isfinite(x) for x in losses(lines))


@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_the_losses_are_those_of_the_cpu(run, model, layout):
    """In float32, step by step; the first before anything has been learned."""
    own = {"train": {"precision": "fp32"}, "model": {"name_or_path": str(model), "layout": layout}}
    of_cpu, ours = (losses(run(f"cpu-{cpu}", cpu=cpu, **own)[1]) for cpu in (True, False))
    assert len(ours) == 3
    assert ours == pytest.approx(of_cpu, rel=2e-3)


def test_a_run_goes_on_where_it_was(run, tmp_path):
    """The steps after a checkpoint once more: as they were, but for the order in which a GPU adds."""
    _, lines, _ = run("whole", train={"max_steps": 4, "precision": "bf16"}, save={"save_steps": 2})
    (tmp_path / "whole" / "report.json").unlink()
    shutil.rmtree(tmp_path / "whole" / "checkpoint-4")
    process("-m", "finetune_cli", "run", str(tmp_path / "whole.yaml"), "--resume")
    again = losses(journal(tmp_path / "whole"))
    assert again[:2] == losses(lines)[:2]
    assert again[2:] == pytest.approx(losses(lines)[2:], rel=2e-2)


def test_the_result_is_merged_and_answers(run, tmp_path):
    run("merged", train={"precision": "bf16"})
    process("-m", "finetune_cli", "merge", str(tmp_path / "merged"), "-o", str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert process("-m", "finetune_cli", "chat", str(tmp_path / "merged"), "--prompt", "What is two plus 1?").strip()
