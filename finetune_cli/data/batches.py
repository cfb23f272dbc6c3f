"""Batches: which rows make an optimiser step, and how a batch of rows is laid out as tensors."""

import random
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from finetune_cli.types import Counts, Row


class Segment(NamedTuple):
    """Tokens start..stop of a batch; they also see those of back_start..back_stop (empty: none)."""

    start: int
    stop: int
    back_start: int = 0
    back_stop: int = 0


@dataclass(eq=False, slots=True)
class Segments:
    """The segments of a batch, which tile its tokens in order. Travels through the model as a forward argument."""

    spans: list[Segment]
    backend: str = "sdpa"
    seen: int = 0
    """Attention calls that it reached; doubles where layers run again in backward."""
    made: dict[Any, Any] = field(default_factory=dict)
    """What attention made of them for all its layers."""
    _varlen: tuple[Tensor, Tensor, Tensor, int, int] | None = None

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """(index of keys to gather, cumulative query lengths, cumulative key lengths, longest of each), for kernels
        that take sequences of unequal lengths. Made once a batch."""
        if self._varlen is None:
            queries = [s.stop - s.start for s in self.spans]
            keys = [s.back_stop - s.back_start + s.stop - s.start for s in self.spans]
            gather = [torch.arange(a, b) for s in self.spans for a, b in (s[2:], s[:2]) if b > a]
            cu_q, cu_k = (torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in (queries, keys))
            self._varlen = (torch.cat(gather).to(device), cu_q, cu_k, max(queries), max(keys))
        return self._varlen


@dataclass(slots=True)
class Batch:
    """Rows as tensors. `read_N` says where in the flattened tokens the state is that predicts `label_N`, `owner_N`
    which branch, counted through the batch, each label belongs to.

    Tree: all tokens end to end, [1, T], with segments. Padded: a right-padded sequence for each branch, its row's
    prefix before it, as a stock forward takes it.
    """

    rows: list[Row]
    ids_BT: Tensor
    position_BT: Tensor
    mask_BT: Tensor
    """1 where a token is; under segments empty, [1, 0]."""
    read_N: Tensor
    label_N: Tensor
    owner_N: Tensor
    last_R: Tensor
    """Where in the flattened tokens each branch ends, by its length; where a reward is read."""
    segments: Segments | None = None
    measure: bool = False

    @property
    def counts(self) -> Counts:
        return counts_of(self.rows)

    def to(self, device: torch.device) -> Self:
        for name in ("ids_BT", "position_BT", "mask_BT", "read_N", "label_N", "owner_N", "last_R"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        return self

    @property
    def seen_BT(self) -> Tensor:
        """For each token, the length of the sequence it is part of: what its segment looks back on, and itself."""
        if self.segments is None:
            return self.mask_BT.sum(1, keepdim=True).expand_as(self.mask_BT)
        spans = self.segments.spans
        sizes = torch.tensor([s.stop - s.start for s in spans], device=self.ids_BT.device)
        seen = torch.tensor([s.back_stop - s.back_start + s.stop - s.start for s in spans], device=self.ids_BT.device)
        return seen.repeat_interleave(sizes)[None]

    def inputs(self) -> dict[str, Any]:
        """Arguments of the model's forward. Never a cache: packed rows would be misread with one."""
        given = {"input_ids": self.ids_BT, "attention_mask": self.mask_BT, "use_cache": False}
        if self.segments is None:
            return given
        return {**given, "position_ids": self.position_BT, "layout": self.segments}


def counts_of(rows: Sequence[Row]) -> Counts:
    named = Counter[str]()
    for row in rows:
        named.update(row.named_targets)
    return Counts(rows=sum(row.targets > 0 for row in rows), tokens=named.total(), named=dict(named))


def tree(rows: Sequence[Row], *, backend: str = "sdpa") -> Batch:
    """Every token once: a row's prefix, then its branches, whose positions go on from the prefix."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[Segment] = []
    targets: list[tuple[int, int, int]] = []  # (read, label, owner)
    lasts: list[int] = []
    owner, every = 0, sum(len(row.branches) for row in rows)
    for number, row in enumerate(rows):
        start, length = len(ids), len(row.prefix)
        alone = len(row.branches) == 1  # then prefix and branch are one segment: half the calls
        ids += row.prefix
        positions += range(length)
        if length and not alone:
            spans.append(Segment(start, start + length))
        if row.prefix_trained:
            targets += [(start + t - 1, row.prefix[t], every + number) for t in range(1, length)]
        for branch in row.branches:
            first = len(ids)
            ids += branch.ids
            positions += range(length, length + len(branch.ids))
            if alone:
                spans.append(Segment(start, len(ids)))
            elif branch.ids:
                spans.append(Segment(first, len(ids), start, start + length) if length else Segment(first, len(ids)))
            before = [start + length - 1, *range(first, len(ids) - 1)]  # what predicts each token of the branch
            targets += [
                (before[t], branch.ids[t], owner) for t, trained in enumerate(branch.trained) if trained and length + t
            ]
            lasts.append(len(ids) - 1 if branch.ids else start + length - 1)
            owner += 1
    return Batch(
        list(rows),
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.ones(1, 0, dtype=torch.bool),
        *columns(targets),
        last_R=torch.tensor(lasts),
        segments=Segments(spans, backend),
    )


def columns(targets: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(read, label, owner) triples as three tensors [N], in order of owner."""
    read_N, label_N, owner_N = (
        torch.tensor(sorted(targets, key=lambda target: target[2]), dtype=torch.long).reshape(-1, 3).unbind(1)
    )
    return read_N, label_N, owner_N


def padded(rows: Sequence[Row], pad_id: int) -> Batch:
    """The plain layout. Pads are masked by length, never by id: pad and end-of-sequence may be the same token."""
    sequences = [([*row.prefix, *branch.ids], len(row.prefix), branch) for row in rows for branch in row.branches]
    width = max(len(ids) for ids, _, _ in sequences)
    ids_BT = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), width), dtype=torch.long)
    first_of = [0, *accumulate(len(row.branches) for row in rows)]
    targets = [
        (first_of[number] * width + t - 1, row.prefix[t], len(sequences) + number)
        for number, row in enumerate(rows)
        if row.prefix_trained
        for t in range(1, len(row.prefix))
    ]
    for b, (ids, start, branch) in enumerate(sequences):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = 1
        own = [start + t for t, trained in enumerate(branch.trained) if trained and start + t > 0]
        targets += [(b * width + t - 1, ids[t], b) for t in own]
    positions = torch.arange(width).expand(len(sequences), width)
    lasts = torch.tensor([b * width + len(ids) - 1 for b, (ids, _, _) in enumerate(sequences)])
    return Batch(list(rows), ids_BT, positions, mask_BT, *columns(targets), last_R=lasts)


