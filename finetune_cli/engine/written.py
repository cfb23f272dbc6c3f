"""Attention over segments written out as products, for CPUs.

PyTorch's fused CPU kernel reaches a tenth of the machine's product rate on rows of some hundred tokens. Part by part
(`engine/parts.py`) the scores fit into the cache, only keys that come before are multiplied, and a query meets all its
keys at once, so the softmax is the ordinary one. Scores and softmax are float32, as in the fused kernel; the gradient
of the probabilities is a product in the format of the model, which leaves every gradient nearer to the truth than the
fused kernel's (docs/decisions.md).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from finetune_cli.data.batches import Segments
from finetune_cli.engine.parts import Block, Part, Rule, parts
from finetune_cli.plan.arrangement import KEPT


class WrittenOut(torch.autograd.Function):
    """softmax(q k^T s) v over segments; q [H, T, D], k and v [K, T, D], heads in groups of G = H / K -> [T, H, D].

    Other shape letters as in `engine/parts.py`.
    """

    @staticmethod
    def forward(
        ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scaling: float, rule: Rule, layout: Segments
    ) -> Tensor:
        (heads, tokens, _), kv_heads = q_HTD.shape, k_KTD.shape[0]
        q_KGTD = by_group(q_HTD, kv_heads)
        kept: list[Tensor] = []
        keeping = any(ctx.needs_input_grad)
        with torch.autocast(q_HTD.device.type, enabled=False):
            out_THD = q_HTD.new_empty(tokens, heads, v_KTD.shape[2])
            out_KGTD = by_group(out_THD.transpose(0, 1), kv_heads)
            room = scratch(layout, heads, wide(q_HTD.dtype))
            for part in parts(layout):
                k_BSD, v_BSD = widened(part.keys(k_KTD)), part.keys(v_KTD)
                for block in part.blocks():
                    p_wide_BMS = probabilities(q_KGTD, k_BSD, part, block, scaling, rule, layout, room)
                    p_BMS = p_wide_BMS.to(q_HTD.dtype, copy=True)
                    part.put(out_KGTD, block, torch.bmm(p_BMS, v_BSD[:, : block.seen]))
                    if keeping and block.seen <= KEPT:
                        kept.append(p_BMS)
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD, *kept)
        ctx.rest = scaling, rule, layout
        return out_THD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_KTD, v_KTD, *kept = ctx.saved_tensors
        scaling, rule, layout = ctx.rest
        heads, kv_heads, dtype = q_HTD.shape[0], k_KTD.shape[0], q_HTD.dtype
        q_KGTD, do_KGTD = (by_group(x, kv_heads) for x in (q_HTD, dout_THD.transpose(0, 1)))
        kept.reverse()
        with torch.autocast(q_HTD.device.type, enabled=False):
            room, spare = scratch(layout, heads, wide(dtype)), scratch(layout, heads, dtype)
            dq_HTD = torch.empty_like(q_HTD)
            dq_KGTD = by_group(dq_HTD, kv_heads)
            dk_KTD, dv_KTD = widened(torch.zeros_like(k_KTD)), widened(torch.zeros_like(v_KTD))
            for part in parts(layout):
                k_BSD, v_BSD = part.keys(k_KTD), part.keys(v_KTD)
                dk_BSD, dv_BSD = widened(torch.zeros_like(k_BSD)), widened(torch.zeros_like(v_BSD))
                for block in part.blocks():
                    seen, q_BMD, do_BMD = block.seen, part.rows(q_KGTD, block, dtype), part.rows(do_KGTD, block, dtype)
                    if seen <= KEPT:
                        p_BMS = kept.pop()
                    else:
                        k_wide_BSD = widened(k_BSD[:, :seen])
                        p_BMS = probabilities(q_KGTD, k_wide_BSD, part, block, scaling, rule, layout, room).to(dtype)
                    ds_BMS = spare[: p_BMS.numel()].view(p_BMS.shape)
                    torch.bmm(do_BMD, v_BSD[:, :seen].transpose(1, 2), out=ds_BMS)
                    torch._softmax_backward_data(ds_BMS, p_BMS, -1, dtype, grad_input=ds_BMS)
                    part.put(dq_KGTD, block, torch.bmm(ds_BMS, k_BSD[:, :seen]).mul_(scaling))
                    dk_BSD[:, :seen] += torch.bmm(ds_BMS.transpose(1, 2), q_BMD)
                    dv_BSD[:, :seen] += torch.bmm(p_BMS.transpose(1, 2), do_BMD)
                part.add_keys(dk_KTD, dk_BSD)
                part.add_keys(dv_KTD, dv_BSD)
        return dq_HTD, dk_KTD.mul_(scaling).to(dtype), dv_KTD.to(dtype), None, None, None


def by_group(x_HTD: Tensor, kv_heads: int) -> Tensor:
    """[K, G, T, D], a view: the heads that share keys."""
    return x_HTD.view(kv_heads, -1, *x_HTD.shape[1:])


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the format itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def scratch(layout: Segments, heads: int, dtype: torch.dtype) -> Tensor:
    """Memory for the scores of the largest block, which all blocks use: what was written last is in the cache still."""
    sizes = (part.count * block.scores for part in parts(layout) for block in part.blocks())
    return torch.empty(heads * max(sizes, default=0), dtype=dtype)


def probabilities(
    q_KGTD: Tensor, k_BSD: Tensor, part: Part, block: Block, scaling: float, rule: Rule, layout: Segments,
    scratch_N: Tensor,
) -> Tensor:  # fmt: skip
    """Of a block's queries, with keys that are widened. [B, M, S] in `scratch_N`, until it is used again."""
    q_BMD, k_BDS = part.rows(q_KGTD, block, k_BSD.dtype), k_BSD[:, : block.seen].transpose(1, 2)
    shape = q_BMD.shape[0], q_BMD.shape[1], block.seen
    scores_BMS = scratch_N[: math.prod(shape)].view(shape)
    with exactly(q_KGTD.dtype):
        torch.baddbmm(scores_BMS, q_BMD, k_BDS, beta=0, alpha=scaling, out=scores_BMS)
    part.hide(scores_BMS, block, rule, layout)
    return torch.softmax(scores_BMS, -1, out=scores_BMS)


@contextmanager
def exactly(dtype: torch.dtype) -> Iterator[None]:
    """Float32 products of factors that are numbers of bfloat16: oneDNN may take them as such, which changes nothing
    but the time, a third less (PyTorch has no product of bfloat16 factors with a float32 result on CPUs)."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set on the module from outside
    before = setting.fp32_precision
    if dtype == torch.bfloat16 and torch._C._has_mkldnn:
        setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
