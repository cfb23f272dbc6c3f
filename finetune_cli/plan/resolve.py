"""The plan: the recipe unchanged, every `auto` made concrete, and the origin of each value."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from finetune_cli import __version__
from finetune_cli.methods.base import Reference, Start
from finetune_cli.plan.changes import effective, fingerprint, leaves
from finetune_cli.plan.facts import Facts
from finetune_cli.plan.footprint import Estimate
from finetune_cli.plan.machine import Machine
from finetune_cli.recipe.sections import Recipe
from finetune_cli.spec import Spec

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
CHECKPOINTING_FROM = 1_000_000_000
"""Weights from which a GPU run recomputes activations by default."""


class Resolved(Spec):
    """What `auto` and the absent became."""

    learning_rate: float
    precision: Literal["bf16", "fp16", "fp32"]
    dtype: Literal["float32", "bfloat16", "float16"]
    attn_implementation: Literal["flash_attention_2", "varlen", "sdpa", "eager"]
    gradient_checkpointing: bool
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"]
    num_processes: int
    """On all machines together."""
    strategy: Literal["ddp", "fsdp2", "deepspeed-zero3"]
    gradient_accumulation_steps: int
    global_batch_size: int
    per_device_eval_batch_size: int
    load_best_model_at_end: bool
    reference: Reference | None = None
    """The frozen model that the policy is compared with; None for methods without one."""


class Plan(Spec):
    """Everything a worker needs; `plan.json` in the run folder."""

    recipe: Recipe
    resolved: Resolved
    origins: dict[str, str]
    """Dotted key -> recipe | default | auto: reason."""
    machine: Machine
    facts: Facts
    output_dir: str
    """Absolute."""
    recipe_path: str
    overrides: list[str] = []
    """The `--set` options that the recipe was started with."""
    versions: dict[str, str]
    fingerprint: str
    """Of everything in the recipe that changes the numbers of the run; the rows have a fingerprint of their own."""
    repository: dict[str, Any] | None = None
    """Where the run is uploaded to (id, url, private), once the hub has said yes."""
    memory: Estimate | None = None
    """Of one process whose forwards are as long as `data.max_length` allows; None where the model's configuration is
    not on this machine."""

    @property
    def effective(self) -> dict[str, Any]:
        """Dotted key -> the value that the run uses."""
        return effective(self.recipe.model_dump(), self.resolved.model_dump())

    @property
    def run(self) -> Path:
        return Path(self.output_dir)


def resolve(
    recipe: Recipe,
    written: Mapping[str, Any],
    machine: Machine,
    facts: Facts,
    *,
    recipe_path: Path,
    world: int | None,
    overrides: Sequence[str] = (),
) -> Plan:
    """`written` is the data of the recipe as it was written, to tell recipe from default. `world` is the number of
    processes that a launcher has already started, None where we start them."""
    values, reasons = _autos(recipe, machine, facts, world)
    resolved = Resolved(**values)
    versions = {"finetune-recipes": __version__, **{p: v for p in PACKAGES if (v := _version(p))}}
    return Plan(
        recipe=recipe,
        resolved=resolved,
        origins=_origins(recipe, written, reasons),
        machine=machine,
        facts=facts,
        output_dir=str(Path(recipe.output_dir).expanduser().absolute()),
        recipe_path=str(recipe_path),
        overrides=list(overrides),
        versions=versions,
        fingerprint=fingerprint(effective(recipe.model_dump(), resolved.model_dump())),
    )


def _autos(recipe: Recipe, machine: Machine, facts: Facts, world: int | None) -> tuple[dict[str, Any], dict[str, str]]:
    """(value, reason of those that are not simply the recipe's own) by leaf name."""
    reasons: dict[str, str] = {}

    def auto(key: str, written: Any, value: Any, reason: str) -> Any:
        if written not in ("auto", None):
            return written
        reasons[key] = reason
        return value

    train, launch = recipe.train, recipe.launch
    lora = recipe.lora is not None or facts.kind == "adapter"
    kind = "LoRA" if lora else "full"
    rates = recipe.method.rates(lora=lora)
    processes = max(1, len(machine.gpus))
    each = f"{processes} GPUs" if machine.gpus else "no GPU"
    if world is not None:
        num_processes = world
        reasons["launch.num_processes"] = "the launcher started them"
    else:
        num_processes = auto("launch.num_processes", launch.num_processes, processes, each) * launch.num_machines
    precision = auto("train.precision", train.precision, *_precision(machine))
    frozen = f"train.precision is {precision}"
    big = machine.device == "cuda" and (facts.parameters or CHECKPOINTING_FROM) >= CHECKPOINTING_FROM
    evaluated = bool(recipe.data.eval_sets) or recipe.data.eval_split > 0
    accumulation, batch = _batch(recipe, num_processes, reasons)
    values = {
        "learning_rate": auto(
            "train.learning_rate", train.learning_rate, rates.default, f"{recipe.method.name} with {kind} training"
        ),
        "precision": precision,
        "dtype": auto("model.dtype", recipe.model.dtype, DTYPES[precision], frozen),
        "attn_implementation": auto(
            "model.attn_implementation", recipe.model.attn_implementation, *_attention(machine, precision)
        ),
        "gradient_checkpointing": auto(
            "train.gradient_checkpointing",
            train.gradient_checkpointing,
            big,
            "a large model on a GPU" if big else "memory is not the bound: a small model, or no GPU",
        ),
        "bnb_4bit_compute_dtype": auto(
            "quantization.bnb_4bit_compute_dtype",
            recipe.quantization.bnb_4bit_compute_dtype if recipe.quantization else "auto",
            DTYPES[precision],
            frozen,
        ),
        "num_processes": num_processes,
        "strategy": auto("launch.strategy", launch.strategy, "ddp", "every process holds the whole model"),
        "gradient_accumulation_steps": accumulation,
        "global_batch_size": batch,
        "per_device_eval_batch_size": auto(
            "eval.per_device_eval_batch_size",
            recipe.eval.per_device_eval_batch_size,
            1 if train.per_device_train_batch_size == "auto" else train.per_device_train_batch_size,
            "one by one" if train.per_device_train_batch_size == "auto" else "the training batch size",
        ),
        "load_best_model_at_end": auto(
            "save.load_best_model_at_end",
            recipe.save.load_best_model_at_end,
            evaluated and recipe.eval.eval_strategy != "no",
            "there are rows to evaluate on" if evaluated else "there are no rows to evaluate on",
        ),
        "reference": recipe.method.reference(start_of(recipe, facts)),
    }
    return values, reasons


NEUTRAL = (True, "gaussian")
"""Values of `lora.init_lora_weights` under which a fresh adapter changes nothing: B is zero, the weights stay."""


def start_of(recipe: Recipe, facts: Facts) -> Start:
    """What the policy is before its first step."""
    lora, train = recipe.lora, recipe.train
    neutral = lora is not None and lora.init_lora_weights in NEUTRAL and not lora.use_dora
    passes = train.num_train_epochs if train.max_steps is None else None
    if facts.kind == "adapter":
        return Start(trains="adapter", neutral=False, base=facts.base, passes=passes)
    base = recipe.model.name_or_path if neutral else None
    return Start(trains="fresh adapter" if lora else "all weights", neutral=neutral, base=base, passes=passes)


def _precision(machine: Machine) -> tuple[str, str]:
    where = machine.gpus[0].name if machine.gpus else "this CPU"
    if machine.bf16:
        return "bf16", f"{where} multiplies bfloat16"
    return ("fp16", f"{where} has no bfloat16") if machine.gpus else ("fp32", f"{where} has no bfloat16")


def _attention(machine: Machine, precision: str) -> tuple[str, str]:
    if machine.device == "cpu" or precision == "fp32":
        return "sdpa", "PyTorch's kernel, segment by segment"
    if not machine.bf16:
        return "sdpa", f"FlashAttention needs a newer GPU than the {machine.gpus[0].name}"
    if find_spec("flash_attn") is not None:
        return "flash_attention_2", "the flash-attn package is installed"
    return "varlen", "PyTorch's variable-length kernel"


def _batch(recipe: Recipe, processes: int, reasons: dict[str, str]) -> tuple[int, int]:
    """(accumulation steps, global batch size). A step's last forward may be smaller; the sums do not mind."""
    train = recipe.train
    if train.per_device_train_batch_size == "auto":
        assert train.global_batch_size != "auto"  # the section refuses it
        reasons["train.gradient_accumulation_steps"] = "one row at a time, or fewer forwards of as many as fit"
        return -(-train.global_batch_size // processes), train.global_batch_size
    together = train.per_device_train_batch_size * processes
    if train.global_batch_size != "auto":
        accumulation = -(-train.global_batch_size // together)
        reasons["train.gradient_accumulation_steps"] = f"{train.global_batch_size} rows / ({together} at once)"
        return accumulation, train.global_batch_size
    accumulation = train.gradient_accumulation_steps or 1
    reasons["train.global_batch_size"] = (
        f"{train.per_device_train_batch_size} rows x {accumulation} accumulated x {processes} processes"
    )
    return accumulation, together * accumulation


def _origins(recipe: Recipe, written: Mapping[str, Any], reasons: Mapping[str, str]) -> dict[str, str]:
    """An origin for every leaf of the recipe."""
    named = dict(leaves(recipe.model_dump()))
    in_recipe = dict(leaves(written))
    origins = {key: "recipe" if _is_written(key, in_recipe) else "default" for key in named}
    return origins | {key: f"auto: {reason}" for key, reason in reasons.items()}


def _is_written(key: str, in_recipe: Mapping[str, Any]) -> bool:
    return any(k == key or k.startswith(key + ".") or key.startswith(k + ".") for k in in_recipe)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
