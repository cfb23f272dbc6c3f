"""Attention over segments written out as products, for CPUs.

PyTorch's fused CPU kernel reaches a tenth of the machine's product rate on rows of some hundred tokens. Block by block
of queries the scores fit into the cache, only keys that come before are multiplied, and a query meets all its keys at
once, so the softmax is the ordinary one. Scores and softmax are float32, as in the fused kernel; the gradient of the
probabilities is a product in the format of the model, which leaves every gradient nearer to the truth than the fused
kernel's (docs/decisions.md).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune_cli.data.batches import Segment, Segments

BLOCK = 128
"""Queries at a time."""
KEPT = 1024
"""Keys up to which probabilities are kept for backward; beyond, memory counts more and they are computed again."""


class Rule(NamedTuple):
    """Which earlier keys a query sees: all (`local` 0), the last `local`, or those of its own chunk of `local`."""

    local: int
    chunked: bool


class Block(NamedTuple):
    """Queries start..stop of a batch, and how many keys of their span they see, from its first."""

    start: int
    stop: int
    seen: int


def blocks(span: Segment) -> Iterator[Block]:
    back = span.back_stop - span.back_start
    for start in range(span.start, span.stop, BLOCK):
        stop = min(start + BLOCK, span.stop)
        yield Block(start, stop, back + stop - span.start)


def keys(x_KTD: Tensor, span: Segment) -> Tensor:
    """Of all tokens, those that a span may look at: [K, S, D]."""
    own = x_KTD[:, span.start : span.stop]
    if span.back_start == span.back_stop:
        return own
    return torch.cat((x_KTD[:, span.back_start : span.back_stop], own), 1)


def add_keys(x_KTD: Tensor, part_KSD: Tensor, span: Segment) -> None:
    """The reverse of `keys`."""
    back = span.back_stop - span.back_start
    if back:
        x_KTD[:, span.back_start : span.back_stop] += part_KSD[:, :back]
    x_KTD[:, span.start : span.stop] += part_KSD[:, back:]


def hide(scores_KGLS: Tensor, rule: Rule, layout: Segments) -> None:
    """Minus infinity for keys that a query does not see; the queries are the last L of the S positions."""
    queries, seen = scores_KGLS.shape[2:]
    key = (queries, queries, 0, False) if rule.local == 0 else (queries, seen, *rule)  # earlier keys are all seen
    if key not in layout.hidden:
        seen_LS = causal_mask(key[0], key[1], rule.local, chunked=rule.chunked, device=scores_KGLS.device)
        layout.hidden[key] = torch.zeros(seen_LS.shape, dtype=scores_KGLS.dtype).masked_fill_(~seen_LS, -torch.inf)
    scores_KGLS[..., seen - key[1] :] += layout.hidden[key]


def causal_mask(queries: int, keys: int, local: int, *, chunked: bool, device: torch.device) -> Tensor:
    """[L, S], True where query i (the last L of S positions) sees key j. `local` 0 is no window."""
    i, j = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)[None]
    mask = j <= i
    if local:
        mask = mask & ((i // local == j // local) if chunked else (i - j < local))
    return mask


class WrittenOut(torch.autograd.Function):
    """softmax(q k^T s) v over segments; q [H, T, D], k and v [K, T, D], heads in groups of G = H / K -> [T, H, D].

    Shape letters: L queries of a block, S keys that it sees, M = G L its rows in a product: the heads of a group share
    their keys.
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
            for span in layout.spans:
                k_KSD, v_KSD = widened(keys(k_KTD, span)), keys(v_KTD, span)
                for block in blocks(span):
                    p_wide_KMS = probabilities(q_KGTD, k_KSD, block, scaling, rule, layout, room)
                    p_KMS = p_wide_KMS.to(q_HTD.dtype, copy=True)
                    put(out_KGTD, block, torch.bmm(p_KMS, v_KSD[:, : block.seen]))
                    if keeping and block.seen <= KEPT:
                        kept.append(p_KMS)
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
            for span in layout.spans:
                k_KSD, v_KSD = keys(k_KTD, span), keys(v_KTD, span)
                dk_KSD, dv_KSD = widened(torch.zeros_like(k_KSD)), widened(torch.zeros_like(v_KSD))
                for block in blocks(span):
                    seen, q_KMD, do_KMD = block.seen, rows(q_KGTD, block, dtype), rows(do_KGTD, block, dtype)
                    if seen <= KEPT:
                        p_KMS = kept.pop()
                    else:
                        k_wide_KSD = widened(k_KSD[:, :seen])
                        p_KMS = probabilities(q_KGTD, k_wide_KSD, block, scaling, rule, layout, room).to(dtype)
                    ds_KMS = spare[: p_KMS.numel()].view(p_KMS.shape)
                    torch.bmm(do_KMD, v_KSD[:, :seen].transpose(1, 2), out=ds_KMS)
                    torch._softmax_backward_data(ds_KMS, p_KMS, -1, dtype, grad_input=ds_KMS)
                    put(dq_KGTD, block, torch.bmm(ds_KMS, k_KSD[:, :seen]).mul_(scaling))
                    dk_KSD[:, :seen] += torch.bmm(ds_KMS.transpose(1, 2), q_KMD)
                    dv_KSD[:, :seen] += torch.bmm(p_KMS.transpose(1, 2), do_KMD)
                add_keys(dk_KTD, dk_KSD, span)
                add_keys(dv_KTD, dv_KSD, span)
        return dq_HTD, dk_KTD.mul_(scaling).to(dtype), dv_KTD.to(dtype), None, None, None


def by_group(x_HTD: Tensor, kv_heads: int) -> Tensor:
    """[K, G, T, D], a view: the heads that share keys."""
    return x_HTD.view(kv_heads, -1, *x_HTD.shape[1:])


def rows(x_KGTD: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """Those of a block, as they are multiplied. [K, M, D]"""
    some = x_KGTD[:, :, block.start : block.stop]
    return torch.empty(some.shape, dtype=dtype, device=some.device).copy_(some).flatten(1, 2)


def put(x_KGTD: Tensor, block: Block, part_KMD: Tensor) -> None:
    """The reverse of `rows`."""
    x_KGTD[:, :, block.start : block.stop] = part_KMD.view(*x_KGTD.shape[:2], -1, part_KMD.shape[2])


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or the format itself where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def scratch(layout: Segments, heads: int, dtype: torch.dtype) -> Tensor:
    """Memory for the scores of the largest block, which all blocks use: what was written last is in the cache still."""
    sizes = ((block.stop - block.start) * block.seen for span in layout.spans for block in blocks(span))
    return torch.empty(heads * max(sizes, default=0), dtype=dtype)


def probabilities(
    q_KGTD: Tensor, k_KSD: Tensor, block: Block, scaling: float, rule: Rule, layout: Segments, scratch_N: Tensor
) -> Tensor:
    """Of a block's queries, with keys that are widened. [K, M, S] in `scratch_N`, until it is used again."""
    q_KMD, k_KDS = rows(q_KGTD, block, k_KSD.dtype), k_KSD[:, : block.seen].transpose(1, 2)
    shape = q_KMD.shape[0], q_KMD.shape[1], block.seen
    scores_KMS = scratch_N[: math.prod(shape)].view(shape)
    with exactly(q_KGTD.dtype):
        torch.baddbmm(scores_KMS, q_KMD, k_KDS, beta=0, alpha=scaling, out=scores_KMS)
    hide(scores_KMS.view(*q_KGTD.shape[:2], -1, block.seen), rule, layout)
    return torch.softmax(scores_KMS, -1, out=scores_KMS)


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
