"""From a plan to a job: tokens first, then processes, then weights."""

import ctypes
import os
import random
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_cli.data.batches import Schedule, pack
from finetune_cli.data.chat import Chat
from finetune_cli.data.rows import RowSets
from finetune_cli.engine import (
    checkpoint,
    experience,
    fit,
    layout,
    manifest,
    memory,
    metrics,
    models,
    optim,
    pieces,
    reference,
)
from finetune_cli.engine.actor import Actor
from finetune_cli.engine.events import Sink
from finetune_cli.engine.job import EvalSet, Job
from finetune_cli.engine.loop import Progress, total_steps
from finetune_cli.engine.lora import sizes
from finetune_cli.engine.pieces import Pieces
from finetune_cli.engine.role import Backbone, role_of
from finetune_cli.engine.signals import Stop
from finetune_cli.errors import MachineError, ModelError, RecipeError
from finetune_cli.log import LOGGER
from finetune_cli.plan import launch
from finetune_cli.plan.changes import BEST, Change, compare
from finetune_cli.plan.facts import Facts
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.sections import Recipe
from finetune_cli.types import Row


@dataclass(frozen=True)
class Words:
    """A model's tokenizer with its chat template, before any weight is read."""

    location: models.Location
    tokenizer: Any
    stops: list[int]
    """Ids that end a turn at inference: the tokenizer's and those of the generation configuration."""
    chat: Chat


def bind(recipe: Recipe, facts: Facts) -> Words:
    """The tokenizer that a recipe's rows are rendered and encoded with."""
    location = models.locate(recipe.model, base_of_adapter=facts.base)
    tokenizer = models.load_tokenizer(recipe.model, location)
    stops = models.declared_stops(location, tokenizer)
    chat = Chat.bind(tokenizer, stop_ids=stops, template_mismatch=recipe.data.template_mismatch)
    return Words(location, tokenizer, stops, chat)


def accelerator(plan: Plan) -> Any:
    """Started under a launcher it joins the others; alone it is one process."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    if plan.machine.device == "cpu":
        keep_freed_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for others, and says so among our results
    precision = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}[plan.resolved.precision]
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(mixed_precision=precision, cpu=plan.machine.device == "cpu", kwargs_handlers=[patient])


PATIENCE = timedelta(hours=6)
"""That a process waits in a collective: while the first saves tens of gigabytes, or uploads them. NCCL's own 10 minutes
end runs; a process that is gone is found by the launchers (`contact.py`)."""


def meet(plan: Plan, resume: Path | None) -> None:
    """Wait for the other processes. Raises MachineError where they would go on from another checkpoint: machines that
    share no folder."""
    from accelerate.utils import gather_object

    if launch.world() == 1:
        return
    accelerator(plan)
    names = gather_object([resume.name if resume is not None else "no checkpoint"])
    if len(set(names)) > 1:
        raise MachineError(
            f"the processes would go on from different places: {', '.join(names)}",
            "Put output_dir where every machine sees it, or copy the newest checkpoint to each.",
        )


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensor. By its own choice it gives large pieces back to the system,
    and every step pays again for having each page of them mapped and cleared. Other systems are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)


def seed_everything(seed: int, rank: int) -> None:
    """Every process draws its own dropout; weights are drawn under the recipe's seed alone."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def build(
    plan: Plan, words: Words, sets: RowSets, sink: Sink, *, resume: Path | None, stop: Stop | None = None
) -> tuple[Job, Progress]:
    """Weights, optimiser and schedule; from `resume` where a run goes on."""
    recipe, acc = plan.recipe, accelerator(plan)
    location = words.location if resume is None else resumed(words.location, resume, recipe.lora is not None)
    torch.manual_seed(recipe.seed)
    model = models.load_policy(plan, location)
    check_vocabulary(model, words.tokenizer)
    if recipe.method.labels() is not None:
        models.settle_pad(model, words.tokenizer, sets.train.rows)
    role = role_for(plan, location, model)
    padded_because = layout.choose(role.stock, recipe.model)
    trained, every = sizes(role)
    laid = pieces.of(plan, acc.num_processes)
    policy, optimizer = distributed(role, plan, acc, laid)
    rows = sets.train
    units = make_units(rows.rows, recipe, padded_because)
    schedule = schedule_of(plan, units)
    asked = recipe.method.steps_in_all(plan.resolved.global_batch_size)
    total = asked or total_steps(schedule.steps_per_epoch, recipe.train.num_train_epochs, recipe.train.max_steps)
    job = Job(
        plan=plan,
        accelerator=acc,
        tokenizer=words.tokenizer,
        policy=policy,
        pieces=laid,
        optimizer=optimizer,
        scheduler=optim.schedule(optimizer, recipe.train, total),
        data=rows,
        units=units,
        eval_sets=[
            EvalSet(name, encoded.rows, prompts[: recipe.eval.metric_rows])
            for name, (encoded, prompts) in sets.evals.items()
        ],
        sample_prompts=sample_prompts(sets, recipe.eval.sample_prompts),
        stop_ids=words.stops,
        schedule=schedule,
        total_steps=total,
        metric=metrics.find(recipe.eval.metric) if recipe.eval.metric is not None else None,
        sink=sink,
        padded_because=padded_because,
        trained=[p for _, p in optim.named_trained(policy)],
        stop=stop or Stop(),
        data_fingerprint=checkpoint.rows_sha256(rows.rows),
    )
    reference.attach(job, words.location, resumed=resume is not None)
    if isinstance(role, Actor):
        experience.attach(job, role, words.chat, sets.raws)
    seed_everything(recipe.seed, job.rank)
    job.emit({"event": "start", "total": total, "trained": trained, "weights": every, "device": str(acc.device)})
    job.emit({"event": "layout", "padded_because": padded_because, **fill_of(units, recipe)})
    memory.check_disk(job)
    fit.settle(job, None if resume is None else checkpoint.state(resume)["per_device_train_batch_size"])
    return job, Progress() if resume is None else restore(job, resume)


