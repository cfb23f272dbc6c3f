"""A job: everything a run holds in memory, built once from the plan."""

import resource
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from finetune_cli.data.batches import Batch, Schedule, padded, silent, tree
from finetune_cli.data.encode import Encoded
from finetune_cli.engine import checkpoint, manifest
from finetune_cli.engine.actor import POLICY
from finetune_cli.engine.events import Sink
from finetune_cli.engine.experience import Experience
from finetune_cli.engine.hub import Pusher
from finetune_cli.engine.manifest import PREFIX
from finetune_cli.engine.metrics import Metric
from finetune_cli.engine.pieces import Pieces, model_state
from finetune_cli.engine.reference import Reference
from finetune_cli.engine.signals import CAUGHT, Stop
from finetune_cli.methods import Method
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.sections import Recipe
from finetune_cli.types import Prompt, Row


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set; `name` is empty for the unnamed one."""

    name: str
    rows: list[Row]
    prompts: list[Prompt]

    @property
    def prefix(self) -> str:
        return f"eval_{self.name}_" if self.name else "eval_"


@dataclass
class Job:
    """The state of a run that is not its progress."""

    plan: Plan
    accelerator: Any
    tokenizer: Any
    policy: nn.Module
    """The wrapped Role."""
    pieces: Pieces
    optimizer: Any
    scheduler: Any
    data: Encoded
    units: list[list[Row]]
    """What a batch is counted in: rows, or bins of packed rows."""
    eval_sets: list[EvalSet]
    sample_prompts: list[Prompt]
    stop_ids: list[int]
    schedule: Schedule
    total_steps: int
    metric: tuple[str, Metric] | None
    sink: Sink
    padded_because: str | None = None
    """Why rows are padded; None where they lie end to end."""
    trained: list[nn.Parameter] = field(default_factory=list)
    reference: Reference | None = None
    """The frozen model that the method asks while it trains; None where there is none, or its answers are known."""
    reference_report: dict[str, Any] | None = None
    experience: Experience | None = None
    """What answers prompts and judges the answers, for methods that learn from their own."""
    warnings: list[str] = field(default_factory=list)
    """What the checks warned of, each with its rule."""
    peaks: list[float] = field(default_factory=list)
    """Peak memory of every process, GiB; filled in at the end."""
    stop: Stop = field(default_factory=Stop)
    """Whether this process has been asked to end."""
    pusher: Pusher | None = None
    """Who uploads; None where nothing is, and in all processes but the first."""
    data_fingerprint: str = ""
    """sha256 of the rows that are trained on."""

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def method(self) -> Method:
        return self.plan.recipe.method

    def rows_of(self, units: Iterable[int]) -> list[Row]:
        return [row for unit in units for row in self.units[unit]]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.stop_ids[0] if self.stop_ids else 0)

    @property
    def sharded(self) -> bool:
        """Whether every process holds a piece of each weight, so that all of them compute the same modules in step."""
        return self.plan.resolved.strategy != "ddp" and self.world > 1

    def gathered(self) -> AbstractContextManager[None]:
        """A time in which processes need not compute in step. Collective."""
        return self.pieces.gathered(self.policy) if self.sharded else nullcontext()

    @property
    def generator(self) -> Any:
        """The bare model with its adapters, the policy's switched in, for generation."""
        if self.experience is not None:
            self.experience.actor.switch(POLICY)
        return self.accelerator.unwrap_model(self.policy).model

    def batch(self, rows: list[Row], *, measure: bool, as_padded: bool | None = None) -> Batch:
        """Rows as tensors on the device, in the layout that the policy takes, or as said."""
        if self.padded_because is not None if as_padded is None else as_padded:
            made = padded(rows, self.pad_id)
        else:
            made = tree(rows, backend=self.plan.resolved.attn_implementation)
        made.measure = measure
        return made.to(self.device)

    def models(self, role: str, batch: Batch) -> Any:
        """What a role says about a batch."""
        if self.experience is not None:
            return self.experience.ask(role, batch)
        if role == "policy":
            return self.policy(batch)
        assert self.reference is not None, role
        return self.reference.scores(batch)

    @property
    def shares(self) -> int:
        """What a process's loss is multiplied by: DDP takes the mean over processes, and the sum is wanted."""
        return self.world if self.experience is None else 1

    def synchronised(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP adds gradients up in the last backward of a window; pieces are added up in each. Roles that take turns
        are not wrapped: a backward leaves the weights of the others without a gradient, which DDP would wait for."""
        if last or self.sharded or self.experience is not None:
            return nullcontext()
        quiet: AbstractContextManager[None] = self.accelerator.no_sync(self.policy)
        return quiet

    def sum_gradients(self) -> None:
        """What DDP would do, for roles that take turns. Collective."""
        if self.experience is None or self.world == 1:
            return
        for p in self.trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            torch.distributed.all_reduce(p.grad)

    def own_batches(self) -> Iterator[list[Row]]:
        """The rows of this process's forwards, in the first epoch or as far as the run goes."""
        for step in range(min(self.schedule.steps_per_epoch, self.total_steps)):
            for rows in map(self.rows_of, self.schedule.window(step, rank=self.rank, world=self.world)):
                if rows or self.sharded:
                    yield rows or [silent(self.units[0][0])]

    def emit(self, event: dict[str, Any]) -> None:
        """Only the first process speaks."""
        if self.accelerator.is_main_process:
            self.sink(event)

    def event(self, kind: str, step: int, **fields: Any) -> dict[str, Any]:
        return {"event": kind, "step": step, "epoch": round(step / self.schedule.steps_per_epoch, 4), **fields}

    def sum_over_processes(self, flat: Tensor) -> list[float]:
        if self.world == 1:
            return [float(x) for x in flat]
        where = flat.to(self.device)
        return [float(x) for x in self.accelerator.reduce(where, reduction="sum")]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in order of rank."""
        if self.world == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def synchronize(self) -> None:
        """Wait for the device before the clock is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def memory_gib(self) -> float:
        """Peak: resident set on CPU, tensors on CUDA; of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def memory_now_gib(self) -> float:
        """In use at this moment; of this process."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated() / 2**30
        return float(psutil.Process().memory_info().rss / 2**30)

    def merit(self, numbers: Mapping[str, float]) -> float | None:
        """What the best checkpoint is chosen by, higher is better: the metric where there is one, else what the
        method is judged by; the mean over the sets."""
        key, sign = (self.metric[0], 1) if self.metric is not None else self.method.judged_by
        values = [numbers[f"{s.prefix}{key}"] for s in self.eval_sets if f"{s.prefix}{key}" in numbers]
        if not values:
            return None
        return sum(values) / len(values) * sign

    def stopping(self) -> int | None:
        """The signal by which any process has been asked to end. Collective, so that all of them stop after the same
        step and for the same reason, those that it has not reached yet as well."""
        own = self.stop.number if self.stop.wanted else None
        heard = self.sum_over_processes(torch.tensor([float(number == own) for number in CAUGHT]))
        return next((number for number, count in zip(CAUGHT, heard, strict=True) if count), None)

    def save(self, progress: Any) -> Path:
        """Write a checkpoint and remove what is beyond the limit. Collective."""
        folder = self.plan.run / f"{PREFIX}{progress.step}"
        rngs, pending = self.gather(checkpoint.rng_state()), self.gather(progress.sums.own())
        first = self.accelerator.is_main_process
        weights = model_state(self.pieces, self.generator, keep=first) if self.sharded else None
        if first:
            checkpoint.begin(folder)
        apart = self.write_pieces(checkpoint.beside(folder)) if self.sharded else ()
        optimizer = self.pieces.optimizer_state(self.policy, self.optimizer, keep=first, skip=apart)
        if first:
            training = {"optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
            training |= {f"rng_{rank}": rng for rank, rng in enumerate(rngs)}
            scaler = self.accelerator.scaler
            training |= {"scaler": scaler.state_dict()} if scaler is not None else {}
            if self.reference is not None and self.reference.sync_steps is not None:
                training |= {"reference": self.reference.copies}
            if self.experience is not None:
                training |= {"critic": self.experience.state()}
            state = {"global_step": progress.step, "max_steps": self.total_steps, "progress": progress.to_json(pending)}
            state["per_device_train_batch_size"] = self.schedule.per_device_batch_size
            said = self.event("checkpoint", progress.step, path=folder.name)
            checkpoint.write(
                folder,
                model=self.generator,
                tokenizer=self.tokenizer,
                weights=weights,
                training=training,
                state=state,
                about=self.about,
                announce=lambda: self.emit(said),
            )
            if self.pusher is not None:
                self.pusher.saved(folder)
            best = progress.best[1] if progress.best is not None else None
            manifest.prune(self.plan.run, keep=self.recipe.save.save_total_limit, best=best, last=progress.step)
        self.accelerator.wait_for_everyone()
        return folder

    def write_pieces(self, folder: Path) -> Container[str]:
        """Each process writes what it holds of the optimiser's state; the names of what is written. Nothing, where the
        machines share no folder. Collective."""
        self.accelerator.wait_for_everyone()  # the first has made the folder
        pieces = self.pieces.own_pieces(self.optimizer)
        if not pieces or not all(self.gather(folder.is_dir())):
            return ()
        checkpoint.save_state(pieces, folder / f"optimizer_{self.rank}.pt")
        self.accelerator.wait_for_everyone()
        return pieces

    @property
    def about(self) -> dict[str, Any]:
        """What a manifest says of the run, for a later one to compare itself with."""
        return {
            "world_size": self.world,
            "plan_fingerprint": self.plan.fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "recipe": self.plan.effective,
        }
