"""What is done about the signs of `health`: told, counted, and where a number is not finite, stopped or passed over."""

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune_cli.engine.health import MAX_OVERFLOWS, MAX_SKIPPED, Finding
from finetune_cli.errors import TrainError

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job
    from finetune_cli.engine.loop import Progress

BAD_ROWS = "bad_rows.jsonl"
MOVED_WITHIN = 3
"""Steps with a learning rate within which some weight changes; in float32 a step below 6e-8 of a weight is lost."""


def tell(job: "Job", progress: "Progress", found: Sequence[Finding], **fields: Any) -> None:
    for finding in found:
        job.emit(job.event("health", progress.step, rule=finding.rule, message=finding.message, **fields))


def norm(job: "Job", progress: "Progress", value: float, rows: Sequence[int]) -> None:
    """A gradient that explodes is reported; one that is not a number stops the run or is passed over, before anything
    of it is saved. Raises TrainError."""
    limit, health = job.recipe.health.max_grad_norm_warning, progress.health
    if math.isfinite(value):
        health.overflows = 0
        if value > limit:
            message = f"gradient norm {value:.3g} is above {limit:g}; lower train.learning_rate if it stays there"
            tell(job, progress, [Finding("grad_norm", message)])
        return
    if job.plan.resolved.precision == "fp16":  # the scaler passes over such steps by itself, and looks for its scale
        health.overflows += 1
        if health.overflows < MAX_OVERFLOWS:
            return
    health.skipped += 1
    skips = job.recipe.health.on_nan == "skip" and health.skipped <= MAX_SKIPPED
    sources = [row.source for row in job.rows_of(rows)]
    message = f"the gradient of step {progress.step} is not finite"
    done = f"; the step is passed over ({health.skipped} of at most {MAX_SKIPPED})" if skips else ""
    write_rows(job, progress.step, rows)
    tell(job, progress, [Finding("nan", f"{message}{done}; its rows are in {BAD_ROWS}")], rows=sources)
    if not skips:
        raise TrainError(
            f"{message} (rows {', '.join(map(str, sources[:8]))}{', ...' if len(sources) > 8 else ''})",
            f"Look at these rows ({BAD_ROWS}), lower train.learning_rate, use train.precision: fp32, or pass over such "
            "steps with health.on_nan: skip. The weights were not changed by this step; the last checkpoint is good.",
        )


def write_rows(job: "Job", step: int, units: Sequence[int]) -> None:
    """The rows of a step, as text, for people to look at."""
    if not job.accelerator.is_main_process:
        return
    with (job.plan.run / BAD_ROWS).open("a", encoding="utf-8") as file:
        for row in job.rows_of(units):
            texts = {b.name: job.tokenizer.decode(b.ids) for b in row.branches}
            about = {"step": step, "row": row.source, "tokens": row.length, "prefix": job.tokenizer.decode(row.prefix)}
            file.write(json.dumps({**about, **texts}, ensure_ascii=False) + "\n")


class Stillness:
    """Whether any trained weight changes in the first steps that have a learning rate."""

    def __init__(self, job: "Job") -> None:
        self.before = sizes(job)
        self.steps = 0

    def look(self, job: "Job", learning_rate: float) -> list[Finding]:
        """After every step; collective where weights are spread over processes."""
        if self.steps >= MOVED_WITHIN or learning_rate == 0:
            return []
        self.steps += 1
        if self.steps < MOVED_WITHIN or sizes(job) != self.before:
            return []
        return [
            Finding(
                "nothing_changes",
                f"no trained weight has changed in {MOVED_WITHIN} steps: the learning rate {learning_rate:g} is too "
                "small for their number format, or no gradient reaches them",
            )
        ]


def sizes(job: "Job") -> list[float]:
    """The norm of every trained tensor, in float64: two updates do not cancel in it."""
    return job.pieces.norms(job.trained)
