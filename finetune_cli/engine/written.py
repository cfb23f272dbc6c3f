"""Attention over segments written out as products, for CPUs.

PyTorch's fused CPU kernel reaches a tenth of the machine's product rate on rows of some hundred tokens. Block by block
of queries the scores fit into the cache, only keys that come before are multiplied, and a query meets all its keys at
once, so the softmax is the ordinary one. Scores and softmax are float32, as in the fused kernel; the gradient of the
probabilities is a product in the format of the model, which leaves every gradient nearer to the truth than the fused
kernel's (docs/decisions.md).
"""

from collections.abc import Iterator
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


def hide(scores_KLGS: Tensor, rule: Rule, layout: Segments) -> None:
    """Minus infinity for keys that a query does not see; the queries are the last L of the S positions."""
    queries, seen = scores_KLGS.shape[1], scores_KLGS.shape[3]
    key = (queries, queries, 0, False) if rule.local == 0 else (queries, seen, *rule)  # earlier keys are all seen
    if key not in layout.hidden:
        seen_LS = causal_mask(key[0], key[1], rule.local, chunked=rule.chunked, device=scores_KLGS.device)
        hidden_LS = torch.zeros(seen_LS.shape, dtype=scores_KLGS.dtype).masked_fill_(~seen_LS, -torch.inf)
        layout.hidden[key] = hidden_LS[:, None]
    scores_KLGS[..., seen - key[1] :] += layout.hidden[key]


def causal_mask(queries: int, keys: int, local: int, *, chunked: bool, device: torch.device) -> Tensor:
    """[L, S], True where query i (the last L of S positions) sees key j. `local` 0 is no window."""
    i, j = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)[None]
    mask = j <= i
    if local:
        mask = mask & ((i // local == j // local) if chunked else (i - j < local))
    return mask


class WrittenOut(torch.autograd.Function):
    """softmax(q k^T s) v over segments; q [H, T, D], k and v [K, T, D], heads in groups of G = H / K -> [T, H, D].

    Shape letters: L queries of a block, S keys that it sees, M = L G its rows in a product, N = T G all of them: the
    heads of a group lie side by side, so that a block of queries is a slice.
    """

    @staticmethod
    def forward(
        ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scaling: float, rule: Rule, layout: Segments
    ) -> Tensor:
        (heads, tokens, _), kv_heads = q_HTD.shape, k_KTD.shape[0]
        groups, size = heads // kv_heads, v_KTD.shape[2]
        kept: list[Tensor] = []
        keeping = any(ctx.needs_input_grad)
        with torch.autocast(q_HTD.device.type, enabled=False):
            out_KND = q_HTD.new_empty(kv_heads, tokens * groups, size)
            q_KND, wide_KTD = widened(by_group(q_HTD, kv_heads)) * scaling, widened(k_KTD)
            room = scratch(q_KND, layout, groups)
            for span in layout.spans:
                k_KSD, v_KSD = keys(wide_KTD, span), keys(v_KTD, span)
                for block in blocks(span):
                    own = slice(block.start * groups, block.stop * groups)
                    p_wide_KMS = probabilities(q_KND[:, own], k_KSD[:, : block.seen], rule, layout, groups, room)
                    p_KMS = p_wide_KMS.to(q_HTD.dtype, copy=True)
                    out_KND[:, own] = torch.bmm(p_KMS, v_KSD[:, : block.seen])
                    if keeping and block.seen <= KEPT:
                        kept.append(p_KMS)
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD, *kept)
        ctx.rest = scaling, rule, layout
        return out_KND.view(kv_heads, tokens, groups, size).transpose(0, 1).reshape(tokens, heads, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_THD: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_KTD, v_KTD, *kept = ctx.saved_tensors
        scaling, rule, layout = ctx.rest
        (heads, tokens, size), kv_heads, dtype = q_HTD.shape, k_KTD.shape[0], q_HTD.dtype
        groups = heads // kv_heads
        kept.reverse()
        with torch.autocast(q_HTD.device.type, enabled=False):
            q_KND, do_KND = by_group(q_HTD, kv_heads), by_group(dout_THD.transpose(0, 1), kv_heads)
            room, spare = scratch(widened(q_KND[:, :0]), layout, groups), scratch(q_KND, layout, groups)
            dq_KND = torch.empty_like(q_KND)
            dk_KTD, dv_KTD = widened(torch.zeros_like(k_KTD)), widened(torch.zeros_like(v_KTD))
            for span in layout.spans:
                k_KSD, v_KSD = keys(k_KTD, span), keys(v_KTD, span)
                dk_KSD, dv_KSD = widened(torch.zeros_like(k_KSD)), widened(torch.zeros_like(v_KSD))
                for block in blocks(span):
                    own, seen = slice(block.start * groups, block.stop * groups), block.seen
                    if seen <= KEPT:
                        p_KMS = kept.pop()
                    else:
                        q_KMD, k_KSD_wide = widened(q_KND[:, own]) * scaling, widened(k_KSD[:, :seen])
                        p_KMS = probabilities(q_KMD, k_KSD_wide, rule, layout, groups, room).to(dtype)
                    ds_KMS = spare[: p_KMS.numel()].view(p_KMS.shape)
                    torch.bmm(do_KND[:, own], v_KSD[:, :seen].transpose(1, 2), out=ds_KMS)
                    torch._softmax_backward_data(ds_KMS, p_KMS, -1, dtype, grad_input=ds_KMS)
                    dq_KND[:, own] = torch.bmm(ds_KMS, k_KSD[:, :seen])
                    dk_KSD[:, :seen] += torch.bmm(ds_KMS.transpose(1, 2), q_KND[:, own])
                    dv_KSD[:, :seen] += torch.bmm(p_KMS.transpose(1, 2), do_KND[:, own])
                add_keys(dk_KTD, dk_KSD, span)
                add_keys(dv_KTD, dv_KSD, span)
            dq_HTD = dq_KND.mul_(scaling).view(kv_heads, tokens, groups, size).transpose(1, 2).reshape(q_HTD.shape)
        return dq_HTD, dk_KTD.mul_(scaling).to(dtype), dv_KTD.to(dtype), None, None, None


def by_group(x_HTD: Tensor, kv_heads: int) -> Tensor:
    """[K, T G, D], the heads that share keys side by side at each token."""
    heads, tokens, size = x_HTD.shape
    return x_HTD.view(kv_heads, heads // kv_heads, tokens, size).transpose(1, 2).reshape(kv_heads, -1, size)


def widened(x: Tensor) -> Tensor:
    """In float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scratch(q_KND: Tensor, layout: Segments, groups: int) -> Tensor:
    """Memory, in the format of q, for the scores of the largest block, which all blocks use: what was written last is
    in the cache still."""
    sizes = ((block.stop - block.start) * block.seen for span in layout.spans for block in blocks(span))
    return q_KND.new_empty(q_KND.shape[0] * groups * max(sizes, default=0))


def probabilities(q_KMD: Tensor, k_KSD: Tensor, rule: Rule, layout: Segments, groups: int, scratch_N: Tensor) -> Tensor:
    """Of scaled queries: [K, M, S], in their format and in `scratch_N`, until it is used again."""
    shape = kv_heads, rows, seen = q_KMD.shape[0], q_KMD.shape[1], k_KSD.shape[1]
    scores_KMS = scratch_N[: kv_heads * rows * seen].view(shape)
    torch.bmm(q_KMD, k_KSD.transpose(1, 2), out=scores_KMS)
    hide(scores_KMS.view(kv_heads, -1, groups, seen), rule, layout)
    return torch.softmax(scores_KMS, -1, out=scores_KMS)