def pack(lengths: Sequence[int], capacity: int, *, seed: int) -> list[list[int]]:
    """Best-fit decreasing: each row, longest first, goes to the fullest bin that has room. Indices of the rows of each
    bin; rows of one length are taken in an order that `seed` draws."""
    order = list(range(len(lengths)))
    random.Random(f"pack {seed}").shuffle(order)
    order.sort(key=lambda i: -lengths[i])
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for i in order:
        at = bisect_left(rooms, (lengths[i], -1))
        if at == len(rooms):
            bins.append([i])
            insort(rooms, (capacity - lengths[i], len(bins) - 1))
        else:
            room, into = rooms.pop(at)
            bins[into].append(i)
            insort(rooms, (room - lengths[i], into))
    return bins


def silent(row: Row) -> Row:
    """The same row with nothing to learn: what a process computes when a step has no row left for it."""
    branches = tuple(replace(b, trained=[False] * len(b.ids)) for b in row.branches)
    return replace(row, branches=branches, prefix_trained=False)


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimiser step sees; a function of seed and step alone, so that a resumed run sees the same.

    The rows of a step are the same for every split into processes and accumulation steps. They are shared out by their
    tokens, so that processes finish together, and a process takes them by length, so that a batch's rows are alike.
    """

    lengths: Sequence[int]
    global_batch_size: int
    per_device_batch_size: int
    seed: int
    shuffle: bool = True
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.global_batch_size)

    def order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self.lengths)))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._orders.clear()
            self._orders[epoch] = order
        return self._orders[epoch]

    def step(self, step: int) -> list[int]:
        """Indices of the rows of optimiser step `step`, counted from 0 over the run."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.global_batch_size
        return self.order(epoch)[start : start + self.global_batch_size]

    def window(self, step: int, *, rank: int = 0, world: int = 1, part: int = 0, parts: int = 1) -> Iterator[list[int]]:
        """The accumulation window of one process: a list of row indices for each forward; one may be empty. Of `parts`
        updates that share the rows of a step, one."""
        rows, size = self.step(step)[part::parts], self.per_device_batch_size
        forwards = -(-len(rows) // (size * world))
        own = share(rows, self.lengths, world, most=forwards * size)[rank]
        cuts = [-(-len(own) * forward // max(1, forwards)) for forward in range(forwards + 1)]
        yield from (own[start:stop] for start, stop in pairwise(cuts))


def share(rows: Sequence[int], lengths: Sequence[int], world: int, *, most: int) -> list[list[int]]:
    """Rows for each process, at most `most` each, so that all have about as many tokens: the longest first, each to
    the process that has least (Graham 1969, longest processing time first). Each process's rows, longest first."""
    shares: list[list[int]] = [[] for _ in range(world)]
    tokens = [0] * world
    for row in sorted(rows, key=lambda i: (-lengths[i], i)):
        to = min((r for r in range(world) if len(shares[r]) < most), key=lambda r: (tokens[r], len(shares[r])))
        shares[to].append(row)
        tokens[to] += lengths[row]
    return shares
