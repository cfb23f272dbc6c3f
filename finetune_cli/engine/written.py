"""Attention over segments written out as products, for CPUs.

PyTorch's fused CPU kernel reaches a tenth of the machine's product rate on rows of some hundred tokens. Block by block
of queries the scores fit into the cache, only keys that come before are multiplied, and a query meets all its keys at
once, so the softmax is the ordinary one. Scores, softmax and their gradients are float32, as in the fused kernel.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune_cli.data.batches import Segments

BLOCK = 128
"""Queries at a time."""
KEPT = 512
"""Keys up to which probabilities are kept for backward; beyond, memory counts more and they are computed again."""


class Rule(NamedTuple):
    """Which earlier keys a query sees: all (`local` 0), the last `local`, or those of its own chunk of `local`."""

    local: int
    chunked: bool


class Block(NamedTuple):
    """Queries start..stop of a batch, whose keys are those of back_start..back_stop and then of first..stop."""

    start: int
    stop: int
    first: int
    back_start: int
    back_stop: int

    def keys(self, x_KTD: Tensor) -> Tensor:
        """Of all tokens, those that the block looks at: [K, S, D]."""
        own = x_KTD[:, self.first : self.stop]
        if self.back_start == self.back_stop:
            return own
        return torch.cat((x_KTD[:, self.back_start : self.back_stop], own), 1)

    def add(self, x_KTD: Tensor, part_KSD: Tensor) -> None:
        """The reverse of `keys`."""
        back = self.back_stop - self.back_start
        if back:
            x_KTD[:, self.back_start : self.back_stop] += part_KSD[:, :back]
        x_KTD[:, self.first : self.stop] += part_KSD[:, back:]

    @property
    def seen(self) -> int:
        return self.back_stop - self.back_start + self.stop - self.first


def blocks(layout: Segments) -> Iterator[Block]:
    for span in layout.spans:
        for start in range(span.start, span.stop, BLOCK):
            yield Block(start, min(start + BLOCK, span.stop), span.start, span.back_start, span.back_stop)


def hide(scores_KGLS: Tensor, rule: Rule, layout: Segments) -> None:
    """Minus infinity for keys that a query does not see; the queries are the last L of the S positions."""
    queries, keys = scores_KGLS.shape[2:]
    key = (queries, queries, 0, False) if rule.local == 0 else (queries, keys, *rule)  # earlier keys are all seen
    if key not in layout.hidden:
        seen_LS = causal_mask(key[0], key[1], rule.local, chunked=rule.chunked, device=scores_KGLS.device)
        layout.hidden[key] = torch.zeros(seen_LS.shape, dtype=scores_KGLS.dtype).masked_fill_(~seen_LS, -torch.inf)
    scores_KGLS[..., keys - key[1] :] += layout.hidden[key]


def causal_mask(queries: int, keys: int, local: int, *, chunked: bool, device: torch.device) -> Tensor:
    """[L, S], True where query i (the last L of S positions) sees key j. `local` 0 is no window."""
    i, j = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)[None]
    mask = j <= i
    if local:
        mask = mask & ((i // local == j // local) if chunked else (i - j < local))
    return mask


class WrittenOut(torch.autograd.Function):
    """softmax(q k^T s) v over segments; q [H, T, D], k and v [K, T, D], heads in groups of G = H / K -> [T, H, D].

    Shape letters: L queries of a block, S keys that it sees, M = G L its rows in a product.
    """

    @staticmethod
    def forward(
        ctx: Any, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scaling: float, rule: Rule, layout: Segments
    ) -> Tensor:
        (heads, tokens, _), kv_heads = q_HTD.shape, k_KTD.shape[0]
        kept: list[Tensor] = []
        keeping = any(ctx.needs_input_grad)
        with torch.autocast(q_HTD.device.type, enabled=False):
            out_THD = q_HTD.new_empty(tokens, heads, v_KTD.shape[2])
            q_KGTD, out_KGTD = grouped(q_HTD, kv_heads), grouped(out_THD.transpose(0, 1), kv_heads)
            wide_KTD = widened(k_KTD)
            for block in blocks(layout):
                p_KMS = probabilities(rows(q_KGTD, block), block.keys(wide_KTD), scaling, rule, layout, block)
                p_KMS = p_KMS.to(q_HTD.dtype)
                o_KMD = torch.bmm(p_KMS, block.keys(v_KTD))
                out_KGTD[:, :, block.start : block.stop] = split(o_KMD, heads // kv_heads)
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
        dtype, kv_heads, groups = q_HTD.dtype, k_KTD.shape[0], q_HTD.shape[0] // k_KTD.shape[0]
        kept.reverse()
        with torch.autocast(q_HTD.device.type, enabled=False):
            k_wide_KTD, v_wide_KTD = widened(k_KTD), widened(v_KTD)
            dq_HTD = torch.empty_like(q_HTD)
            dk_KTD, dv_KTD = torch.zeros_like(k_wide_KTD), torch.zeros_like(v_wide_KTD)
            q_KGTD, dq_KGTD = grouped(q_HTD, kv_heads), grouped(dq_HTD, kv_heads)
            dout_KGTD = grouped(dout_THD.transpose(0, 1), kv_heads)
            for block in blocks(layout):
                q_KMD, do_KMD = rows(q_KGTD, block), rows(dout_KGTD, block)
                if block.seen <= KEPT:
                    low_KMS = kept.pop()
                    p_KMS = widened(low_KMS)
                else:
                    p_KMS = probabilities(q_KMD, block.keys(k_wide_KTD), scaling, rule, layout, block)
                    low_KMS = p_KMS.to(dtype)
                dp_KMS = torch.bmm(widened(do_KMD), block.keys(v_wide_KTD).transpose(1, 2))
                ds_KMS = torch._softmax_backward_data(dp_KMS, p_KMS, -1, p_KMS.dtype).to(dtype)
                dq_KMD = torch.bmm(ds_KMS, block.keys(k_KTD)).mul_(scaling)
                dq_KGTD[:, :, block.start : block.stop] = split(dq_KMD, groups)
                block.add(dk_KTD, torch.bmm(ds_KMS.transpose(1, 2), q_KMD).mul_(scaling))
                block.add(dv_KTD, torch.bmm(low_KMS.transpose(1, 2), do_KMD))
        return dq_HTD, dk_KTD.to(dtype), dv_KTD.to(dtype), None, None, None


def grouped(x_HTD: Tensor, kv_heads: int) -> Tensor:
    """[K, G, T, D], the heads that share keys together."""
    return x_HTD.view(kv_heads, -1, *x_HTD.shape[1:])


def split(x_KMD: Tensor, groups: int) -> Tensor:
    """The reverse of `rows`: [K, G, L, D]."""
    return x_KMD.view(x_KMD.shape[0], groups, -1, x_KMD.shape[2])


def widened(x: Tensor) -> Tensor:
    """In float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rows(x_KGTD: Tensor, block: Block) -> Tensor:
    """A block's queries, the group's heads one after the other: [K, G L, D]."""
    return x_KGTD[:, :, block.start : block.stop].flatten(1, 2)


def probabilities(q_KMD: Tensor, k_KSD: Tensor, scaling: float, rule: Rule, layout: Segments, block: Block) -> Tensor:
    """[K, M, S], float32."""
    scores_KMS = torch.bmm(widened(q_KMD).mul(scaling), k_KSD.transpose(1, 2))
    hide(split(scores_KMS, scores_KMS.shape[1] // (block.stop - block.start)), rule, layout)
    return scores_KMS.softmax(-1)
