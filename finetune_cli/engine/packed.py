"""Frozen weights laid out a second time as oneDNN multiplies with them, for CPUs.

A product with a plain weight arranges it in blocks first, every time. Of eight rows, as when answers are drawn, that
is more than half of the time; of some thousand, five to ten percent; of a chunk of logits a fifth. The sums are the
same, to the bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed:
    """W [O, I] for x W^T, and for dy W where there was room."""

    def __init__(self, weight_OI: Tensor, *, both: bool) -> None:
        self._of = _state(weight_OI)
        self.forward = _reordered(weight_OI.detach())
        self.backward = _reordered(weight_OI.detach().T.contiguous()) if both else None

    def __deepcopy__(self, memo: Any) -> None:
        """A copied layer has a weight of its own, and no copies of it."""

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.forward, self.backward) if x is not None)

    def fits(self, weight_OI: Tensor) -> bool:
        """Whether the weight is still the one that was laid out."""
        return self._of == _state(weight_OI)


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version


def _reordered(weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return made


def packed(layer: nn.Module, dtype: torch.dtype) -> Packed | None:
    """The copies of a layer's weight for products in `dtype`, where it has them and they hold."""
    found: Packed | None = layer.__dict__.get("packed")
    weight: Any = layer.weight
    return found if found is not None and weight.dtype == dtype and found.fits(weight) else None


def times(x_TI: Tensor, copy: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b for a copy of W, or dy W for one of its transpose. [T, O]"""
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise.default(x_TI, copy, bias_O, "none", [], "")
    return y_TO


@torch.no_grad()
def pack(layers: Iterable[nn.Linear], room: float) -> None:
    """Give frozen bfloat16 layers on a CPU their copies: both, or the first alone, as all of them fit into `room`
    bytes. Copies of before are forgotten."""
    quick = []
    for layer in layers:
        layer.__dict__.pop("packed", None)
        quick += [layer] if fit(layer) else []
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in quick)
    if not quick or size > room or not same(quick[0].weight):
        return
    for layer in quick:
        layer.__dict__["packed"] = Packed(layer.weight, both=2 * size <= room)


def pack_head(model: Any, room: float) -> None:
    """Where the layers have copies, the head gets them too, as far as they fit into what of `room` is left."""
    head, taken = model.get_output_embeddings(), copied_bytes(model)
    if taken and head is not None and "packed" not in head.__dict__:
        pack([head], room - taken)


def copied_bytes(model: nn.Module) -> int:
    """Of all copies in a model."""
    return sum(found.bytes for layer in model.modules() if (found := layer.__dict__.get("packed")) is not None)


def fit(layer: nn.Linear) -> bool:
    weight = layer.weight
    plain = type(layer) is nn.Linear and weight.device.type == "cpu" and not weight.requires_grad
    return plain and weight.dtype == torch.bfloat16 and able()


def able() -> bool:
    """Whether this PyTorch has oneDNN, and the processor its bfloat16 products."""
    return torch._C._has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def same(weight_OI: Tensor) -> bool:
    """Whether this machine's product is the plain one, to the last bit: asked with random numbers, both ways."""
    copies = Packed(weight_OI, both=True)
    assert copies.backward is not None
    draw = torch.Generator().manual_seed(0)
    for rows in (1, 8, 100):
        x, dy = (torch.randn(rows, n, generator=draw).to(weight_OI.dtype) for n in reversed(weight_OI.shape))
        there = torch.equal(times(x, copies.forward), F.linear(x, weight_OI))
        if not (there and torch.equal(times(dy, copies.backward), dy @ weight_OI)):
            return False
    return True
