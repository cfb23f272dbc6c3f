"""Which spans of a batch meet in one product of attention on a CPU (`engine/parts.py`), and which rows of scores.

A span is (own, back): its tokens, which see each other causally, and those of an earlier span that they see too.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

BLOCK = 128
"""Queries at a time."""
KEPT = 1024
"""Keys up to which probabilities are kept for backward; beyond, memory counts more and they are computed again."""
SHORT = 192
"""Queries up to which a span is computed beside others. Of eight rows of 94 tokens a product each is 50 million
operations, and takes several times as long as those; of rows of 250, alone and in blocks, it takes less."""
SEEN = 256
"""Keys up to which it is."""
TOGETHER = 96 * KEPT
"""Scores of a head, pads included, up to which spans are put together: about those of a block of a long row."""
FILLED = 0.5
"""Share of them that must not be padding."""

Lengths = tuple[int, int]


def arranged(spans: Sequence[Lengths]) -> Iterator[list[int]]:
    """The numbers of the spans, those together that are computed as one: short ones with others of about their length.

    Spans of the same lengths are not parted: two answers that are equal get equal numbers, to the bit.
    """
    short = [n for n, (own, back) in enumerate(spans) if 0 < own <= SHORT and own + back <= SEEN]
    some: list[int] = []
    longest = widest = real = 0
    for (keys, own), run in groupby(
        sorted(short, key=lambda n: extent(spans[n]), reverse=True), lambda n: extent(spans[n])
    ):
        alike = [*run]
        padded = (len(some) + len(alike)) * max(longest, own) * max(widest, keys)
        if some and (padded > TOGETHER or real + len(alike) * own * keys < FILLED * padded):
            yield some
            some, longest, widest, real = [], 0, 0, 0
        while len(alike) * own * keys > TOGETHER:  # of one length, whatever their number
            many = TOGETHER // (own * keys)
            yield alike[:many]
            alike = alike[many:]
        some, longest, widest = some + alike, max(longest, own), max(widest, keys)
        real += len(alike) * own * keys
    if some:
        yield some
    yield from ([n] for n in sorted({*range(len(spans))} - {*short}))


def extent(span: Lengths) -> tuple[int, int]:
    """(keys, queries)"""
    return sum(span), span[0]


def blocks(own: int, back: int) -> Iterator[tuple[int, int, int]]:
    """Of a span by itself: its queries from..to, and how many of its keys they see, from the first."""
    for start in range(0, own, BLOCK):
        stop = min(start + BLOCK, own)
        yield start, stop, back + stop


def kept_scores(spans: Sequence[Lengths]) -> int:
    """Probabilities of a head that are kept for backward."""
    total = 0
    for some in arranged(spans):
        if len(some) > 1:
            total += len(some) * max(spans[n][0] for n in some) * max(sum(spans[n]) for n in some)
        else:
            total += sum((stop - start) * seen for start, stop, seen in blocks(*spans[some[0]]) if seen <= KEPT)
    return total
