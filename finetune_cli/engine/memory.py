"""Memory and disk: what a run needs beside what there is, and what to change where that is too much."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from finetune_cli.engine import manifest
from finetune_cli.errors import MachineError, TrainError
from finetune_cli.plan.footprint import Estimate, Setup
from finetune_cli.plan.memory import estimate, extent, knobs, setup
from finetune_cli.types import Row

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job

GIB = 2**30
MOMENTS = 8
"""Bytes of the two float32 moments of Adam for a trained weight."""
LIBRARIES_GIB = 0.6
"""What a process on a CPU holds before its first tensor: Python, torch, transformers and what they open."""
WAYS = ("half of train.per_device_train_batch_size", "train.gradient_checkpointing: true", "half of data.max_length")
"""For a model whose memory cannot be estimated."""
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"


def setup_of(job: "Job", rows: list[Row]) -> Setup | None:
    """What memory depends on in a forward of `rows`; prompts that are answered have answers as long as they may be."""
    whole = rows if job.experience is None or any(row.branches for row in rows) else job.experience.imagined(rows)
    spread = extent(whole, padded=job.padded_because is not None)
    return setup(job.plan, spread, config=job.generator.config.to_dict(), batch=job.schedule.per_device_batch_size)


def is_exhausted(error: BaseException) -> bool:
    """Whether this is memory that could not be had."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in said or "can't allocate" in said
    )


def answer(job: "Job", step: int, rows: list[Row], error: BaseException) -> TrainError:
    """Out of memory in a step whose largest forward computes `rows`: estimated, measured, and three ways out."""
    found = setup_of(job, rows)
    tokens = sum(row.length for row in rows) if found is None else found.rows.tokens
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    lines = [f"out of memory in step {step}, {len(rows)} rows of together {tokens} tokens in a forward"]
    if found is not None:
        lines.append(f"estimated {told(job, estimate(found))}")
    lines += [f"measured {gib(job.memory_gib() * GIB)} at its peak, of {gib(available(job))}", said]
    ways = [f"{knob.setting} (saves about {gib(knob.saving * GIB)})" for knob in (knobs(found)[:3] if found else ())]
    return TrainError("\n  ".join(lines), "\n  ".join(["Any of these makes room:", *(ways or WAYS)]))


def told(job: "Job", found: Estimate) -> str:
    """The whole and its largest parts; on a CPU with the libraries, as what is measured is the resident set."""
    libraries = LIBRARIES_GIB * GIB if job.device.type == "cpu" else 0.0
    parts = sorted(found.lines, key=lambda line: -line.bytes)[:4]
    named = [
        *(f"{line.what} {gib(line.bytes)}" for line in parts),
        *([f"libraries {gib(libraries)}"] * bool(libraries)),
    ]
    return f"{gib(found.peak + libraries)} ({', '.join(named)})"


def available(job: "Job") -> int:
    """Bytes that this process may use: of the device, or on a CPU of the machine and of its control group."""
    if job.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved())
    own = psutil.Process().memory_info().rss
    limits = [int(text) for path in CGROUPS if path.exists() and (text := path.read_text().strip()).isdigit()]
    return int(min([psutil.virtual_memory().available + own, *limits]))


def check_disk(job: "Job") -> None:
    """Raises MachineError where the checkpoints that will be kept do not fit beside what is there."""
    run, setting = job.plan.run, job.recipe.save
    size, model = checkpoint_size(job)
    period = max(1, round(setting.save_steps * job.total_steps)) if setting.save_steps < 1 else int(setting.save_steps)
    saves = -(-job.total_steps // period)
    count = min(saves, setting.save_total_limit or saves) + 1  # the new one is there before the oldest goes
    there = sum(f.stat().st_size for folder in manifest.found(run) for f in folder.iterdir())
    needed, free = count * size + model - there, shutil.disk_usage(run).free
    if needed > free:
        raise MachineError(
            f"{run} has {gib(free)} of disk left; {count} checkpoints of {gib(size)} and the result need {gib(needed)}",
            "Lower save.save_total_limit, name an output_dir on another disk, or make room. The optimiser's state is "
            f"{gib(size - model)} of each checkpoint: lora: {{}} makes it small.",
        )


def checkpoint_size(job: "Job") -> tuple[int, int]:
    """(bytes of a checkpoint, of the model in it)."""
    trained = sum(map(job.pieces.numel, job.trained))
    every: Any = job.generator.parameters()
    adapted = hasattr(job.generator, "peft_config")
    model = 4 * trained if adapted else sum(job.pieces.numel(p) * p.element_size() for p in every)
    return model + MOMENTS * trained, model
