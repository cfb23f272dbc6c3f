"""What methods on preference pairs share: rows with two branches, and sums of token scores for each side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from finetune_cli.errors import DataError
from finetune_cli.methods.base import Method
from finetune_cli.types import Counts, Layout, Render, Row, Scores

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


def averages(batch: Layout, values: Mapping[str, "Tensor"]) -> dict[str, Any]:
    """Numbers of each pair [B] as (sum, count), as they are logged."""
    return {name: ((value * live(batch, value)).sum(), batch.counts.rows) for name, value in values.items()}


def whole(total: "Tensor", batch: Layout, counts: Counts) -> dict[str, Any]:
    """The loss as it is logged: shares add up to it within a step, steps count by their pairs."""
    return {"loss": (total.detach() * counts.rows, batch.counts.rows)}


def measured(batch: Layout, scores: Scores) -> dict[str, Any]:
    """Entropy over both answers, accuracy over the chosen ones, as TRL has them."""
    if scores.correct_N is None or scores.entropy_N is None:
        return {}
    chosen_N = (scores.owner_N % 2 == 0) & (scores.owner_N < 2 * len(batch.rows))
    return {
        "entropy": (scores.entropy_N.sum(), batch.counts.tokens),
        "mean_token_accuracy": (scores.correct_N[chosen_N].sum(), batch.counts.named["chosen"]),
    }


class Pairwise(Method):
    """A method on pairs of answers to one prompt."""

    shapes: ClassVar = ("pairs",)
    labelled: ClassVar[bool] = False
    """Whether a column `label` may say that the rejected answer is the better one."""
    branches: ClassVar = 2

    def encoding(self) -> dict[str, Any]:
        return {"name": self.name}

    def encode(self, row: Mapping[str, Any], shape: str, render: Render) -> Iterator[Row]:  # noqa: ARG002
        if not self.labelled and any(key.partition(".")[0] == "label" and value != 1 for key, value in row.items()):
            raise DataError(
                f"label says that chosen is not the better answer, which {self.name} does not read",
                "Swap chosen and rejected in such rows, or leave them out.",
            )
        return render.pair(row)
