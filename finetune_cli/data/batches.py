"""Batches: which rows make an optimiser step, and how a batch of rows is laid out as tensors."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from finetune_cli.types import Counts, Row


@dataclass(slots=True)
class Batch:
    """Rows as right-padded sequences, one for each branch: its row's prefix, then the branch.

    The tensors are what a stock forward takes; `read_N` says where in the flattened [B * T] the state is that
    predicts `label_N`, and `owner_N` which branch, counted through the batch, each label belongs to.
    """

    rows: list[Row]
    ids_BT: Tensor
    mask_BT: Tensor
    read_N: Tensor
    label_N: Tensor
    owner_N: Tensor
    measure: bool = False

    @property
    def counts(self) -> Counts:
        return counts_of(self.rows)

    def to(self, device: torch.device) -> Self:
        for name in ("ids_BT", "mask_BT", "read_N", "label_N", "owner_N"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        return self


def counts_of(rows: Sequence[Row]) -> Counts:
    return Counts(rows=len(rows), tokens=sum(row.targets for row in rows))


def padded(rows: Sequence[Row], pad_id: int) -> Batch:
    """The plain layout. Pads are masked by length, never by id: pad and end-of-sequence may be the same token."""
    sequences = [([*row.prefix, *branch.ids], len(row.prefix), branch) for row in rows for branch in row.branches]
    width = max(len(ids) for ids, _, _ in sequences)
    ids_BT = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), width), dtype=torch.long)
    read, label, owner = [], [], []
    for b, (ids, start, branch) in enumerate(sequences):
        ids_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = 1
        targets = [start + t for t, trained in enumerate(branch.trained) if trained and start + t > 0]
        read += [b * width + t - 1 for t in targets]
        label += [ids[t] for t in targets]
        owner += [b] * len(targets)
    read_N, label_N, owner_N = (torch.tensor(values, dtype=torch.long) for values in (read, label, owner))
    return Batch(list(rows), ids_BT, mask_BT, read_N, label_N, owner_N)


def silent(row: Row) -> Row:
    """The same row with nothing to learn: what a process computes when a step has no row left for it."""
    return replace(row, branches=tuple(replace(b, trained=[False] * len(b.ids)) for b in row.branches))


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimiser step sees; a function of seed and step alone, so that a resumed run sees the same.

    The rows of a step are the same for every split into processes and accumulation steps. Within a step they are
    sorted by length before they are dealt out, so that a batch's rows are alike and processes finish together.
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

    def window(self, step: int, *, rank: int = 0, world: int = 1) -> Iterator[list[int]]:
        """The accumulation window of one process: a list of row indices for each forward; one may be empty."""
        rows = sorted(self.step(step), key=lambda i: (-self.lengths[i], i))
        size = self.per_device_batch_size
        forwards = -(-len(rows) // (size * world))
        for forward in range(forwards):
            rest = rows[forward * size * world : (forward + 1) * size * world]
            yield rest[rank::world]
