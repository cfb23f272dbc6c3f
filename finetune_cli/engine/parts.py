"""What of a batch meets in one product of attention: a block of queries of a long span, or short spans side by side.

Shape letters: B problems of a product, each with keys of its own: the K key heads of a span, or those of N spans; G
heads that share keys; L queries, S keys that they see, M = G L the rows of a problem.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finetune_cli.data.batches import Segment, Segments
from finetune_cli.plan.arrangement import arranged, blocks


class Rule(NamedTuple):
    """Which earlier keys a query sees: all (`local` 0), the last `local`, or those of its own chunk of `local`."""

    local: int
    chunked: bool


class Block(NamedTuple):
    """Queries start..stop of a part, and how many of its keys they see, from the first."""

    start: int
    stop: int
    seen: int

    @property
    def scores(self) -> int:
        return (self.stop - self.start) * self.seen


class Alone:
    """A span by itself, block by block of its queries: the scores fit into the cache, and only keys that come before
    are multiplied."""

    count = 1

    def __init__(self, span: Segment) -> None:
        self.span = span

    def blocks(self) -> Iterator[Block]:
        for start, stop, seen in blocks(*lengths(self.span)):
            yield Block(self.span.start + start, self.span.start + stop, seen)

    def rows(self, x_KGTD: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
        """Those of a block, as they are multiplied. [B, M, D]"""
        some = x_KGTD[:, :, block.start : block.stop]
        return torch.empty(some.shape, dtype=dtype, device=some.device).copy_(some).flatten(1, 2)

    def put(self, x_KGTD: Tensor, block: Block, part_BMD: Tensor) -> None:
        """The reverse of `rows`."""
        x_KGTD[:, :, block.start : block.stop] = part_BMD.view(*x_KGTD.shape[:2], -1, part_BMD.shape[2])

    def keys(self, x_KTD: Tensor) -> Tensor:
        """Of all tokens, those that queries may look at. [B, S, D]"""
        start, stop, back_start, back_stop = self.span
        own = x_KTD[:, start:stop]
        return own if back_start == back_stop else torch.cat((x_KTD[:, back_start:back_stop], own), 1)

    def add_keys(self, x_KTD: Tensor, part_BSD: Tensor) -> None:
        """The reverse of `keys`."""
        start, stop, back_start, back_stop = self.span
        back = back_stop - back_start
        if back:
            x_KTD[:, back_start:back_stop] += part_BSD[:, :back]
        x_KTD[:, start:stop] += part_BSD[:, back:]

    def hide(self, scores_BMS: Tensor, block: Block, rule: Rule, layout: Segments) -> None:
        """Minus infinity for keys that a query does not see; the queries are the last of the keys' positions."""
        queries, seen = block.stop - block.start, block.seen
        near = queries if rule.local == 0 else seen  # earlier keys are all seen
        key = (queries, near, rule)
        if key not in layout.made:
            layout.made[key] = added(causal_mask(queries, near, rule, device=scores_BMS.device), scores_BMS.dtype)
        scores_BMS.view(scores_BMS.shape[0], -1, queries, seen)[..., seen - near :] += layout.made[key]


class Together:
    """N short spans, padded to one length: what goes on around their products takes longer than they do."""

    def __init__(self, spans: list[Segment]) -> None:
        self.spans = spans
        self.count = len(spans)
        own, keys = zip(*((own, own + back) for own, back in map(lengths, spans)), strict=True)
        self.block = Block(0, max(own), max(keys))

    def blocks(self) -> Iterator[Block]:
        yield self.block

    def rows(self, x_KGTD: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
        kv_heads, group, _, size = x_KGTD.shape
        made_NKGLD = torch.zeros(self.count, kv_heads, group, block.stop, size, dtype=dtype, device=x_KGTD.device)
        for n, span in enumerate(self.spans):
            made_NKGLD[n, :, :, : span.stop - span.start] = x_KGTD[:, :, span.start : span.stop]
        return made_NKGLD.view(self.count * kv_heads, -1, size)

    def put(self, x_KGTD: Tensor, block: Block, part_BMD: Tensor) -> None:
        part_NKGLD = part_BMD.view(self.count, *x_KGTD.shape[:2], block.stop, part_BMD.shape[2])
        for n, span in enumerate(self.spans):
            x_KGTD[:, :, span.start : span.stop] = part_NKGLD[n, :, :, : span.stop - span.start]

    def keys(self, x_KTD: Tensor) -> Tensor:
        kv_heads, _, size = x_KTD.shape
        made_NKSD = x_KTD.new_zeros(self.count, kv_heads, self.block.seen, size)
        for n, (start, stop, back_start, back_stop) in enumerate(self.spans):
            back = back_stop - back_start
            if back:
                made_NKSD[n, :, :back] = x_KTD[:, back_start:back_stop]
            made_NKSD[n, :, back : back + stop - start] = x_KTD[:, start:stop]
        return made_NKSD.flatten(0, 1)

    def add_keys(self, x_KTD: Tensor, part_BSD: Tensor) -> None:
        part_NKSD = part_BSD.view(self.count, -1, *part_BSD.shape[1:])
        for n, (start, stop, back_start, back_stop) in enumerate(self.spans):
            back = back_stop - back_start
            if back:
                x_KTD[:, back_start:back_stop] += part_NKSD[n, :, :back]
            x_KTD[:, start:stop] += part_NKSD[n, :, back : back + stop - start]

    def hide(self, scores_BMS: Tensor, block: Block, rule: Rule, layout: Segments) -> None:
        """Pads among the queries see everything: their rows are numbers, which nobody reads."""
        key = (id(self), rule)
        if key not in layout.made:
            seen_NLS = torch.ones(self.count, block.stop, block.seen, dtype=torch.bool, device=scores_BMS.device)
            for n, span in enumerate(self.spans):
                own, back = lengths(span)
                seen_NLS[n, :own, own + back :] = False
                seen_NLS[n, :own, : own + back] = causal_mask(own, own + back, rule, device=scores_BMS.device)
            layout.made[key] = added(seen_NLS, scores_BMS.dtype)[:, None]
        scores_BMS.view(self.count, -1, block.stop, block.seen).add_(layout.made[key])


Part = Alone | Together


def lengths(span: Segment) -> tuple[int, int]:
    """(its own tokens, those that it looks back on)"""
    return span.stop - span.start, span.back_stop - span.back_start


def parts(layout: Segments) -> list[Any]:
    """Every span of a batch in one of them. Made once a batch."""
    if "parts" not in layout.made:
        some = ([layout.spans[n] for n in numbers] for numbers in arranged([*map(lengths, layout.spans)]))
        layout.made["parts"] = [Together(spans) if len(spans) > 1 else Alone(spans[0]) for spans in some]
    return layout.made["parts"]  # type: ignore[no-any-return]


def causal_mask(queries: int, keys: int, rule: Rule, *, device: torch.device) -> Tensor:
    """[L, S], True where query i (the last L of S positions) sees key j."""
    i, j = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)[None]
    mask = j <= i
    if rule.local:
        mask = mask & ((i // rule.local == j // rule.local) if rule.chunked else (i - j < rule.local))
    return mask


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What hides where a mask is False, when it is added to scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
