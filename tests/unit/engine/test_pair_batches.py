"""Pairs in batches: 8 are 3 + 3 + 2 and 2 processes with 4, for every method on pairs; what sorting makes of it."""

from typing import Any

import pytest
import torch

from finetune_cli.engine import loop
from tests.helpers import finetune, journal, tiny_tokenizer
from tests.parity.stock import token_rows

END = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
EIGHT = [
    (list(range(100, 103 + 5 * i)), [*range(40, 42 + i), END], [*range(200, 203 + (i * 3) % 7), END]) for i in range(8)
]
METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "loss_type": ["sigmoid", "sft"], "ref_model": None},
    "wpo": {"name": "dpo", "loss_type": "ipo", "use_weighting": True},
    "orpo": {"name": "orpo"},
    "reward": {"name": "reward"},
}


def sections(size: int, method: dict[str, Any]) -> dict[str, Any]:
    train = {"per_device_train_batch_size": size, "global_batch_size": 8, "learning_rate": "auto", "max_steps": 1}
    return {
        "rows": token_rows(EIGHT), "method": method, "train": train, "lora": {"r": 4, "init_lora_weights": False},
        "eval": {"eval_strategy": "no", "sample_prompts": 0}, "ignore": ["FT033"],
    }  # fmt: skip


def step(recipe_of: Any, job_of: Any, size: int, method: dict[str, Any]) -> tuple[dict[str, float], float]:
    job, _ = job_of(recipe_of(**sections(size, method)))
    job.policy.train()
    sums = loop.Sums()
    norm, _, _ = loop.optimiser_step(job, 0, measure=True, sums=sums)
    return sums.means(job), norm


@pytest.mark.parametrize("method", METHODS)
def test_eight_pairs_are_3_and_3_and_2(method, recipe_of, job_of):
    whole, norm = step(recipe_of, job_of, 8, METHODS[method])
    parts, same = step(recipe_of, job_of, 3, METHODS[method])
    assert parts == pytest.approx(whole, rel=1e-5, abs=1e-6)
    assert same == pytest.approx(norm, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "orpo", "reward"])
def test_eight_pairs_are_two_processes_with_four(method, recipe_of, tmp_path):
    numbers = []
    for processes, size in ((1, 8), (2, 4)):
        path = recipe_of(
            **sections(size, METHODS[method]),
            launch={"num_processes": processes},
            output_dir=str(tmp_path / f"run{processes}"),
        )
        done = finetune("run", str(path), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        numbers.append(next(line for line in journal(tmp_path / f"run{processes}") if line["event"] == "train"))
    own = {"tokens_per_second", "memory_gib", "seconds", "event"}
    one, two = ({k: v for k, v in n.items() if k not in own} for n in numbers)
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)


def test_sorting_sees_the_pairs_of_one_forward(recipe_of, job_of):
    """aot sorts whole batches: split, each forward is sorted by itself; one pair at a time it is the plain loss."""
    start = {"name": "dpo", "ref_model": "start"}
    method = {**start, "loss_type": "aot"}
    losses: dict[Any, float] = {}
    for size in (8, 1):
        job, progress = job_of(recipe_of(**sections(size, method)))
        with torch.no_grad():
            for p in job.trained:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.3)
        sums = loop.Sums()
        loop.optimiser_step(job, progress.step, measure=False, sums=sums)
        losses[size] = sums.means(job)["loss"]
        if size == 1:
            job, progress = job_of(recipe_of(**sections(8, start)))
            with torch.no_grad():
                for p in job.trained:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.3)
            loop.optimiser_step(job, progress.step, measure=False, sums=sums)
            losses["plain"] = sums.means(job)["loss"]
    assert losses[1] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses[8] != pytest.approx(losses["plain"], rel=1e-3)