def distributed(role: Backbone, plan: Plan, acc: Any, laid: Pieces) -> tuple[Any, Any]:
    """(the role as all processes compute it, the optimiser of what is trained)"""
    if plan.resolved.strategy != "ddp" and acc.num_processes > 1:
        return laid.spread(role, plan, acc)
    if plan.resolved.strategy != "ddp":
        said = "launch.strategy: %s has nothing to do in one process, which holds everything"
        LOGGER.warning(said, plan.resolved.strategy)
    optimizer = optim.build(role, plan.recipe.train, plan.resolved.learning_rate)
    prepared: tuple[Any, Any] = acc.prepare(role, optimizer)
    return prepared


def role_for(plan: Plan, location: models.Location, model: Any) -> Backbone:
    """The module that the method asks; one that learns from its own answers has a critic with it."""
    recipe = plan.recipe
    if not recipe.method.online:
        return role_of(model, recipe.method)
    critic = None if hasattr(model, "peft_config") else models.load_policy(plan, location)
    if critic is not None:
        layout.choose(critic, recipe.model)
    return Actor(model, critic=critic, temperature=recipe.generation.temperature)


def schedule_of(plan: Plan, units: list[list[Row]]) -> Schedule:
    """Which units each step takes."""
    size = plan.recipe.train.per_device_train_batch_size
    return Schedule(
        lengths=[sum(row.length for row in unit) for unit in units],
        global_batch_size=plan.resolved.global_batch_size,
        per_device_batch_size=1 if size == "auto" else size,
        seed=plan.recipe.seed,
        shuffle=plan.recipe.data.shuffle,
    )


def make_units(rows: list[Row], recipe: Recipe, padded_because: str | None) -> list[list[Row]]:
    """Rows, or bins of them. Raises ModelError where bins are asked for and the model cannot keep rows apart."""
    capacity = recipe.method.bin_tokens(recipe.data.max_length)
    if capacity is None:
        return [[row] for row in rows]
    if padded_because is not None:
        raise ModelError(f"rows cannot be packed: {padded_because}", "Set method.packing: false.")
    return [[rows[i] for i in some] for some in pack([row.length for row in rows], capacity, seed=recipe.seed)]


def fill_of(units: list[list[Row]], recipe: Recipe) -> dict[str, Any]:
    """How full the bins are."""
    capacity = recipe.method.bin_tokens(recipe.data.max_length)
    if capacity is None:
        return {}
    return {"bins": len(units), "fill": sum(row.length for unit in units for row in unit) / (capacity * len(units))}


def resumed(location: models.Location, folder: Path, adapted: bool) -> models.Location:
    """Where the weights of a checkpoint are: its adapter on the same base, or itself."""
    if adapted or location.adapter is not None:
        return replace(location, adapter=str(folder))
    return models.Location(str(folder), {"trust_remote_code": location.kwargs.get("trust_remote_code", False)})


