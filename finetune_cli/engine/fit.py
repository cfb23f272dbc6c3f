"""`per_device_train_batch_size: auto`: the largest forward that fits, found by trying the longest rows.

Sizes go up, doubling, and no size is tried whose memory, by the line through the last two, is above the limit: on a
CPU nothing would be thrown, the system would end the process. The rows of an optimiser step stay the same.
"""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import torch

from finetune_cli.data.batches import counts_of
from finetune_cli.engine import checkpoint, memory

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job

SHARE = 0.9
"""Of what is there: allocators lose some to pieces that fit nowhere."""
INTERVAL = 0.002
"""Seconds between looks at the memory of a process on a CPU."""


def largest(cost: Callable[[int], float], *, limit: float, most: int) -> int:
    """The largest size up to `most` whose cost is at most `limit`; 0 where not even 1 is. `cost` grows about linearly,
    is inf where it failed, and is asked for rising sizes, each of which a line through the two before allows."""
    size, used = 1, cost(1)
    if used > limit:
        return 0
    slope = 0.0
    while size < most:
        wanted = min(2 * size, most)
        if slope and used + slope * (wanted - size) > limit:
            wanted = size + math.floor((limit - used) / slope)
        if wanted <= size:
            return size
        tried = cost(wanted)
        if tried > limit:
            return size
        slope = max((tried - used) / (wanted - size), 0.0)
        size, used = wanted, tried
    return size


def choose(job: "Job") -> int:
    """Rows (or bins) in a forward, the same for every process. Raises TrainError where one does not fit. Collective."""
    most = max(1, math.ceil(job.schedule.global_batch_size / job.world))
    limit = SHARE * memory.available(job) - memory.MOMENTS * sum(p.numel() for p in job.trained)
    state = checkpoint.rng_state()
    job.policy.train()  # as it is loaded it recomputes nothing and drops nothing out
    found: int = min(job.gather(largest(lambda size: cost(job, size), limit=limit, most=most)))
    checkpoint.set_rng_state(state)
    if found == 0:
        rows = job.rows_of(longest(job, 1))
        raise memory.answer(job, 1, rows, MemoryError(f"not even one row fits into {memory.gib(limit)}"))
    job.emit({"event": "fitted", "per_device_train_batch_size": found, "limit_gib": limit / memory.GIB})
    return found


def longest(job: "Job", size: int) -> list[int]:
    """The `size` longest rows or bins: what the worst step computes at once."""
    ordered = sorted(range(len(job.units)), key=lambda i: -job.schedule.lengths[i])
    return [ordered[i % len(ordered)] for i in range(size)]


def cost(job: "Job", size: int) -> float:
    """Bytes in use at the height of a forward and backward of the longest rows; inf where they are not to be had."""
    rows = job.rows_of(longest(job, size))
    if job.experience is not None:
        rows = job.experience.imagined(rows)
    peak = Peak(job.device)
    try:
        with peak, job.accelerator.no_sync(job.policy):
            for loss in job.method.losses(job.batch(rows, measure=True), job.models, counts_of(rows)):
                job.accelerator.backward(loss.total)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_exhausted(error):
            raise
        return math.inf
    finally:
        job.optimizer.zero_grad()
        if job.device.type == "cuda":
            torch.cuda.empty_cache()
    return peak.bytes


class Peak:
    """The most memory in use between enter and exit."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.bytes = 0.0

    def __enter__(self) -> "Peak":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return self
        self.process, self.done = psutil.Process(), threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.done.wait(INTERVAL):
            self.bytes = max(self.bytes, float(self.process.memory_info().rss))

    def __exit__(self, *failed: object) -> None:
        if self.cuda:
            self.bytes = float(torch.cuda.max_memory_allocated())
            return
        self.done.set()
        self.thread.join()
        self.bytes = max(self.bytes, float(self.process.memory_info().rss))


def settle(job: "Job", known: int | None) -> None:
    """Give the schedule its size: `known` from a checkpoint, so that a resumed run splits its steps as before."""
    if job.recipe.train.per_device_train_batch_size == "auto":
        job.schedule = replace(job.schedule, per_device_batch_size=known or choose(job), _orders={})
