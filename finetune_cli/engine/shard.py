"""Weights spread over the processes (PyTorch's `fully_shard`, FSDP2), a decoder layer at a time.

A process keeps its piece of every weight, gradient and optimiser state. A layer is gathered for its own forward and
again for its backward; what is outside the layers (embedding, last norm, head) for those of the whole role, because the
head is read inside the role's forward and not in its own. Gradients are summed in float32, after every backward: what
would be saved by waiting for the last of a window is the memory of all gradients.

Precision is that of one process: autocast over float32 weights that are trained, frozen ones as they were loaded. So
the same numbers come of both, to rounding.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

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


def optimizer_state(_: Any, optimizer: Any, *, keep: bool, skip: Container[str] = ()) -> Any:
    return gathered_state(optimizer.state_dict(), keep=keep, skip=skip)


def load_optimizer(_: Any, optimizer: Any, state: dict[str, Any], pieces: Sequence[Mapping[str, Tensor]] = ()) -> None:
    optimizer.load_state_dict(placed_state(state, optimizer, pieces))


def gathered_state(state: Mapping[str, Any], *, keep: bool, skip: Container[str] = ()) -> dict[str, Any]:
    """A state of an optimiser with every tensor whole and on the CPU; those to `skip` (`own_pieces`) are None.
    Collective."""

    def gathered(name: str, value: Any) -> Any:
        if name in skip or not isinstance(value, DTensor):
            return None if name in skip else value
        one = whole(value)
        return one.cpu() if keep else None

    states = {n: {key: gathered(f"{n}.{key}", v) for key, v in inner.items()} for n, inner in state["state"].items()}
    return {**state, "state": states}


def own_pieces(optimizer: Any) -> dict[str, Tensor]:
    """What this process holds of the states that are cut as their weights are, by "<number of the weight>.<name>": rows
    that follow those of the process before it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{number}.{key}": own_piece(value).cpu()
        for number, inner in optimizer.state_dict()["state"].items()
        for key, value in inner.items()
        if isinstance(value, DTensor) and _cut_alike(value, params[number])
    }


def _cut_alike(value: DTensor, p: Any) -> bool:
    return isinstance(p, DTensor) and value.shape == p.shape and value.placements == p.placements == (Shard(0),)


def placed_state(
    state: Mapping[str, Any], optimizer: Any, pieces: Sequence[Mapping[str, Tensor]] = ()
) -> dict[str, Any]:
    """A state of an optimiser in the pieces of its weights: what is whole is cut, what was left in `pieces`, those of
    each process in order of rank, is put together as far as this process has need of it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def placed(number: int, key: str, value: Any) -> Any:
        if value is None and pieces:
            return _joined([held[f"{number}.{key}"] for held in pieces], params[number])
        return as_placed(value, params[number]) if torch.is_tensor(value) else value

    states = {n: {key: placed(n, key, value) for key, value in inner.items()} for n, inner in state["state"].items()}
    return {**state, "state": states}


def _joined(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """Rows that lie in `pieces`, one after the other: all, or as many as this process holds of `like`."""
    if not isinstance(like, DTensor):
        return torch.cat(list(pieces)).to(like.device)
    local, (rank,) = own_piece(like), like.device_mesh.get_coordinate() or (0,)
    length, start = Shard.local_shard_size_and_offset(like.shape[0], like.device_mesh.size(), rank)
    found, passed = [pieces[0][:0]], 0
    for piece in pieces:
        first, last = max(start - passed, 0), min(start + length - passed, len(piece))
        found += [piece[first:last]] if first < last else []
        passed += len(piece)
    joined = torch.cat(found).to(local.device)
    return DTensor.from_local(
        joined, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
