"""Weights spread over the processes: what cannot be had with them, and when `auto` spreads them. No torch."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec

from finetune_cli.checks.rule import Found, Seen
from finetune_cli.plan.footprint import named
from finetune_cli.plan.memory import CONTEXT_GIB, LOST, estimate, setup
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.sections import Recipe

BY_ELEMENT = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
"""Optimisers that change each weight by its own numbers alone, so that a piece of a tensor is as good as the whole."""
UNDER_ZERO = ("adamw_torch", "adamw_torch_fused", "sgd")


def sharding(seen: Seen) -> Iterator[Found]:
    """Settings that weights in pieces cannot honour, with the reason."""
    recipe, resolved = seen.recipe, seen.plan.resolved
    if resolved.strategy == "ddp":
        return
    if resolved.strategy == "deepspeed-zero3":
        yield from of_zero(recipe)
    if recipe.quantization is not None:
        said = "quantised weights are packed with constants of the whole tensor, which pieces do not have"
        yield Found("quantization", said, "use launch.strategy: ddp, which holds them whole, or take quantization out")
    if recipe.method.online:
        said = f"{recipe.method.name} switches roles on one copy of the weights and draws answers between its steps"
        yield Found("launch.strategy", said, "use ddp")
    optimisers = BY_ELEMENT if resolved.strategy == "fsdp2" else UNDER_ZERO
    if recipe.train.optim not in optimisers:
        said = f"{recipe.train.optim} needs whole tensors, or kernels that do not know pieces"
        if recipe.train.optim in BY_ELEMENT:
            said = f"{recipe.train.optim} was not tried under DeepSpeed, which makes some optimisers anew"
        yield Found("train.optim", said, f"use one of {', '.join(optimisers)}")
    if recipe.train.per_device_train_batch_size == "auto":
        said = "the search for what fits tries sizes in each process by itself, and pieces are computed together"
        yield Found("train.per_device_train_batch_size", said, "give a number, or use launch.strategy: ddp")
    if resolved.precision == "fp16":
        said = "the scaler of fp16 was not tried with weights in pieces"
        yield Found("train.precision", said, "use bf16, or launch.strategy: ddp")
    if recipe.model.new_tokens or (recipe.lora is not None and recipe.lora.trainable_token_indices):
        key = "model.new_tokens" if recipe.model.new_tokens else "lora.trainable_token_indices"
        said = "rows of new tokens are trained beside their embedding, which was not tried in pieces"
        yield Found(key, said, "use launch.strategy: ddp")
    reference = resolved.reference
    if reference is not None and reference.sync_steps is not None:
        said = "a reference that follows the policy is saved whole, and lies in pieces"
        yield Found("method.sync_ref_model", said, "use launch.strategy: ddp")


def of_zero(recipe: Recipe) -> Iterator[Found]:
    """What DeepSpeed cannot honour, beside what no pieces can."""
    if find_spec("deepspeed") is None:
        remedy = 'pip install "finetune-recipes[deepspeed]", or use fsdp2'
        yield Found("launch.strategy", "DeepSpeed is not installed", remedy)
    if recipe.lora is not None and recipe.lora.modules_to_save:
        said = "modules that are trained whole beside adapters were not tried under DeepSpeed"
        yield Found("lora.modules_to_save", said, "use launch.strategy: fsdp2")
    if recipe.lora is not None and named(recipe.lora.target_modules, "lm_head"):
        said = "an adapted head is called once a chunk, and DeepSpeed wants as many calls from every process"
        yield Found("lora.target_modules", said, "use launch.strategy: fsdp2")


def by_memory(seen: Seen) -> Plan:
    """The plan with `launch.strategy: auto` settled: pieces, where GPUs are too small for the whole and pieces can be
    had; else whole weights, which cost less time. The origin says which numbers decided."""
    plan = seen.plan
    whole = setup(plan)
    gpus, several = plan.machine.gpus, plan.resolved.num_processes > 1
    if seen.recipe.launch.strategy != "auto" or whole is None or not gpus or not several:
        return plan
    room = min(gpu.memory_gib for gpu in gpus) * (1 - LOST) - CONTEXT_GIB
    needed = estimate(whole).gib
    fits = needed <= room
    strategy = "ddp" if fits else "fsdp2"
    resolved = plan.resolved.model_copy(update={"strategy": strategy})
    told = f"about {needed:.1f} GiB a process with whole weights, {room:.1f} GiB of a GPU can be used"
    spread = plan.model_copy(
        update={"resolved": resolved, "origins": {**plan.origins, "launch.strategy": f"auto: {told}"}}
    )
    if fits or not any(sharding(replace(seen, plan=spread))):
        return spread
    return plan


OF_ACCELERATE = {
    "ACCELERATE_USE_FSDP": ("FSDP", "launch.strategy: fsdp2"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "launch.strategy: deepspeed-zero3"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "launch.strategy: fsdp2"),
    "ACCELERATE_DYNAMO_BACKEND": ("torch.compile", "nothing in its place"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("gradient accumulation", "train.global_batch_size"),
}
"""What `accelerate launch --config_file` puts into the environment beside processes and machines, and the key here."""


def of_accelerate(_: Seen, environment: Mapping[str, str] = os.environ) -> Iterator[Found]:
    """What a configuration of accelerate asks for and the recipe decides; processes, machines and devices of it are
    honoured, and its precision is the recipe's."""
    for name, (what, ours) in OF_ACCELERATE.items():
        if environment.get(name, "").lower() not in ("", "0", "1" if "STEPS" in name else "", "false", "no"):
            said = f"accelerate's configuration asks for {what} ({name}), which would be used beside the recipe's own"
            yield Found("launch.strategy", said, f"take it out of that configuration and use {ours}")
