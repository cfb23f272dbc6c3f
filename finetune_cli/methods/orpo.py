"""Odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691): likelihood and preference, no reference.

    L = NLL - mean over pairs of beta log sigmoid(log_odds)
    log_odds = (lp_w - lp_l) - (log(1 - e^lp_w) - log(1 - e^lp_l))

lp is the mean over an answer's tokens of log p, w the chosen and l the rejected one (eq. 4 and 7). NLL is the mean over
the tokens of the prompt and the chosen answer, as in the paper's code, over the whole optimiser step.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_cli.methods.base import LearningRates
from finetune_cli.methods.pairwise import Pairwise, averages, live, measured, sums, whole
from finetune_cli.types import Counts, Layout, Loss, Models, Render, Row, Scores

if TYPE_CHECKING:
    from torch import Tensor


def log1mexp(x: "Tensor") -> "Tensor":
    """log(1 - e^x) for x < 0, on the side of -log 2 where it is exact (Maechler 2012); x = 0 is held just below."""
    import torch

    x = x.clamp(max=-1e-30)
    near = x > -math.log(2)  # the side that is not taken gets a harmless value: its gradient would be nan
    close, far = x.masked_fill(~near, -1.0), x.masked_fill(near, -1.0)
    return torch.where(near, (-close.expm1()).log(), (-far.exp()).log1p())


def log_odds(lp_w: "Tensor", lp_l: "Tensor") -> "Tensor":
    """log of (p_w / (1 - p_w)) / (p_l / (1 - p_l))"""
    return (lp_w - lp_l) - (log1mexp(lp_w) - log1mexp(lp_l))


class Orpo(Pairwise):
    """Preference optimisation in one stage, without a reference."""

    name: Literal["orpo"] = "orpo"
    """The method."""
    beta: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the odds ratio beside the likelihood: the paper's lambda."""

    summary: ClassVar = "odds-ratio preference optimisation: learn the chosen answer and away from the rejected one"
    lora_rates: ClassVar = LearningRates(default=2e-5, low=2e-6, high=1e-4)
    full_rates: ClassVar = LearningRates(default=5e-6, low=1e-6, high=1e-5)

    def encode(self, row: Mapping[str, Any], shape: str, render: Render) -> Iterator[Row]:
        for pair in super().encode(row, shape, render):
            yield replace(pair, prefix_trained=True)

    def loss(self, batch: Layout, models: Models, counts: Counts) -> Loss:
        from torch.nn.functional import logsigmoid

        scores: Scores = models("policy", batch)
        pairs = len(batch.rows)
        total_R = sums(scores.logps_N, scores.owner_N, 3 * pairs)  # chosen and rejected in turn, then the prompts
        n_B2 = scores.owner_N.bincount(minlength=3 * pairs)[: 2 * pairs].view(-1, 2).clamp(min=1)
        lp_B2 = total_R[: 2 * pairs].view(-1, 2) / n_B2
        live_B = live(batch, total_R)
        odds_B = log_odds(*(lp_B2 * live_B[:, None] - (1 - live_B[:, None])).unbind(1))
        ratio_B = logsigmoid(odds_B)
        nll = -total_R[: 2 * pairs : 2].sum() - total_R[2 * pairs :].sum()
        total = nll / likely(counts) - self.beta * (ratio_B * live_B).sum() / counts.rows
        reward_B2 = self.beta * lp_B2.detach()
        metrics = averages(
            batch,
            {
                "rewards/chosen": reward_B2[:, 0],
                "rewards/rejected": reward_B2[:, 1],
                "rewards/margins": reward_B2[:, 0] - reward_B2[:, 1],
                "rewards/accuracies": (lp_B2[:, 0] > lp_B2[:, 1]).float(),
                "logps/chosen": lp_B2[:, 0].detach(),
                "logps/rejected": lp_B2[:, 1].detach(),
                "log_odds_ratio": ratio_B.detach(),
                "log_odds_chosen": odds_B.detach(),
            },
        )
        metrics["nll_loss"] = (nll.detach(), likely(batch.counts))
        return Loss(total, metrics | measured(batch, scores) | whole(total, batch, counts))


def likely(counts: Counts) -> int:
    """Tokens that the likelihood is taken on: prompts and chosen answers."""
    return counts.named.get("", 0) + counts.named["chosen"]
