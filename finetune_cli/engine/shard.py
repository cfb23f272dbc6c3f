"""Weights spread over the processes (PyTorch's `fully_shard`, FSDP2), a decoder layer at a time.

A process keeps its piece of every weight, gradient and optimiser state. A layer is gathered for its own forward and
again for its backward; what is outside the layers (embedding, last norm, head) for those of the whole role, because the
head is read inside the role's forward and not in its own. Gradients are summed in float32, after every backward: what
would be saved by waiting for the last of a window is the memory of all gradients.

Precision is that of one process: autocast over float32 weights that are trained, frozen ones as they were loaded. So
the same numbers come of both, to rounding.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune_cli.engine.role import Backbone
from finetune_cli.errors import ModelError


def decoder_layers(stock: Any) -> list[nn.Module]:
    """The modules that transformers says are to be kept in one piece. Raises ModelError where it names none."""
    names = set(stock._no_split_modules or ())
    layers = [module for module in stock.modules() if type(module).__name__ in names]
    if not layers:
        hint = "Use launch.strategy: ddp, or a decoder of another family."
        raise ModelError(f"{type(stock).__name__} does not say what its layers are, which fsdp2 goes by", hint)
    return layers


def spread(role: Backbone, accelerator: Any) -> nn.Module:
    """The role with its weights in pieces, on the device of this process; the optimiser is made afterwards.

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
    return wrapped  # type: ignore[no-any-return]


@contextmanager
def gathered(role: nn.Module) -> Iterator[None]:
    """All weights whole in every process, which may then compute what and as often as it likes. Collective."""
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
    """A tensor that may be in pieces, in one. Collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_piece(value: Tensor) -> bool:
    return isinstance(value, DTensor)


def own_piece(value: Tensor) -> Tensor:
    """What of a tensor this process holds; the very memory."""
    return value._local_tensor if isinstance(value, DTensor) else value.data


def as_placed(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the pieces of `like`. No process asks another: all have it."""
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    on = full.to(like.device)
    return distribute_tensor(on, like.device_mesh, like.placements, src_data_rank=None)


def model_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Whole weights by name on the CPU, one gathered after the other, for the processes that `keep` them; of a model
    with adapters what is trained. Collective."""
    adapted = hasattr(model, "peft_config")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = trained if adapted else model.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}
    for p in named.values():
        if id(p) not in found:  # tied weights stay one tensor
            one = whole(p.detach())
            found[id(p)] = one.cpu() if keep else one.new_empty(0)
    return {name: found[id(p)] for name, p in named.items()} if keep else {}


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
