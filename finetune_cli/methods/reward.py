"""Reward models (Bradley and Terry 1952; Christiano et al. 2017, arXiv 1706.03741; InstructGPT, arXiv 2203.02155).

    L = mean over pairs of -log sigmoid(y (r_w - r_l) - margin) + c (r_w + r_l)^2

r is the score at the last token of prompt and answer, found by length: never by "not equal to the pad token", which
reads one token too early wherever a row ends in it. y is 1 where the chosen answer is the better one; with several
scores (`num_labels`) a row may say -1 or 0 for some of them, and the mean is over those it says something of.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_cli.errors import DataError
from finetune_cli.methods.base import LearningRates
from finetune_cli.methods.pairwise import Pairwise, averages, live, whole
from finetune_cli.types import Branch, Counts, Layout, Loss, Models, Render, Rewards, Row

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry(
    r_w: "Tensor", r_l: "Tensor", better: "Tensor", margin: "Tensor", center: float | None = None
) -> "Tensor":
    """Loss of each pair, the mean over the scores of which `better` (1, -1, 0) says something. All [B, K] -> [B]"""
    from torch.nn.functional import logsigmoid

    said = better.abs()
    loss_BK = -logsigmoid(better * (r_w - r_l) - margin) * said
    if center is not None:
        loss_BK = loss_BK + center * (r_w + r_l) ** 2 * said
    return loss_BK.sum(1) / said.sum(1).clamp(min=1)


class Reward(Pairwise):
    """A model that scores answers, learned from pairs."""

    name: Literal["reward"] = "reward"
    """The method."""
    num_labels: Annotated[int, Field(ge=1)] = 1
    """Scores of each answer. Above 1, rows bring a list `label` (1: chosen is better, -1: rejected is, 0: neither) or
    `margin` with a number for each."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] | None = None
    """Weight of (r_w + r_l)^2, which keeps scores around 0 (arXiv 2312.09244); 0.01 is usual."""

    summary: ClassVar = "reward model: a score that is higher for the chosen answer of a pair"
    generates: ClassVar = False
    labelled: ClassVar = True
    lora_rates: ClassVar = LearningRates(default=1e-4, low=1e-5, high=3e-4)
    full_rates: ClassVar = LearningRates(default=1e-5, low=1e-6, high=5e-5)

    def labels(self) -> int | None:
        return self.num_labels

    def encoding(self) -> dict[str, Any]:
        return {"num_labels": self.num_labels}

    def encode(self, row: Mapping[str, Any], shape: str, render: Render) -> Iterator[Row]:
        for pair in super().encode(row, shape, render):
            yield replace(pair, extra=self.attributes(pair.extra))

    def marked(self, row: Row) -> Row:
        """The score is read at the last token of each answer."""
        return replace(row, branches=tuple(replace(branch, trained=last_only(branch)) for branch in row.branches))

    def attributes(self, extra: Mapping[str, float]) -> dict[str, float]:
        """label.k and margin.k for each score. Raises DataError where a row brings another number of them."""
        found: dict[str, float] = {}
        for name, absent in (("label", 1.0), ("margin", 0.0)):
            given = {key: value for key, value in extra.items() if key.partition(".")[0] == name}
            if self.num_labels == 1 and name in given:
                given = {f"{name}.0": given[name]}
            wanted = [f"{name}.{k}" for k in range(self.num_labels)]
            if given and sorted(given) != sorted(wanted):
                raise DataError(
                    f"{name} has {len(given)} values, and method.num_labels is {self.num_labels}",
                    "Give one number for each score.",
                )
            found |= {key: given.get(key, absent) for key in wanted}
        if self.num_labels > 1 and not any(key.partition(".")[0] in ("label", "margin") for key in extra):
            raise DataError(
                f"the row says nothing of its {self.num_labels} scores", "Give a list `label`, or a list `margin`."
            )
        return found

    def loss(self, batch: Layout, models: Models, counts: Counts) -> Loss:
        rewards: Rewards = models("policy", batch)
        r_B2K = rewards.reward_RK.view(len(batch.rows), 2, self.num_labels)
        r_w, r_l = r_B2K[:, 0], r_B2K[:, 1]
        better, margin = (self.given(batch, name, r_w) for name in ("label", "margin"))
        loss_B = bradley_terry(r_w, r_l, better, margin, self.center_rewards_coefficient)
        total = (loss_B * live(batch, loss_B)).sum() / counts.rows
        said = better.abs().sum(1).clamp(min=1)
        gap_BK = (better * (r_w - r_l)).detach()
        metrics = averages(
            batch,
            {
                "accuracy": ((gap_BK > 0) * better.abs()).sum(1) / said,
                "margin": gap_BK.sum(1) / said,
                "mean_reward": r_B2K.detach().mean((1, 2)),
            },
        )
        return Loss(total, metrics | whole(total, batch, counts))

    def given(self, batch: Layout, name: str, like: "Tensor") -> "Tensor":
        """What the rows bring for each score. [B, K]"""
        return like.new_tensor([[row.extra[f"{name}.{k}"] for k in range(self.num_labels)] for row in batch.rows])


def last_only(branch: Branch) -> list[bool]:
    return [False] * (len(branch.ids) - 1) + [True]
