"""Rules on the recipe itself: what can be said before a file is opened. No torch."""

import os
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from finetune_cli.checks.rule import Found, Seen, counted
from finetune_cli.methods.base import Shape
from finetune_cli.plan import launch

OPTIMISERS = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_8bit", "adamw_bnb_8bit",
    "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit", "paged_ademamix_32bit",
    "paged_ademamix_8bit", "lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "adamw_torch_4bit", "adamw_torch_8bit", "stable_adamw", "grokadamw",
)  # fmt: skip
REFUSED_OPTIMISERS = {
    "schedule_free": "it must be told when evaluation starts and ends, which this loop does not do",
    "galore": "it rewrites the parameter groups",
    "apollo": "it rewrites the parameter groups",
    "lomo": "it steps inside backward, so accumulation and clipping do not apply",
    "adalomo": "it steps inside backward, so accumulation and clipping do not apply",
    "adamw_anyprecision": "its package is no longer maintained",
    "adamw_torch_xla": "it needs a TPU",
    "adamw_torch_npu": "it needs an NPU",
}

TRACKERS = {
    "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "comet_ml": "comet_ml", "aim": "aim",
    "clearml": "clearml", "dvclive": "dvclive", "swanlab": "swanlab", "trackio": "trackio",
}  # fmt: skip
"""What accelerate can track, and the package that each needs."""

METRICS = ("exact_match", "json_match")
"""Those that have a name; others are functions of the user's."""
NO_EVAL_ROWS = ": there are neither data.eval_sets nor data.eval_split"
NAME_ROWS = "name rows in data.eval_sets, or hold some out with data.eval_split"

FEWEST_STEPS = 20


def machines(seen: Seen) -> Iterator[Found]:
    """Several machines that nobody has told their places."""
    at = launch.place(seen.recipe.launch)
    if launch.inside() or at.machines == 1:
        return
    if at.rank is None:
        said = f"is not given, and none of {', '.join(launch.RANKS)} says which machine this is"
        yield Found("launch.machine_rank", said, "give each machine its own: --set machine_rank=0, 1, ...")
    elif at.rank >= at.machines:
        said = f"is {at.rank}: {at.machines} machines are numbered from 0 to {at.machines - 1}"
        yield Found("launch.machine_rank", said, "number them from 0, or raise launch.num_machines")
    if at.address is None:
        said = "is not given, and MASTER_ADDR does not say where machine 0 is"
        yield Found("launch.main_process_ip", said, "give the address of machine 0")


def optimiser(seen: Seen) -> Iterator[Found]:
    name = seen.recipe.train.optim
    if name in OPTIMISERS:
        return
    for prefix, reason in REFUSED_OPTIMISERS.items():
        if name.startswith(prefix):
            yield Found("train.optim", f"{name} is not supported: {reason}", "use adamw_torch_fused")
            return
    close = get_close_matches(name, OPTIMISERS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(OPTIMISERS)}"
    yield Found("train.optim", f"unknown optimiser {name!r}", hint)