def compare_rows(rows: list[Row], folder: Path, *, anyway: bool) -> None:
    """Raises RecipeError where the rows are others than the checkpoint's, unless the run is to go on `anyway`."""
    if manifest.read(folder)["data_fingerprint"] == checkpoint.rows_sha256(rows):
        return
    if not anyway:
        raise RecipeError(
            f"the rows are not those that {folder.name} was trained on",
            "A file, a template, the tokenizer or a setting of data: changed. Put it back, start anew with "
            "--overwrite, "
            "or use --resume-anyway: the run then goes on at the same step number with the new rows.",
        )
    LOGGER.warning("the rows are not those of %s: the run goes on at its step with the new rows", folder.name)


def restore(job: Job, folder: Path) -> Progress:
    """Optimiser, schedule, generators and place of a checkpoint; what of it the recipe has changed is the recipe's."""
    own = f"rng_{job.rank}"
    training = checkpoint.load_training(folder, ["optimizer", "scheduler", own, "scaler", "reference", "critic"])
    state, about = checkpoint.state(folder), manifest.read(folder)
    changed = [c for c in compare(about["recipe"], job.plan.effective) if c.kind in ("length", "training")]
    seat(job, training, checkpoint.load_pieces(folder), changed, stretched=state["max_steps"] != job.total_steps)
    if "scaler" in training and job.accelerator.scaler is not None:
        job.accelerator.scaler.load_state_dict(training["scaler"])
    if job.reference is not None and "reference" in training:
        job.reference.copies[:] = [copy.to(job.device) for copy in training["reference"]]
    if job.experience is not None:
        job.experience.load(training["critic"])
    if own in training and about["world_size"] == job.world:
        checkpoint.set_rng_state(training[own])
    progress = Progress.from_json(state["progress"], rank=job.rank)
    if progress.step > job.total_steps:
        raise RecipeError(
            f"{folder.name} is past the end of this run, which has {job.total_steps} steps",
            "Ask for more steps or epochs, or start anew with --overwrite.",
        )
    if any(c.key.startswith(BEST) for c in compare(about["recipe"], job.plan.effective)):
        LOGGER.warning("evaluations are not what they were: the best is looked for from here on")
        progress.best = None
    return without_lost_best(job, progress)


def seat(
    job: Job, training: dict[str, Any], pieces: list[dict[str, Any]], changed: list[Change], *, stretched: bool
) -> None:
    """Optimiser and schedule as they were saved; under a changed recipe with its own settings, at the same step."""
    fresh = [{k: v for k, v in group.items() if k != "params"} for group in job.optimizer.param_groups]
    if not any(c.key == "train.optim" for c in changed):
        job.pieces.load_optimizer(job.policy, job.optimizer, training["optimizer"], pieces)
    if not (changed or stretched):
        job.scheduler.load_state_dict(training["scheduler"])
        return
    for group, own in zip(job.optimizer.param_groups, fresh, strict=True):
        group.update(own)
    place = training["scheduler"]["last_epoch"]
    before = training["scheduler"]["_last_lr"][0]
    optim.move(job.scheduler, place)
    LOGGER.warning(
        "the %s schedule is now that of %d steps: the learning rate of step %d is %.3g, it would have been %.3g",
        job.recipe.train.lr_scheduler_type, job.total_steps, place + 1, job.scheduler.get_last_lr()[0], before,
    )  # fmt: skip


def without_lost_best(job: Job, progress: Progress) -> Progress:
    """Where the folder of the best checkpoint is gone, what follows is compared anew."""
    if job.plan.resolved.load_best_model_at_end and progress.best is not None:
        folder = job.plan.run / f"{manifest.PREFIX}{progress.best[1]}"
        if not folder.exists():
            LOGGER.warning("%s, the best so far, is gone: the best is looked for from here on", folder.name)
            progress.best = None
    return progress


def sample_prompts(sets: RowSets, number: int) -> list[Any]:
    """From the evaluation sets where there are any, else from the training rows."""
    pools = [prompts for _, prompts in sets.evals.values()] or [sets.train_prompts]
    return [prompt for pool in pools for prompt in pool][:number]


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raises ModelError where the tokenizer has ids that the embedding has no row for."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, the model's embedding has {rows} rows",
            "Use the tokenizer that belongs to the model, or name its further tokens in model.new_tokens.",
        )
