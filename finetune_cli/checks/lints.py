"""Rules on the recipe itself: what can be said before a file is opened. No torch."""

from collections.abc import Iterator
from difflib import get_close_matches

from finetune_cli.errors import Problem
from finetune_cli.plan.facts import Facts
from finetune_cli.recipe.load import Loaded

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

NOT_YET: dict[str, tuple[object, ...]] = {
    "save.push_to_hub": (False,),
    "launch.strategy": ("auto", "ddp"),
    "launch.num_machines": (1,),
}
"""Keys of the contract that this version does not act on yet, and the values it can honour."""


def lints(loaded: Loaded, facts: Facts) -> Iterator[Problem]:
    """Every problem of this stage, errors and warnings."""
    for rule in (not_yet, optimiser, learning_rate, adapters):
        yield from rule(loaded, facts)


def not_yet(loaded: Loaded, _: Facts) -> Iterator[Problem]:
    dump = loaded.recipe.model_dump()
    for key, honoured in NOT_YET.items():
        value = dump
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None  # type: ignore[assignment]
        if value not in honoured and value is not None:
            can = ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in honoured if v is not None)
            remedy = f"use {can}" if can else "remove it"
            yield loaded.problem(key, f"this version cannot do that yet; {remedy}", rule="FT101")


def optimiser(loaded: Loaded, _: Facts) -> Iterator[Problem]:
    name = loaded.recipe.train.optim
    if name in OPTIMISERS:
        return
    for prefix, reason in REFUSED_OPTIMISERS.items():
        if name.startswith(prefix):
            yield loaded.problem("train.optim", f"{name} is not supported: {reason}", rule="FT102")
            return
    close = get_close_matches(name, OPTIMISERS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(OPTIMISERS)}"
    yield loaded.problem("train.optim", f"unknown optimiser {name!r}; {hint}", rule="FT102")


def learning_rate(loaded: Loaded, facts: Facts) -> Iterator[Problem]:
    recipe = loaded.recipe
    rate, lora = recipe.train.learning_rate, recipe.lora is not None or facts.kind == "adapter"
    if rate == "auto":
        return
    rates = recipe.method.rates(lora=lora)
    if rates.low <= rate <= rates.high:
        return
    error = rate < rates.low / 10 or rate > rates.high * 10
    kind = "LoRA" if lora else "full"
    message = (
        f"{rate:g} is {'far ' if error else ''}outside what works for {recipe.method.name} with {kind} training; "
        f"use {rates.low:g} to {rates.high:g} (auto is {rates.default:g})"
    )
    yield loaded.problem("train.learning_rate", message, rule="FT016", severity="error" if error else "warning")


def adapters(loaded: Loaded, facts: Facts) -> Iterator[Problem]:
    recipe = loaded.recipe
    if recipe.quantization is not None and recipe.lora is None and facts.kind != "adapter":
        yield loaded.problem(
            "quantization",
            "needs lora: (quantised weights cannot be trained); add `lora: {}`",
            rule="FT104",
        )
    if recipe.quantization is not None and recipe.model.name_or_path.endswith(".gguf"):
        yield loaded.problem(
            "quantization", "a .gguf file is quantised already, and read to full width; remove this", rule="FT104"
        )
    if facts.kind == "adapter" and loaded.recipe.lora is not None:
        yield loaded.problem(
            "lora", "model.name_or_path is an adapter, which goes on with its own settings; remove lora:", rule="FT103"
        )
