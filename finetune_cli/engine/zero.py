"""Weights spread over the processes by DeepSpeed's ZeRO-3 (arXiv 1910.02054): what `shard` does
with PyTorch's own.

A decoder layer is gathered as one, for its forward and again for its backward; what is outside the layers belongs to
the role. DeepSpeed wraps the optimiser that every other run has, sums gradients after each backward, clips, and steps.
Nothing is fetched early or kept for later: a layer that is still whole from the policy's forward would answer for a
reference that has been switched in.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from finetune_cli.engine import optim
from finetune_cli.engine.role import Backbone
from finetune_cli.engine.shard import decoder_layers
from finetune_cli.plan.memory import BUCKET
from finetune_cli.plan.resolve import Plan

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job


def settings(plan: Plan) -> dict[str, Any]:
    """DeepSpeed's configuration. Rows and windows are ours, so that it is told of none: every `step` is a boundary."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": plan.recipe.train.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
        },
    }


def spread(role: Backbone, plan: Plan, accelerator: Any) -> tuple[Any, Any]:
    """(DeepSpeed's engine around the role, the optimiser it steps, which each process lets see its own pieces)"""
    import deepspeed
    from deepspeed.utils import set_z3_leaf_modules

    if accelerator.device.type == "cpu":  # minutes of compiling, for an operation of its inference
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    layers = decoder_layers(role.stock)
    optimizer = optim.build(role, plan.recipe.train, plan.resolved.learning_rate)  # goes by shapes, which pieces hide
    # a layer's gradients are reduced when that of its input is there, which under adapters the first would not have
    role.stock.enable_input_require_grads()
    wrapped = accelerator.prepare_model(role, device_placement=False, evaluation_mode=True)
    for buffer in wrapped.buffers():
        buffer.data = buffer.data.to(accelerator.device)
    set_z3_leaf_modules(wrapped, list({type(layer) for layer in layers}))
    config = settings(plan)
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    deepspeed.zero.Init(module=wrapped, config_dict_or_path=config)  # else all of it would be put on the GPU first
    engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    for p in wrapped.parameters():
        if id(p) not in inside:
            deepspeed.zero.register_external_parameter(wrapped, p)
    return engine, optimizer


def step(job: "Job") -> tuple[float, bool]:
    engine: Any = job.policy
    engine.step()  # skips by itself where the norm is not finite
    return float(engine.get_global_grad_norm()), bool(engine.was_step_applied())


@contextmanager
def gathered(role: Any) -> Iterator[None]:
    import deepspeed

    hooks = role.optimizer.parameter_offload
    hooks.destroy()  # they would cut a layer up again after its forward
    try:
        with deepspeed.zero.GatheredParameters(list(role.parameters())):
            yield
    finally:
        hooks.setup_zero_stage3_hooks()


def whole(value: Tensor) -> Tensor:
    import deepspeed

    if not is_piece(value):
        return value.detach()
    with deepspeed.zero.GatheredParameters([value]):
        return value.detach().clone()


def is_piece(value: Tensor) -> bool:
    return hasattr(value, "ds_tensor")


def bounds(value: Any) -> tuple[int, int]:
    """(start, stop) of this process's piece in the flattened tensor; the last pieces may be short, or empty."""
    size = value.ds_tensor.numel()
    return min(dist.get_rank() * size, value.ds_numel), min((dist.get_rank() + 1) * size, value.ds_numel)


def own_piece(value: Any) -> Tensor:
    if not is_piece(value):
        return value.data  # type: ignore[no-any-return]
    start, stop = bounds(value)
    return value.ds_tensor.data[: stop - start]  # type: ignore[no-any-return]


def piece_of(full: Tensor, like: Any) -> Tensor:
    start, stop = bounds(like)
    return full.flatten()[start:stop].to(like.ds_tensor.device)


def numel(value: Any) -> int:
    return int(value.ds_numel) if is_piece(value) else value.numel()


@torch.no_grad()
def norms(values: Sequence[Tensor]) -> list[float]:
    if not values:
        return []
    squares = torch.stack([torch.linalg.vector_norm(own_piece(v), dtype=torch.float64) ** 2 for v in values])
    dist.all_reduce(squares)
    return squares.sqrt().tolist()


def flats(engine: Any) -> Iterator[tuple[Tensor, list[Any], int]]:
    """(what the optimiser knows of some weights: their pieces here, end to end; the weights; their group's number)"""
    zero = engine.optimizer
    for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
        yield flat, zero.fp16_groups[number], zero.sub_group_to_group_id[number]


def own_pieces(_: Any) -> dict[str, Tensor]:
    return {}


def optimizer_state(role: Any, optimizer: Any, *, keep: bool, skip: Container[str] = ()) -> Any:  # noqa: ARG001
    from deepspeed.utils import safe_get_full_optimizer_state

    state: dict[int, dict[str, Any]] = {}
    numbers: list[list[int]] = [[] for _ in optimizer.param_groups]
    for flat, weights, group in flats(role):
        for p in weights:
            numbers[group].append(len(state))
            mine = state[len(state)] = {}
            for key, value in optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value):  # a count of steps is one for all of them, and becomes each one's own
                    value = safe_get_full_optimizer_state(p, key) if value.dim() else value.clone()
                    value = value.cpu() if keep else None
                mine[key] = value
    groups = [{**group, "params": own} for group, own in zip(optimizer.param_groups, numbers, strict=True)]
    return {"state": {number: mine for number, mine in state.items() if mine}, "param_groups": groups}


def load_optimizer(
    role: Any, optimizer: Any, state: dict[str, Any], pieces: Sequence[Mapping[str, Tensor]] = ()
) -> None:
    from deepspeed.utils import safe_set_local_optimizer_state

    for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})
    number = 0
    for flat, weights, group in flats(role):
        for p in weights:
            for key, saved in state["state"].get(number, {}).items():
                value = saved if saved is not None else torch.cat([held[f"{number}.{key}"] for held in pieces])
                if not (torch.is_tensor(value) and value.dim()):
                    fused = optimizer.param_groups[group].get("fused") and torch.is_tensor(value)
                    optimizer.state[flat][key] = value.to(flat.device) if fused else value
                    continue
                optimizer.state[flat].setdefault(key, torch.zeros_like(flat))
                piece = torch.zeros_like(p.ds_tensor, dtype=flat.dtype)
                own = piece_of(value, p)
                piece[: own.numel()] = own
                safe_set_local_optimizer_state(p, piece, key)
            number += 1
