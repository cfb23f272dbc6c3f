"""What a run takes: its steps and tokens from the rows alone, and its time by a few real steps on them."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune_cli.data.rows import RowSets
from finetune_cli.engine import finish, prepare
from finetune_cli.engine.job import Job
from finetune_cli.engine.loop import optimiser_step, total_steps
from finetune_cli.engine.prepare import Words
from finetune_cli.engine.update import Sums
from finetune_cli.plan.resolve import Plan
from finetune_cli.types import Row

WARM, STEPS = 1, 3
"""Steps that nobody times, and those that are."""


def length(plan: Plan, rows: list[Row]) -> dict[str, int]:
    """Optimiser steps of the run, and the tokens that it computes; of methods that draw answers, those of the prompts.
    Rows are taken to lie end to end."""
    recipe = plan.recipe
    units = prepare.make_units(rows, recipe, None)
    schedule = prepare.schedule_of(plan, units)
    asked = recipe.method.steps_in_all(plan.resolved.global_batch_size)
    steps = asked or total_steps(schedule.steps_per_epoch, recipe.train.num_train_epochs, recipe.train.max_steps)
    return {"steps": steps, "tokens": tokens(schedule.lengths, steps / schedule.steps_per_epoch)}


def tokens(lengths: Sequence[int], epochs: float) -> int:
    return round(sum(lengths) * epochs)


def calibrate(plan: Plan, words: Words, sets: RowSets) -> dict[str, Any]:
    """Seconds of a step and of the whole run, without evaluations and checkpoints, and the peak of memory. Nothing is
    left in the run folder. On one process: several share the rows of a step."""
    with TemporaryDirectory(prefix="finetune-") as folder:
        apart = plan.model_copy(update={"output_dir": str(Path(folder) / plan.run.name)})
        apart.run.mkdir()
        job, _ = prepare.build(apart, words, sets, lambda _: None, resume=None)
        found = timed(job)
        estimate = finish.estimated_gib(job)
        return {**found, "peak_memory_gib": job.memory_gib(), "estimated_memory_gib": estimate}


def timed(job: Job) -> dict[str, float]:
    """By the tokens of a few steps: one of long rows takes longer."""
    job.policy.train()
    seconds, done = 0.0, 0
    for step in range(min(WARM + STEPS, job.total_steps)):
        started = time.perf_counter()
        _, _, computed = optimiser_step(job, step, measure=False, sums=Sums())
        job.synchronize()
        if step >= WARM or job.total_steps <= WARM:
            seconds, done = seconds + time.perf_counter() - started, done + computed
    timed_steps = max(1, min(WARM + STEPS, job.total_steps) - WARM)
    per_step = seconds / timed_steps
    if job.experience is None and done:  # by tokens, as the steps of a run are of different sizes
        per_step = seconds / done * tokens(job.schedule.lengths, 1 / job.schedule.steps_per_epoch)
    whole = per_step * job.total_steps / job.plan.resolved.num_processes
    return {"seconds_per_step": per_step, "seconds": whole, "tokens_per_second": done / seconds}
