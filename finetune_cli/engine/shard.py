"""Weights spread over the processes (PyTorch's `fully_shard`, FSDP2), a decoder layer at a time.

A process keeps its piece of every weight, gradient and optimiser state. A layer is gathered for its own forward and
again for its backward; what is outside the layers (embedding, last norm, head) for those of the whole role, because the
head is read inside the role's forward and not in its own. Gradients are summed in float32, after every backward: what
would be saved by waiting for the last of a window is the memory of all gradients.

Precision is that of one process: autocast over float32 weights that are trained, frozen ones as they were loaded. So
the same numbers come of both, to rounding.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune_cli.engine import optim
from finetune_cli.engine.role import Backbone
from finetune_cli.errors import ModelError
from finetune_cli.plan.resolve import Plan

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job


def decoder_layers(stock: Any) -> list[nn.Module]:
    """The modules that transformers says are to be kept in one piece. Raises ModelError where it names none."""
    names = set(stock._no_split_modules or ())
    layers = [module for module in stock.modules() if type(module).__name__ in names]
    if not layers:
        hint = "Use launch.strategy: ddp, or a decoder of another family."
        raise ModelError(f"{type(stock).__name__} does not say what its layers are, which its weights are cut by", hint)
    return layers


def spread(role: Backbone, plan: Plan, accelerator: Any) -> tuple[Any, Any]:
    """(the role with its weights in pieces, on the device of this process; the optimiser, which is made afterwards)

    accelerate would wrap it in DDP on a CPU, without a word; here it gives autocast alone.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = decoder_layers(role.stock)
    wrapped: Any = accelerator.prepare_model(role, device_placement=False, evaluation_mode=True)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(wrapped, mesh=mesh, reshard_after_forward=True)
    wrapped._get_fsdp_state()._lazy_init()  # else a layer that is called first, to generate, believes that it is all
    return wrapped, accelerator.prepare_optimizer(optim.build(wrapped, plan.recipe.train, plan.resolved.learning_rate))


def step(job: "Job") -> tuple[float, bool]:
    limit = job.recipe.train.max_grad_norm or math.inf
    norm = float(whole(job.accelerator.clip_grad_norm_(job.trained, limit)))
    stepped = math.isfinite(norm) or job.plan.resolved.precision == "fp16"  # the fp16 scaler skips such steps by itself
    if stepped:
        job.optimizer.step()
        stepped = not job.accelerator.optimizer_step_was_skipped
    job.optimizer.zero_grad()
    return norm, stepped


@contextmanager
def gathered(role: Any) -> Iterator[None]:
    from torch.distributed.fsdp import FSDPModule

    parts: list[Any] = [module for module in role.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def whole(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_piece(value: Tensor) -> bool:
    return isinstance(value, DTensor)


def own_piece(value: Tensor) -> Tensor:
    return value._local_tensor if isinstance(value, DTensor) else value.data


def as_placed(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the pieces of `like`. No process asks another: all have it."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    on = full.to(like.device)
    return distribute_tensor(on, like.device_mesh, like.placements, src_data_rank=None)


def piece_of(full: Tensor, like: Tensor) -> Tensor:
    return own_piece(as_placed(full, like))


def numel(value: Tensor) -> int:
    return value.numel()


@torch.no_grad()
def norms(values: Sequence[Tensor]) -> list[float]:
    found = [whole(torch.linalg.vector_norm(value, dtype=torch.float64)) for value in values]
    return torch.stack(found).tolist() if found else []


def optimizer_state(_: Any, optimizer: Any, *, keep: bool) -> Any:
    return gathered_state(optimizer.state_dict(), keep=keep)


def load_optimizer(_: Any, optimizer: Any, state: dict[str, Any]) -> None:
    optimizer.load_state_dict(placed_state(state, optimizer))


def gathered_state(value: Any, *, keep: bool) -> Any:
    """A state of an optimiser with every tensor whole and on the CPU. Collective."""
    if isinstance(value, Mapping):
        return {key: gathered_state(inner, keep=keep) for key, inner in value.items()}
    if not isinstance(value, DTensor):
        return value
    one = whole(value)
    return one.cpu() if keep else None


def placed_state(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole state of an optimiser in the pieces of its weights."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    pieces = {
        number: {key: as_placed(v, params[number]) if torch.is_tensor(v) else v for key, v in inner.items()}
        for number, inner in state["state"].items()
    }
    return {**state, "state": pieces}
