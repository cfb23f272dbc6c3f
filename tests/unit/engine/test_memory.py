"""What does not fit is said with numbers and a way out; what fits is found without changing the run."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_cli.engine import fit, memory
from finetune_cli.engine.loop import train
from finetune_cli.errors import MachineError, RecipeError, TrainError
from finetune_cli.plan.memory import estimate, extent, setup
from tests.helpers import questions

AUTO = {"per_device_train_batch_size": "auto", "global_batch_size": 8}


@given(base=st.floats(0, 1e3), slope=st.floats(0.1, 1e3), limit=st.floats(1, 1e5), most=st.integers(1, 300))
def test_largest_of_a_line(base, slope, limit, most):
    """Exactly the largest that fits; and nothing above the limit is tried once a line is known (after 1 and 2)."""
    tried = []

    def cost(size):
        tried.append(size)
        return base + slope * size

    found = fit.largest(cost, limit=limit, most=most)
    wanted = max((n for n in range(1, most + 1) if base + slope * n <= limit), default=0)
    assert abs(found - wanted) <= (1 if wanted > 2 else 0)  # rounding of the line
    assert found <= wanted
    assert tried == sorted(set(tried))
    assert all(base + slope * n <= limit * 1.000001 for n in tried if n > 2)


def test_largest_where_a_try_fails():
    """A GPU says no: the last that worked."""
    assert fit.largest(lambda n: n if n <= 5 else math.inf, limit=1e9, most=64) == 4
    assert fit.largest(lambda n: math.inf, limit=1e9, most=64) == 0


def weights(job):
    return {n: p.detach().clone() for n, p in job.generator.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("fits", "size"), [(3, 3), (100, 8)])
def test_auto_keeps_the_rows_of_a_step_and_changes_nothing_else(recipe_of, job_of, monkeypatch, fits, size):
    """The same bits as with the size that it finds written into the recipe; dropout is on."""
    sections = {"rows": questions(24), "lora": {"lora_dropout": 0.1}, "eval": {"eval_strategy": "no"}}
    given, progress = job_of(recipe_of(**sections, train={**AUTO, "per_device_train_batch_size": size}))
    train(given, progress)
    monkeypatch.setattr(memory, "available", lambda job: 10**12)
    monkeypatch.setattr(fit, "cost", lambda job, n, real=fit.cost: real(job, n) if n <= fits else math.inf)
    events = []
    path = recipe_of(**sections, train=AUTO)
    monkeypatch.setattr(
        fit, "largest", lambda cost, *, limit, most: max(n for n in range(1, most + 1) if cost(n) < limit)
    )
    found, progress = job_of(path, sink=events.append)
    assert found.schedule.per_device_batch_size == size
    assert [e["per_device_train_batch_size"] for e in events if e["event"] == "fitted"] == [size]
    assert [found.schedule.step(n) for n in range(3)] == [given.schedule.step(n) for n in range(3)]
    train(found, progress)
    one, other = weights(given), weights(found)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert fit.longest(found, 2) == sorted(range(24), key=lambda i: -found.schedule.lengths[i])[:2]


def test_sizes_are_tried_as_training_computes_them(recipe_of, job_of, monkeypatch):
    """In eval nothing would be recomputed and nothing dropped out."""
    seen = []
    monkeypatch.setattr(fit, "cost", lambda job, n: seen.append(job.policy.training) or 1.0)
    monkeypatch.setattr(memory, "available", lambda job: 10**12)
    job_of(recipe_of(train=AUTO))
    assert seen
    assert all(seen)


def test_auto_within_an_injected_limit(recipe_of, job_of, monkeypatch):
    """Measured for real: a limit below what the process has refuses even one row, with numbers."""
    job, _ = job_of(recipe_of(train=AUTO))
    assert fit.cost(job, 2) > 50 * 2**20
    monkeypatch.setattr(memory, "available", lambda job: 50 * 2**20)
    with pytest.raises(TrainError, match="not even one row fits"):
        job_of(recipe_of(train=AUTO))


def test_auto_needs_the_rows_of_a_step(recipe_of, job_of):
    with pytest.raises(RecipeError) as caught:
        job_of(recipe_of(train={"per_device_train_batch_size": "auto", "global_batch_size": "auto"}))
    assert "needs a number for global_batch_size" in str(caught.value.problems[0])


def test_a_resumed_run_splits_its_steps_as_before(recipe_of, job_of, monkeypatch):
    path = recipe_of(train=AUTO, eval={"eval_strategy": "no"})
    job, progress = job_of(path)
    job.schedule = fit.replace(job.schedule, per_device_batch_size=3)
    progress.step = 1
    folder = job.save(progress)
    monkeypatch.setattr(fit, "choose", lambda job: 1 / 0)
    again, _ = job_of(path, resume=folder)
    assert again.schedule.per_device_batch_size == 3


def test_out_of_memory_is_answered_with_numbers_and_three_ways(recipe_of, job_of, monkeypatch):
    job, progress = job_of(recipe_of(eval={"eval_strategy": "no"}))

    def exhausted(role, args, out):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    job.policy.register_forward_hook(exhausted)
    with pytest.raises(TrainError, match="out of memory in step 1, 2 rows") as caught:
        train(job, progress)
    message, hint = caught.value.message, caught.value.hint
    assert "estimated" in message
    assert "measured" in message
    assert "Tried to allocate 2.00 GiB" in message
    assert hint.count("saves about") == 3
    for knob in ("train.per_device_train_batch_size: 1", "gradient_checkpointing: true"):
        assert knob in hint


def test_the_estimate_of_the_answer_is_that_of_the_plan(recipe_of, job_of):
    """Of the rows at hand and the loaded model's configuration; the parts add up."""
    job, _ = job_of(recipe_of())
    rows = job.rows_of([0, 1])
    found = memory.setup_of(job, rows)
    assert found.rows == extent(rows, padded=False)
    assert found == setup(job.plan, extent(rows, padded=False))
    whole = estimate(found)
    assert whole.peak == sum(line.bytes for line in whole.lines)
    assert memory.told(job, whole).startswith(memory.gib(whole.peak + 0.6 * 2**30))


def test_other_errors_are_not_memory():
    assert not memory.is_exhausted(RuntimeError("shapes do not match"))
    assert memory.is_exhausted(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"))


@pytest.mark.parametrize(("limit", "steps", "count"), [(2, 6, 3), (9, 6, 7), (None, 6, 7)])
def test_disk_is_checked_before_the_first_step(recipe_of, job_of, monkeypatch, limit, steps, count):
    """A checkpoint is 4 + 8 bytes a trained weight here; one more than is kept is there for a moment."""
    path = recipe_of(train={"max_steps": steps}, save={"save_steps": 1, "save_total_limit": limit})
    job, _ = job_of(path)
    trained = sum(p.numel() for p in job.trained)
    assert memory.checkpoint_size(job) == (12 * trained, 4 * trained)
    needed = count * 12 * trained + 4 * trained
    for free, enough in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(memory.shutil, "disk_usage", lambda run, free=free: SimpleNamespace(free=free))
        if enough:
            memory.check_disk(job)
            continue
        with pytest.raises(MachineError, match=f"{count} checkpoints") as caught:
            memory.check_disk(job)
        assert caught.value.exit_code == 4
        assert "save_total_limit" in caught.value.hint
