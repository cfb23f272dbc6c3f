"""Attention over segments: rows end to end, no padding, a shared prefix computed once.

Registered through transformers' attention and mask interfaces, so every decoder that goes through them works
unmodified. The layout travels as a forward argument; a checkpointed layer that runs again in backward gets the same.

A segment's queries see the keys of the earlier segment it looks back on, then its own, causally, aligned at the bottom
right. An index into those keys is a position, so windows and chunks are plain functions of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finetune_cli.data.batches import Segments
from finetune_cli.engine.parts import Rule, causal_mask
from finetune_cli.engine.written import WrittenOut

NAME = "segments"
"""transformers branches on names that contain flash, sdpa or flex; this one does not."""
SHORT_ON_CPU = 350
"""Keys up to which the CPU's kernel is faster in float32 than in bfloat16 (80 keys: 0.84 against 1.68 ms)."""
REFUSED = ("position_bias", "indices", "block_indices", "sinks")
"""Arguments of families whose attention is more than keys, values and a window."""


def segments_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Any = None,
    local_size: int | None = None,
    **kw: Any,
) -> Tensor | None:
    """Under a layout (told by an empty 2-D mask) no mask, only its rule, as the shape of an empty tensor.

    [1, 1, 0, 0] causal, [1, 1, 0, W] a window of W, [1, 2, 0, W] chunks of W. A model hands each layer its own marker,
    whatever it passes to the attention beside it; shapes survive slicing and moving, attributes do not. Otherwise
    transformers' own mask for SDPA.
    """
    if attention_mask is None or attention_mask.numel():
        mask: Tensor | None = sdpa_mask(
            *args, attention_mask=attention_mask, mask_function=mask_function, local_size=local_size, **kw
        )
        return mask
    if kw.get("use_vmap"):
        raise NotImplementedError("the model adds a mask rule of its own")
    chunked = 0
    if local_size is not None:  # position W sees position 1 through a window of W, and not across a chunk's border
        chunked = int(not bool(mask_function(0, 0, torch.tensor(local_size), torch.tensor(1))))
    return torch.empty(1, 1 + chunked, 0, local_size or 0, dtype=torch.bool, device=attention_mask.device)


def segments_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Segments | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, D] queries, [1, H_kv, T, D] keys and values -> [1, T, H, D]. Without a layout: an ordinary padded call.

    Raises NotImplementedError for attention it does not know, RuntimeError where the layout was lost on the way.
    """
    odd = [name for name in REFUSED if kwargs.get(name) is not None]
    if odd or (layout is not None and is_causal is False):
        raise NotImplementedError(f"{type(module).__name__}: {odd or 'bidirectional attention'}")
    marked = attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[2] == 0
    if (layout is not None) != marked:
        raise RuntimeError(f"{type(module).__name__}: the layout or its mask was lost on the way")
    if layout is None:
        causal = attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True)
        out = attend(query, key, value, attention_mask, causal, scaling, dropout, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None
    assert attention_mask is not None
    layout.seen += 1
    query, key, value = (lowered(x) for x in (query, key, value))
    chunked, local = attention_mask.shape[1] == 2, attention_mask.shape[3]
    plain = softcap is None and s_aux is None and dropout == 0.0
    if plain and query.device.type == "cpu" and layout.backend == "sdpa":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        made: Any = WrittenOut.apply
        return made(query[0], key[0], value[0], scale, Rule(local, chunked), layout)[None], None
    if plain and layout.backend != "sdpa" and not chunked and query.dtype in (torch.bfloat16, torch.float16):
        kernel = flash_attention if layout.backend == "flash_attention_2" else varlen_attention
        return kernel(query, key, value, layout, scaling, local), None
    return by_segment(query, key, value, layout, (scaling, dropout, softcap, s_aux), local, chunked=chunked), None


def lowered(x: Tensor) -> Tensor:
    """In autocast's format, as the stock kernels are called: beside float32 weights the rotation makes queries and
    keys float32 and leaves values in bfloat16."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, H, L, D]; by PyTorch's kernel where it can, else written out (soft caps and attention sinks)."""
    if softcap is None and sinks is None:
        dtype, gqa = q.dtype, q.shape[1] != k.shape[1]
        if q.device.type == "cpu" and k.shape[2] <= SHORT_ON_CPU:
            q, k, v = q.float(), k.float(), v.float()
            mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        with torch.autocast(q.device.type, enabled=False):  # which would cast back
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout, scale=scaling, enable_gqa=gqa
            )
        return out.to(dtype)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        s = torch.tanh(s / softcap) * softcap
    if causal:
        mask = torch.ones(s.shape[2:], dtype=torch.bool, device=s.device).tril(s.shape[3] - s.shape[2])
    if mask is not None:
        s = s.masked_fill(~mask, torch.finfo(s.dtype).min) if mask.dtype == torch.bool else s + mask
    if sinks is not None:  # one more column that takes probability and gives nothing
        s = torch.cat([s, sinks.view(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1).to(s.dtype)], -1)
    p = s.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
    return F.dropout(p, dropout) @ v


def by_segment(
    query: Tensor, key: Tensor, value: Tensor, layout: Segments, rest: tuple[Any, ...], local: int, *, chunked: bool
) -> Tensor:
    """A loop over segments. One split instead of slices: a slice's backward fills T zeros, once a segment."""
    sizes = [span.stop - span.start for span in layout.spans]
    queries, keys, values = (torch.split(x, sizes, 2) for x in (query, key, value))
    at = {span.start: n for n, span in enumerate(layout.spans)}
    outs = []
    for n, span in enumerate(layout.spans):
        q, k, v = queries[n], keys[n], values[n]
        if span.back_stop > span.back_start:
            back = at[span.back_start]
            k, v = torch.cat([keys[back], k], 2), torch.cat([values[back], v], 2)
        mask = None
        if q.shape[2] != k.shape[2] or 0 < local < k.shape[2]:
            mask = causal_mask(q.shape[2], k.shape[2], Rule(local, chunked), device=q.device)
        outs.append(attend(q, k, v, mask, mask is None, *rest))
    return torch.cat(outs, 2).transpose(1, 2).contiguous()


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Segments, scaling: float | None, local: int
) -> Tensor:
    """All segments in one call of PyTorch's variable-length kernel. Keys are gathered, so that a branch's are its
    prefix's and then its own; the backward of the gather adds the branches' gradients into the prefix."""
    from torch.nn.attention.varlen import varlen_attn

    gather, cu_q, cu_k, longest_q, longest_k = layout.varlen(query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    window = (local - 1, 0) if local else (-1, 0)  # inclusive on both sides; 0 to the right is causal
    gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q.contiguous(), k[gather], v[gather], cu_q, cu_k, longest_q, longest_k,
        scale=scaling, window_size=window, enable_gqa=gqa,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[None]


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: Segments, scaling: float | None, local: int
) -> Tensor:
    """The same through the flash-attn package."""
    from flash_attn import flash_attn_varlen_func

    gather, cu_q, cu_k, longest_q, longest_k = layout.varlen(query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = (local - 1, 0) if local else (-1, -1)
    out: Tensor = flash_attn_varlen_func(
        q.contiguous(), k[gather], v[gather], cu_q, cu_k, longest_q, longest_k,
        softmax_scale=scaling, causal=True, window_size=window,
    )  # fmt: skip
    return out[None]


def register() -> None:
    """Make the attention known to transformers; twice is once."""
    AttentionInterface.register(NAME, segments_attention)
    AttentionMaskInterface.register(NAME, segments_mask)
