"""Memory and disk: what a run is estimated to need, what it used, and what to change where that is too much.

Activations are those of Korthikanti et al. 2022 (arXiv 2205.05198, eq. 2): 34 bytes for each token, hidden unit and
layer in a 16-bit format, without the attention scores, which no kernel here keeps; 2 bytes where layers are computed
again (eq. 5), plus one layer in full.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from finetune_cli.engine import manifest
from finetune_cli.errors import MachineError, TrainError
from finetune_cli.types import Row

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job

GIB = 2**30
KEPT, KEPT_AGAIN = 34, 2
"""Bytes of activations for a token, hidden unit and layer at 16 bits: all of them kept, or computed again."""
GRADIENT, MOMENTS = 4, 8
"""Bytes for a trained weight: its float32 gradient, and the two float32 moments of Adam."""
CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process."""

    weights: int
    training: int
    """Gradients and the optimiser's state."""
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations

    def __str__(self) -> str:
        return (
            f"{gib(self.total)} (weights {gib(self.weights)}, gradients and optimiser {gib(self.training)}, "
            f"activations {gib(self.activations)})"
        )


def gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"


def estimate(job: "Job", tokens: int, *, again: bool) -> Estimate:
    """With forwards of `tokens` tokens; `again`: layers are computed again in backward."""
    parameters = list(job.policy.parameters())
    trained = sum(p.numel() for p in job.trained)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    return Estimate(weights, (GRADIENT + MOMENTS) * trained, activations(job, tokens, again=again))


def activations(job: "Job", tokens: int, *, again: bool) -> int:
    config = job.generator.config.get_text_config()
    width = 2 if job.plan.resolved.precision == "fp32" else 1
    layer = tokens * config.hidden_size * width
    if not again:
        return int(KEPT * layer * config.num_hidden_layers)
    return int(layer * (KEPT_AGAIN * config.num_hidden_layers + KEPT))


def is_exhausted(error: BaseException) -> bool:
    """Whether this is memory that could not be had."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in said or "can't allocate" in said
    )


def answer(job: "Job", step: int, rows: list[Row], error: BaseException) -> TrainError:
    """Out of memory in a step whose largest forward computes `rows`: estimated, measured, and three ways out."""
    tokens, again = sum(row.length for row in rows), job.plan.resolved.gradient_checkpointing
    found = estimate(job, tokens, again=again)
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    peak, room = gib(job.memory_gib() * GIB), gib(available(job))
    return TrainError(
        f"out of memory in step {step}, {len(rows)} rows of together {tokens} tokens in a forward\n"
        f"  estimated {found}\n  measured {peak} at its peak, of {room}\n  {said}",
        "\n  ".join(["Any of these makes room:", *knobs(job, rows, found)]),
    )


def knobs(job: "Job", rows: list[Row], found: Estimate) -> list[str]:
    """The three changes that save most, with their saving."""
    tokens, again, recipe = sum(row.length for row in rows), job.plan.resolved.gradient_checkpointing, job.recipe
    ways: list[tuple[int, str]] = []
    if len(rows) > 1:
        half = max(1, len(rows) // 2)
        saved = found.activations - found.activations * half // len(rows)
        ways.append((saved, f"train.per_device_train_batch_size: {half} with the same train.global_batch_size"))
    if not again:
        saved = found.activations - activations(job, tokens, again=True)
        ways.append((saved, "train.gradient_checkpointing: true, about a third slower"))
    longest = max(row.longest for row in rows)
    ways.append((found.activations // 2, f"data.max_length: {max(1, longest // 2)}, if rows may be cut or dropped"))
    if recipe.lora is None:
        ways.append((found.training * 97 // 100, "lora: {}, which trains some hundredths of the weights"))
    elif recipe.quantization is None:
        ways.append((found.weights * 7 // 10, "quantization: {load_in_4bit: true}"))
    ways.sort(key=lambda way: -way[0])
    return [f"{text} (saves about {gib(saved)})" for saved, text in ways[:3]]


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
    trained = sum(p.numel() for p in job.trained)
    every: Any = job.generator.parameters()
    adapted = hasattr(job.generator, "peft_config")
    model = 4 * trained if adapted else sum(p.numel() * p.element_size() for p in every)
    return model + MOMENTS * trained, model
