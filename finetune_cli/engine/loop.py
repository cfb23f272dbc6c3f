"""The one training loop: steps, evaluations, checkpoints, in the order they happen."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.data.batches import counts_of, silent
from finetune_cli.engine import memory, watch
from finetune_cli.engine.evaluate import evaluate
from finetune_cli.engine.health import Health
from finetune_cli.engine.job import Job
from finetune_cli.engine.manifest import PREFIX
from finetune_cli.engine.signals import Interrupted
from finetune_cli.engine.update import Sums, Update
from finetune_cli.types import Balance, Counts, Layout, Models, Scores


@dataclass
class Clock:
    """Time and tokens of the optimiser steps since the last line; evaluations and saves are not counted."""

    seconds: float = 0.0
    tokens: int = 0

    def take(self) -> tuple[float, int]:
        taken = self.seconds, self.tokens
        self.seconds, self.tokens = 0.0, 0
        return taken


@dataclass
class Progress:
    """Where a run is, and what it has seen. `step` counts finished optimiser steps."""

    step: int = 0
    num_tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best: tuple[float, int] | None = None
    """(value where higher is better, step)"""
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    looked: bool = False
    """Whether the evaluation that is due after `step` is done; it can be cut off."""
    sums: Sums = field(default_factory=Sums)
    """What the next line will say."""
    clock: Clock = field(default_factory=Clock)
    health: Health = field(default_factory=Health)
    saved: int = 0
    """The step of the last checkpoint whose evaluation was done."""

    def to_json(self, sums: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
        """`sums` are those of every process, in order of rank."""
        best = list(self.best) if self.best else None
        inner = {"sums": list(sums), "clock": vars(self.clock), "health": vars(self.health)}
        return {**vars(self), "best": best, **inner}

    @classmethod
    def from_json(cls, state: dict[str, Any], *, rank: int = 0) -> "Progress":
        """Each process takes its own sums; one that was not there before starts with none."""
        every = state["sums"]
        sums = every[rank] if rank < len(every) else {name: [0.0, 0.0] for name in every[0]}
        best = tuple(state["best"]) if state["best"] else None
        clock, health = Clock(**state["clock"]), Health(**state["health"])
        return cls(**{**state, "best": best, "sums": Sums(sums), "clock": clock, "health": health})


def due(step: int, every: float, total: int) -> bool:
    """Whether something that happens every `every` steps (a share of the run below 1) happens after `step`."""
    period = max(1, round(every * total)) if every < 1 else int(every)
    return step % period == 0


def optimiser_step(job: Job, step: int, *, measure: bool, sums: Sums) -> tuple[float, Counts, int]:
    """One step: (gradient norm before clipping, counts, tokens computed), the latter two over all processes.

    It is one update, or as many as an online method makes of its answers; then the norm is the largest of theirs. An
    update whose gradient is not finite changes nothing and is the last; what it computed is not in the sums where it
    is not finite."""
    norms, counts, tokens, moved = [0.0], Counts(0, 0), 0, False
    updates = drawn(job, step) if job.experience is None else job.experience.updates(step, sums, measure=measure)
    for update in updates:
        norm, stepped = apply(job, update, measure=measure)
        if math.isfinite(norm) or all(job.gather(update.found.finite())):  # the norm is the same in every process
            sums.join(update.found)
        norms.append(norm)
        counts, tokens, moved = counts + update.counts, tokens + update.tokens, moved or stepped
        if not math.isfinite(norm):
            break
    if moved:
        job.scheduler.step()
    return norms[-1] if not math.isfinite(norms[-1]) else max(norms), counts, tokens


def drawn(job: Job, step: int) -> Iterator[Update]:
    """The rows of a step as they are: one update. A process without rows of its own computes another's, silently:
    collectives need everyone."""
    indices = job.schedule.step(step)
    rows = job.rows_of(indices)
    window = job.schedule.window(step, rank=job.rank, world=job.world)
    forwards = [job.rows_of(own) or [silent(job.units[indices[-1]][0])] for own in window]
    yield Update(forwards, counts_of(rows), sum(row.length for row in rows))


def apply(job: Job, update: Update, *, measure: bool) -> tuple[float, bool]:
    """Forward, backward, and a step of the optimiser: (gradient norm, whether the step was made)."""
    for number, rows in enumerate(update.forwards):
        batch = job.batch(rows, measure=measure)
        asked = Asked(job.models, update.said)
        with job.synchronised(last=number == len(update.forwards) - 1):
            for loss in job.method.losses(batch, asked, update.counts):
                total = balanced(loss.total, asked, batch, update)
                job.accelerator.backward(total * job.shares)
                update.found.add(loss.metrics)
    job.sum_gradients()
    return job.pieces.step(job)


@dataclass
class Asked:
    """The roles of a run, and what one of them said of the experts of its mixture."""

    models: Models
    before: dict[str, Any]
    """What they have said of this batch already; each is asked for once."""
    balance: Balance | None = None

    def __call__(self, role: str, batch: Any) -> Any:
        said = self.before.pop(role) if role in self.before else self.models(role, batch)
        if isinstance(said, Scores) and said.balance is not None:
            self.balance = said.balance
        return said

    def take(self) -> Balance | None:
        said, self.balance = self.balance, None
        return said


def balanced(total: Any, asked: Asked, batch: Layout, update: Update) -> Any:
    """A method's loss with that of the experts beside it: a mean over forwards, each weighing as its tokens."""
    said = asked.take()
    if said is None:
        return total
    tokens = sum(row.length for row in batch.rows) if batch.counts.tokens else 0
    update.found.add({"aux_loss": (said.loss.detach() * tokens, tokens)})
    return total + said.coefficient * said.loss * (tokens / update.tokens)