def trackers(seen: Seen) -> Iterator[Found]:
    """Names that no tracker has, packages that are not there, and a login that would be asked for."""
    for name in seen.recipe.logging.report_to:
        if name == "none":
            continue
        if name not in TRACKERS:
            close = get_close_matches(name, TRACKERS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: none, {', '.join(sorted(TRACKERS))}"
            yield Found("logging.report_to", f"unknown tracker {name!r}", hint)
        elif find_spec(TRACKERS[name]) is None:
            yield Found("logging.report_to", f"{name} is not installed", f"pip install {name}, or take it out")
        elif name == "wandb" and not wandb_can_start():
            remedy = "set WANDB_API_KEY, run `wandb login`, or set WANDB_MODE=offline"
            yield Found("logging.report_to", "wandb would ask who you are", remedy)


def wandb_can_start() -> bool:
    """Offline, or with a key in the environment or where `wandb login` puts it."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    return netrc.is_file() and host in netrc.read_text(encoding="utf-8", errors="replace")


def learning_rate(seen: Seen) -> Iterator[Found]:
    rate, method = seen.recipe.train.learning_rate, seen.recipe.method
    if rate == "auto":
        return
    rates = method.rates(lora=seen.adapted)
    if rates.low <= rate <= rates.high:
        return
    error = rate < rates.low / 10 or rate > rates.high * 10
    kind = "LoRA" if seen.adapted else "full"
    yield Found(
        "train.learning_rate",
        f"{rate:g} is {'far ' if error else ''}outside what works for {method.name} with {kind} training",
        f"use {rates.low:g} to {rates.high:g} (auto is {rates.default:g})",
        "error" if error else "warning",
    )


def precision(seen: Seen) -> Iterator[Found]:
    """Where the recipe asks for numbers that this machine has not."""
    asked, machine = seen.recipe.train.precision, seen.plan.machine
    if asked == "fp16" and not machine.gpus:
        yield Found("train.precision", "fp16 needs a GPU, and this machine has none", "use auto, bf16 or fp32")
    if asked == "bf16" and machine.gpus and not machine.bf16:
        gpu = next(gpu for gpu in machine.gpus if gpu.compute_capability < 8)
        yield Found("train.precision", f"the {gpu.name} does not multiply bfloat16", "use auto or fp16")


def kernels(seen: Seen) -> Iterator[Found]:
    """An attention that this machine, or the precision, does not have."""
    asked, resolved = seen.recipe.model.attn_implementation, seen.plan.resolved
    if asked not in ("varlen", "flash_attention_2"):
        return
    remedy = "use auto or sdpa"
    if seen.plan.machine.device != "cuda":
        yield Found("model.attn_implementation", f"{asked} needs an NVIDIA GPU, and this machine has none", remedy)
    elif not seen.plan.machine.bf16:
        gpu = next(gpu for gpu in seen.plan.machine.gpus if gpu.compute_capability < 8)
        yield Found("model.attn_implementation", f"{asked} needs a newer GPU than the {gpu.name}", remedy)
    elif resolved.precision == "fp32":
        yield Found("model.attn_implementation", f"{asked} has no float32, which train.precision is", remedy)
    elif asked == "flash_attention_2" and find_spec("flash_attn") is None:
        yield Found("model.attn_implementation", "flash-attn is not installed", f"pip install flash-attn, or {remedy}")


def run_length(seen: Seen) -> Iterator[Found]:
    """Where the recipe itself says how many steps there are."""
    if seen.recipe.train.max_steps is not None:
        yield from in_steps(seen, seen.recipe.train.max_steps, "train.max_steps")


def in_steps(seen: Seen, total: int, key: str) -> Iterator[Found]:
    """What does not fit into a run of `total` optimiser steps."""
    train, run = seen.recipe.train, counted(total, "step")
    if train.warmup_steps is not None and train.warmup_steps >= total:
        said = f"the learning rate rises for {train.warmup_steps} of {run}: it never gets where it is meant to"
        yield Found("train.warmup_steps", said, f"use {max(1, total // 10)} or less, or warmup_ratio")
    if train.warmup_steps is None and train.warmup_ratio >= 1:
        said = f"the learning rate rises for all of {run}: it never gets where it is meant to"
        yield Found("train.warmup_ratio", said, "use 0.1 or so")
    for name, steps in (("save.save_steps", seen.recipe.save.save_steps), ("eval.eval_steps", every_eval(seen))):
        if steps is not None and steps >= 1 and steps > total:
            said = f"{steps:g} is past the end of the run of {run}: it happens at the end alone"
            yield Found(name, said, "use a smaller number; below 1 it is a share of the run")
    if total < FEWEST_STEPS:
        batch = seen.plan.resolved.global_batch_size
        said = f"the run has {counted(total, 'optimiser step')} of {batch} rows: hardly enough to learn from"
        yield Found(key, said, "more epochs, more rows or a smaller global_batch_size make more of them")


def every_eval(seen: Seen) -> float | None:
    data, setting = seen.recipe.data, seen.recipe.eval
    happens = setting.eval_strategy == "steps" and (data.eval_sets or data.eval_split)
    return setting.eval_steps if happens else None


def adapters(seen: Seen) -> Iterator[Found]:
    if seen.facts.kind == "adapter" and seen.recipe.lora is not None:
        yield Found("lora", "model.name_or_path is an adapter, which goes on with its own settings")
    if seen.recipe.model.starting_adapter == "merge" and seen.facts.kind != "merged":
        yield Found(
            "model.starting_adapter", "model.name_or_path is no adapter: there is nothing to merge", "remove it"
        )


INITS = ("gaussian", "pissa", "olora", "orthogonal")
"""Values of `lora.init_lora_weights` beside true and false whose adapter means the same when it is loaded again."""
OTHER_INITS = {
    "pissa_niter": "it draws at random, and again when the adapter is loaded, on other weights then",
    "eva": "it needs the activations of rows before training",
    "corda": "it needs the activations of rows before training",
    "lora_ga": "it needs gradients before training",
    "loftq": "it needs a configuration of its own",
    "mica": "it was not tried here",
}


def initial_adapters(seen: Seen) -> Iterator[Found]:
    lora = seen.recipe.lora
    if lora is None or isinstance(lora.init_lora_weights, bool):
        return
    name = lora.init_lora_weights
    if name not in INITS:
        reason = next((why for other, why in OTHER_INITS.items() if name.startswith(other)), "there is no such one")
        yield Found("lora.init_lora_weights", f"{name}: {reason}", f"use true, {', '.join(INITS)}")
    elif seen.recipe.quantization is not None and name in ("pissa", "olora"):
        yield Found("lora.init_lora_weights", f"{name} changes the base, which is quantised", "use true")


def quantised(seen: Seen) -> Iterator[Found]:
    """Weights in 4 or 8 bits cannot be trained themselves."""
    if seen.recipe.quantization is None:
        return
    if not seen.adapted:
        yield Found("quantization", "needs lora: (quantised weights cannot be trained)", "add `lora: {}`")
    if seen.recipe.model.name_or_path.endswith(".gguf"):
        yield Found("quantization", "a .gguf file is quantised already, and read to full width", "remove this")


def method_misfits(seen: Seen) -> Iterator[Found]:
    """Settings of the method that do not fit how a step is made, and metrics of what gives no answers."""
    resolved, recipe = seen.plan.resolved, seen.recipe
    forwards = resolved.gradient_accumulation_steps * resolved.num_processes
    rows = recipe.train.per_device_train_batch_size
    shape = Shape(adapters=seen.adapted, forwards=forwards, rows=1 if rows == "auto" else rows)
    for key, evidence, severity in recipe.method.misfits(shape):
        yield Found(key, evidence, severity="error" if severity == "error" else "warning")
    if recipe.method.online:
        yield from own_answers(seen)
    if recipe.eval.metric is not None:
        yield from metric(seen, recipe.eval.metric)
    if recipe.save.load_best_model_at_end is True and not (recipe.data.eval_sets or recipe.data.eval_split):
        yield Found("save.load_best_model_at_end", f"which is the best is not known{NO_EVAL_ROWS}", NAME_ROWS)


def metric(seen: Seen, name: str) -> Iterator[Found]:
    """One that is none, of a model that gives no answers, or on no rows."""
    recipe = seen.recipe
    file, _, function = name.rpartition(":")
    if not recipe.method.generates:
        yield Found("eval.metric", f"{recipe.method.name} trains no model that answers", "take it out", "error")
    elif name not in METRICS and not (file.endswith(".py") and function):
        known = " or ".join(METRICS)
        yield Found("eval.metric", f"{Path(name).name!r} is no metric", f"use {known}, or file.py:function", "error")
    elif not (recipe.data.eval_sets or recipe.data.eval_split):
        yield Found("eval.metric", f"is never computed{NO_EVAL_ROWS}", NAME_ROWS)


def own_answers(seen: Seen) -> Iterator[Found]:
    """Settings under which a method cannot learn from answers that it draws itself."""
    drawn, method = seen.recipe.generation, seen.recipe.method
    if drawn.temperature == 0:
        said = "greedy answers are always the same: nothing is tried, so nothing is learned"
        yield Found("generation.temperature", said, "use 0.7 to 1", "error")
    if drawn.top_p < 1:
        said = f"answers drawn from {drawn.top_p:g} of the probability are not the policy's own"
        yield Found("generation.top_p", said, "use 1", "error")
    if method.steps_in_all(1) is not None and seen.recipe.train.max_steps is not None:
        yield Found("method.total_episodes", "train.max_steps says how long the run is too", "keep one", "error")
    batch = seen.plan.resolved.global_batch_size
    if method.parts > batch:
        said = f"the {batch} prompts of a step cannot be split into {method.parts} updates"
        yield Found("method.num_mini_batches", said, "raise train.global_batch_size", "error")


def output_dir(seen: Seen) -> Iterator[Found]:
    """Results over what they were made from."""
    run = os.path.realpath(seen.plan.output_dir)
    for key, path in sources_of(seen):
        if os.path.isdir(path) and os.path.realpath(path) == run:
            yield Found("output_dir", f"this is the folder of {key}, whose files the result would overwrite")


def sources_of(seen: Seen) -> Iterator[tuple[str, str]]:
    """(key, folder) of what the run reads."""
    reference = seen.plan.resolved.reference
    yield "model.name_or_path", seen.recipe.model.name_or_path
    yield "the adapter's base model", seen.facts.base or ""
    yield "method.ref_model", (reference.model if reference else None) or ""
    yield from (("data.train", source.path) for source in seen.recipe.data.train)
