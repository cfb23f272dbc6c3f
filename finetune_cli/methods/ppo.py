"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) as InstructGPT has it (arXiv 2203.02155).

An answer y of T tokens to a prompt x gets the reward

    R_t = -kl_coef KL_t + [t = T] score(x, y)

with KL_t an estimate of how far the policy has gone from the reference at token t. Generalised advantage estimation
(arXiv 1506.02438, eq. 16) makes of it, with the critic's V_t = V(x, y_<t) and V_{T+1} = 0,

    A_t = sum_{l >= 0} (gamma lam)^l delta_{t+l},    delta_t = R_t + gamma V_{t+1} - V_t

With rho_t = pi(y_t) / pi_old(y_t) and A whitened over all tokens of the step, the losses of the policy (eq. 7) and of
the critic are means over tokens of

    max(-A rho, -A clip(rho, 1 - cliprange, 1 + cliprange))
    vf_coef/2 max((V - G)^2, (clip(V, V_old +- cliprange_value) - G)^2),    G = A + V_old (A before it is whitened)
"""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_cli.methods.base import LearningRates
from finetune_cli.methods.online import Credit, Online, Rollout, Total, told
from finetune_cli.types import Counts, Layout, Loss, Models, Scores

if TYPE_CHECKING:
    from torch import Tensor


def divergence(logps: "Tensor", ref_logps: "Tensor", kind: str) -> "Tensor":
    """KL(policy | reference) at each token, estimated from the token that was drawn (Schulman 2020,
    http://joschu.net/blog/kl-approx.html): k1 is unbiased, k3 too and never negative. The shape of its arguments."""
    log_ratio = logps - ref_logps
    if kind == "k1":
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    k2, k3 = log_ratio**2 / 2, (-log_ratio).exp() - 1 + log_ratio
    return k2 if kind == "k2" else k3


def token_rewards(kl_RT: "Tensor", score_R: "Tensor", mask_RT: "Tensor", kl_coef: float) -> "Tensor":
    """The price of divergence at every token, and the score at the last token of the answer. [R, T]"""
    reward_RT = -kl_coef * kl_RT * mask_RT
    last_R1 = mask_RT.sum(1, keepdim=True).long() - 1
    return reward_RT.scatter_add(1, last_R1, score_R[:, None])


def gae(reward_RT: "Tensor", value_RT: "Tensor", gamma: float, lam: float) -> "Tensor":
    """Advantages; rewards and values are zero behind the end of an answer, and so are they. [R, T]"""
    import torch

    advantage_RT = torch.zeros_like(value_RT)
    after_R = next_value_R = torch.zeros_like(value_RT[:, 0])
    for t in reversed(range(value_RT.shape[1])):
        delta_R = reward_RT[:, t] + gamma * next_value_R - value_RT[:, t]
        after_R = delta_R + gamma * lam * after_R
        advantage_RT[:, t], next_value_R = after_R, value_RT[:, t]
    return advantage_RT


def moments(x_RT: "Tensor", mask_RT: "Tensor", total: Total) -> tuple[float, float]:
    """Mean and variance (over n - 1, as TRL has it) of the real tokens of all processes."""
    import torch

    def summed(x: "Tensor") -> float:
        return float(total((x * mask_RT).sum(dtype=torch.float64)))

    count = summed(torch.ones_like(x_RT))
    mean = summed(x_RT) / max(1.0, count)
    return mean, summed((x_RT - mean) ** 2) / max(1.0, count - 1)


def whiten(x_RT: "Tensor", mask_RT: "Tensor", total: Total, *, shift: bool = True) -> "Tensor":
    """Variance 1 and, with `shift`, mean 0 over the real tokens of all processes; zero elsewhere. [R, T]"""
    mean, variance = moments(x_RT, mask_RT, total)
    return ((x_RT - mean) / math.sqrt(variance + 1e-8) + (0.0 if shift else mean)) * mask_RT


def clipped_policy(ratio: "Tensor", advantage: "Tensor", cliprange: float) -> tuple["Tensor", "Tensor"]:
    """(loss of each token, whether the clipped side was the larger)."""
    plain, clipped = -advantage * ratio, -advantage * ratio.clamp(1 - cliprange, 1 + cliprange)
    return plain.maximum(clipped), (clipped > plain).to(ratio.dtype)


def clipped_value(
    value: "Tensor", old: "Tensor", returns: "Tensor", cliprange_value: float
) -> tuple["Tensor", "Tensor"]:
    """(half the squared error of each token, whether the clipped side was the larger)."""
    plain = (value - returns) ** 2
    clipped = (value.clamp(old - cliprange_value, old + cliprange_value) - returns) ** 2
    return plain.maximum(clipped) / 2, (clipped > plain).to(value.dtype)


class Ppo(Online):
    """Answers are drawn, judged, and made more likely where they are worth more than was expected of them."""

    name: Literal["ppo"] = "ppo"
    """The method."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Price of a nat of divergence from the reference."""
    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """How it is estimated from the token drawn: log ratio r = log pi / pi_ref, |r|, r^2 / 2, or e^-r - 1 + r."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """Learn from the answers of a step no more once an update finds the policy this far from the one that gave them
    (`policy/approxkl`); 0.01 to 0.1 is usual."""
    cliprange: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Change of a token's probability, as a share, beyond which nothing more is gained."""
    cliprange_value: Annotated[float, Field(gt=0)] = 0.2
    """The same for the critic's value, in units of the reward."""
    vf_coef: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the critic's loss."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Discount of later rewards."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """lambda of generalised advantage estimation: 1 trusts the rewards, 0 the critic."""
    num_ppo_epochs: Annotated[int, Field(ge=1)] = 4
    """Times that the answers of a step are learned from."""
    num_mini_batches: Annotated[int, Field(ge=1)] = 1
    """Optimiser updates that they are split into each time."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation in the step."""

    summary: ClassVar = "proximal policy optimisation: answers of its own, worth what a model or a function says"
    roles: ClassVar = ("policy", "reference", "value", "reward")
    lora_rates: ClassVar = LearningRates(default=1e-5, low=1e-6, high=5e-5)
    full_rates: ClassVar = LearningRates(default=1e-6, low=1e-7, high=1e-5)

    @property
    def epochs(self) -> int:
        return self.num_ppo_epochs

    @property
    def parts(self) -> int:
        return self.num_mini_batches

    def enough(self, found: Mapping[str, float]) -> bool:
        return self.target_kl is not None and found["policy/approxkl_avg"] > self.target_kl

    def credit(self, x: Rollout, total: Total) -> Credit:
        kl_RT = divergence(x.logps_RT, x.ref_logps_RT, self.kl_estimator) * x.mask_RT
        score_R = self.paid(x.score_R, ended=x.ended_R)
        reward_RT = token_rewards(kl_RT, score_R, x.mask_RT, self.kl_coef)
        if self.whiten_rewards:
            reward_RT = whiten(reward_RT, x.mask_RT, total, shift=False)
        advantage_RT = gae(reward_RT, x.values_RT, self.gamma, self.lam)
        returns_RT = advantage_RT + x.values_RT
        numbers = {
            "logps": x.logps_RT,
            "values": x.values_RT,
            "advantages": whiten(advantage_RT, x.mask_RT, total),
            "returns": returns_RT,
        }
        left, every = (moments(y, x.mask_RT, total)[1] for y in (advantage_RT, returns_RT))
        paid_R, count = -self.kl_coef * kl_RT.sum(1), len(score_R)
        per_answer = {
            "objective/kl": kl_RT.sum(1),
            "objective/entropy": -(x.logps_RT * x.mask_RT).sum(1),
            "objective/non_score_reward": paid_R,
            "objective/rlhf_reward": paid_R + score_R,
            "objective/scores": score_R,
        }
        metrics: dict[str, Any] = {name: (value_R.sum(), count) for name, value_R in per_answer.items()}
        # 1 where the critic knew every return beforehand, 0 where it knew no more than their mean
        metrics["val/explained_variance"] = (1 - left / every, 1) if every else (0.0, 1)
        return Credit(numbers, metrics)

    def losses(self, batch: Layout, models: Models, counts: Counts) -> Iterator[Loss]:
        yield self.policy_loss(batch, models("policy", batch), counts)
        yield self.value_loss(batch, models("value", batch), counts)

    def policy_loss(self, batch: Layout, scores: Scores, counts: Counts) -> Loss:
        old_N, advantage_N = (told(batch, name, scores.logps_N) for name in ("logps", "advantages"))
        log_ratio_N = scores.logps_N - old_N
        ratio_N = log_ratio_N.exp()
        loss_N, clipped_N = clipped_policy(ratio_N, advantage_N, self.cliprange)
        count, total = batch.counts.tokens, loss_N.sum()
        off_N = log_ratio_N.detach()
        per_token = {
            "loss": loss_N.detach(),
            "loss/policy_avg": loss_N.detach(),
            "policy/approxkl_avg": off_N**2 / 2,
            "policy/clipfrac_avg": clipped_N.detach(),
            "val/ratio": ratio_N.detach(),
        }
        if scores.entropy_N is not None:
            per_token["policy/entropy_avg"] = scores.entropy_N
        return Loss(total / counts.tokens, {name: (value_N.sum(), count) for name, value_N in per_token.items()})

    def value_loss(self, batch: Layout, value_N: "Tensor", counts: Counts) -> Loss:
        old_N, returns_N = (told(batch, name, value_N) for name in ("values", "returns"))
        loss_N, clipped_N = clipped_value(value_N, old_N, returns_N, self.cliprange_value)
        count, total = batch.counts.tokens, self.vf_coef * loss_N.sum()
        return Loss(
            total / counts.tokens,
            {
                "loss": (total.detach(), 0),
                "loss/value_avg": (loss_N.detach().sum(), count),
                "val/clipfrac_avg": (clipped_N.sum(), count),
            },
        )
