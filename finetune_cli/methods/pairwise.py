"""What methods on preference pairs share: rows with two branches, and sums of token scores for each side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from finetune_cli.methods.base import Method
from finetune_cli.types import Layout, Render, Row

if TYPE_CHECKING:
    from torch import Tensor


def sums(value_N: "Tensor", owner_N: "Tensor", size: int) -> "Tensor":
    """Sum of the values of each owner. [size]"""
    return value_N.new_zeros(size).index_add(0, owner_N, value_N)


def live(batch: Layout, like: "Tensor") -> "Tensor":
    """1 for pairs that count, 0 for those that a process without rows computes only to keep step. [B]"""
    return like.new_tensor([float(row.targets > 0) for row in batch.rows])


def numbers(batch: Layout, names: Sequence[str], like: "Tensor") -> "Tensor":
    """Numbers that every row brings. [B, len(names)]"""
    return like.new_tensor([[row.extra[name] for name in names] for row in batch.rows])


class Pairwise(Method):
    """A method on pairs of answers to one prompt."""

    shapes: ClassVar = ("pairs",)

    def encoding(self) -> dict[str, Any]:
        return {"name": self.name}

    def encode(self, row: Mapping[str, Any], shape: str, render: Render) -> Iterator[Row]:  # noqa: ARG002
        yield render.pair(row)
