"""RMS norms with frozen weights (arXiv 1910.07467) as one node of the graph each.

Written as a chain of operations a norm keeps two or three copies of its input, most of them in float32, and passes over
them some twenty times. As one node it keeps the input as it came and a number a row, and passes half as often.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class Normed(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps) over the last dimension, in float32; x [..., D], w [D].

    `narrow_first`: x / sqrt(...) is rounded to the format of x before it meets w, as Llama does it; Gemma rounds once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, narrow_first: bool) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight_D, scale)
        ctx.narrow_first = narrow_first
        unit = wide.mul_(scale) if wide is not x else wide * scale
        return weight_D * unit.to(x.dtype) if narrow_first else unit.mul_(weight_D).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale = ctx.saved_tensors
        dunit = (dy * weight_D).float() if ctx.narrow_first else dy.float() * weight_D
        wide = x.float()
        share = torch.linalg.vecdot(dunit, wide).unsqueeze(-1).div_(-x.shape[-1]).mul_(scale.pow(3))
        return dunit.mul_(scale).addcmul_(wide, share).to(x.dtype), None, None, None


def llama(norm: Any, x: Tensor) -> Tensor:
    return _apply(x, norm.weight, _eps(norm), True)


def gemma(norm: Any, x: Tensor) -> Tensor:
    return _apply(x, norm.weight.float() + 1.0, _eps(norm), False)


def _apply(*arguments: Any) -> Tensor:
    return Normed.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


@cache
def fast(kind: type[nn.Module], formula: Callable[[Any, Tensor], Tensor]) -> type[nn.Module]:
    """A kind of norm computed by `Normed`, while its weight is frozen."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        frozen = not self.weight.requires_grad and self.weight.dtype == hidden_states.dtype
        if frozen and hidden_states.requires_grad:
            return formula(self, hidden_states)
        return kind.forward(self, hidden_states)  # type: ignore[no-any-return]

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


def hasten(model: nn.Module) -> None:
    """Let every norm that is one of these formulas be computed by `Normed`. What a norm computes is not told by its
    name: it is asked, with random numbers, and has to give the same to the last bit."""
    for norm in model.modules():
        weight = getattr(norm, "weight", None)
        if "RMSNorm" not in type(norm).__name__ or weight is None or weight.dim() != 1 or weight.requires_grad:
            continue
        formula = next((f for f in (llama, gemma) if same(norm, f)), None)
        if formula is not None:
            norm.__class__ = fast(type(norm), formula)  # type: ignore[arg-type]


def same(norm: nn.Module, formula: Callable[[Any, Tensor], Tensor]) -> bool:
    weight: Any = norm.weight
    alone = len(inspect.signature(type(norm).forward).parameters) == 2  # and no gate beside what is normed
    if not alone or not (hasattr(norm, "variance_epsilon") or hasattr(norm, "eps")):
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, weight.shape[0], generator=draw).to(weight.device, weight.dtype)
    with torch.no_grad():
        return torch.equal(norm(x), formula(norm, x))