def train(job: Job, progress: Progress) -> Progress:
    """Run from `progress.step` to the end. Raises Interrupted, with the run saved, where it was asked to end."""
    if progress.step == 0 and not progress.looked:
        look(job, progress, final=job.total_steps == 0)
    job.stop.patient = True
    still = watch.Stillness(job)
    try:
        if progress.step and not progress.looked:
            after(job, progress)
        while progress.step < job.total_steps:
            if (number := job.stopping()) is not None:
                raise Interrupted(number)
            forward(job, progress, still)
            after(job, progress)
    except Interrupted as interrupted:
        saved = keep_what_is_done(job, progress)
        raise Interrupted(interrupted.number, step=progress.step, saved=saved) from None
    return progress


def keep_what_is_done(job: Job, progress: Progress) -> str | None:
    """Save, unless this step already is; the name of the checkpoint."""
    if progress.step == 0:
        return None
    if progress.saved != progress.step:
        job.save(progress)
    return f"{PREFIX}{progress.step}"


def forward(job: Job, progress: Progress, still: watch.Stillness) -> None:
    """One optimiser step, and the line about it where one is due."""
    job.policy.train()
    step, setting = progress.step + 1, job.recipe.logging
    logged = due(step, setting.logging_steps, job.total_steps) or step in (1, job.total_steps)
    started = time.perf_counter()
    learning_rate = job.scheduler.get_last_lr()[0]
    try:
        norm, counts, tokens = optimiser_step(job, progress.step, measure=logged, sums=progress.sums)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        largest = next(job.schedule.window(progress.step, rank=job.rank, world=job.world))
        raise memory.answer(job, step, job.rows_of(largest), error) from error
    job.synchronize()
    seconds = time.perf_counter() - started
    progress.clock.seconds += seconds
    progress.clock.tokens += tokens
    advance(progress, counts, tokens, seconds)
    if job.reference is not None:
        job.reference.after(progress.step)
    watch.norm(job, progress, norm, job.schedule.step(progress.step - 1))
    if math.isfinite(norm):  # a step that was passed over says nothing of the others
        watch.tell(job, progress, still.look(job, learning_rate))
    if logged:
        log(job, progress, grad_norm=norm, learning_rate=learning_rate)
    job.emit({"event": "progress", "step": progress.step, "total": job.total_steps})


def advance(progress: Progress, counts: Counts, tokens: int, seconds: float) -> None:
    progress.step += 1
    progress.looked = False
    progress.num_tokens += tokens
    progress.trained_tokens += counts.tokens
    progress.seconds += seconds


def log(job: Job, progress: Progress, *, grad_norm: float, learning_rate: float) -> None:
    means = progress.sums.means(job)
    seconds, tokens = progress.clock.take()
    numbers = {
        **means,
        "grad_norm": grad_norm,
        "learning_rate": learning_rate,
        "num_tokens": progress.num_tokens,
        "tokens_per_second": tokens / seconds,
        "memory_gib": job.memory_gib(),
        "seconds": seconds,
    }
    keep(progress, means)
    job.emit(job.event("train", progress.step, **numbers))
    found = progress.health.line(numbers, step=progress.step, memory_gib=job.memory_now_gib())
    watch.tell(job, progress, found)


def keep(progress: Progress, numbers: Mapping[str, float]) -> None:
    for name, value in numbers.items():
        progress.first.setdefault(name, value)
        progress.last[name] = value


def after(job: Job, progress: Progress) -> None:
    """What happens between steps: evaluation, then a checkpoint where one is due or this one is the best."""
    step, total, final = progress.step, job.total_steps, progress.step == job.total_steps
    setting = job.recipe.eval
    epoch_ends = step % job.schedule.steps_per_epoch == 0
    wanted = {"no": False, "epoch": epoch_ends, "steps": due(step, setting.eval_steps, total)}[setting.eval_strategy]
    improved = look(job, progress, final=final) if wanted or (final and setting.eval_strategy != "no") else False
    progress.looked = True
    keep_best = improved and job.plan.resolved.load_best_model_at_end
    if final or keep_best or due(step, job.recipe.save.save_steps, total):
        progress.saved = step
        job.save(progress)


def look(job: Job, progress: Progress, *, final: bool) -> bool:
    """Evaluate; True where it is the best so far (step 0 is the bar, not a candidate)."""
    if job.recipe.eval.eval_strategy == "no":
        return False
    numbers = evaluate(job, progress.step, final=final)
    if not numbers:
        return False
    keep(progress, numbers)
    value = job.merit(numbers)
    if progress.step == 0 or value is None or not math.isfinite(value):
        return False
    losses = [numbers[f"{s.prefix}loss"] for s in job.eval_sets if f"{s.prefix}loss" in numbers]
    if losses and "loss" in progress.last:
        watch.tell(job, progress, progress.health.evaluation(sum(losses) / len(losses), progress.last["loss"]))
    if progress.best is None or value > progress.best[0]:
        progress.best = (value, progress.step)
        return True
    return False


def total_steps(steps_per_epoch: int, epochs: float, max_steps: int | None) -> int:
    return max_steps if max_steps is not None else max(1, math.ceil(epochs * steps_per_epoch))
