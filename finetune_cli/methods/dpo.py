"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and the losses that descend from it.

    L = mean over pairs of -log sigmoid(beta ((log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))))

Notation below: w is the chosen answer, l the rejected one, lp = log pi(y|x) summed over the answer's tokens, a = lp -
lp_ref (the implicit reward over beta), s = f'(e^a) the same under an f-divergence (s = a for reverse KL), n the
answer's tokens, u = beta (s_w - s_l), eps the label smoothing. Every loss is a function [B] -> [B], a number for each
pair; the mean is over the pairs of the whole optimiser step, whatever the batches and processes they lie in.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from finetune_cli.methods.base import LearningRates, Reference, Shape, Start
from finetune_cli.methods.pairwise import Pairwise, averages, live, measured, numbers, sums, whole
from finetune_cli.spec import InputPath, OneOrMany
from finetune_cli.types import Counts, Layout, Loss, Models, Scores

if TYPE_CHECKING:
    from torch import Tensor

LossType = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
BY_DIVERGENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
"""Losses that an f-divergence other than reverse KL has a meaning for."""


@dataclass(frozen=True)
class Pairs:
    """The quantities of the notation, each [B]."""

    lp_w: "Tensor"
    lp_l: "Tensor"
    ref_w: "Tensor"
    ref_l: "Tensor"
    a_w: "Tensor"
    a_l: "Tensor"
    s_w: "Tensor"
    s_l: "Tensor"
    n_w: "Tensor"
    n_l: "Tensor"
    nll_w: "Tensor" = field(kw_only=True)
    """-log pi(y_w|x) over all chosen tokens, whatever ld_alpha says."""


# ── losses ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sigmoid(u: "Tensor", eps: float) -> "Tensor":
    """DPO, eq. 7; with eps > 0 conservative DPO (Mitchell 2023): labels are wrong with probability eps.

    -(1 - eps) log sigmoid(u) - eps log sigmoid(-u)
    """
    from torch.nn.functional import logsigmoid

    return -(1 - eps) * logsigmoid(u) - eps * logsigmoid(-u)


def hinge(u: "Tensor") -> "Tensor":
    """SLiC-HF (arXiv 2305.10425), RSO (arXiv 2309.06657). max(0, 1 - u)"""
    return (1 - u).relu()


def ipo(s_w: "Tensor", s_l: "Tensor", n_w: "Tensor", n_l: "Tensor", beta: float) -> "Tensor":
    """IPO (arXiv 2310.12036), eq. 17, with its authors' means over tokens. (s_w / n_w - s_l / n_l - 1 / (2 beta))^2"""
    return (s_w / n_w - s_l / n_l - 1 / (2 * beta)) ** 2


def exo_pair(u: "Tensor", eps: float) -> "Tensor":
    """EXO (arXiv 2402.00856), eq. 16: reverse KL between the policy's and the labels' preference, eps > 0.

    sigmoid(u) (log sigmoid(u) - log(1 - eps)) + sigmoid(-u) (log sigmoid(-u) - log eps)
    """
    from torch.nn.functional import logsigmoid

    return u.sigmoid() * (logsigmoid(u) - math.log(1 - eps)) + (-u).sigmoid() * (logsigmoid(-u) - math.log(eps))


def nca_pair(r_w: "Tensor", r_l: "Tensor") -> "Tensor":
    """NCA (arXiv 2402.05369) for pairs. -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2"""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(r_w) - 0.5 * logsigmoid(-r_w) - 0.5 * logsigmoid(-r_l)


def robust(u: "Tensor", eps: float) -> "Tensor":
    """Robust DPO (arXiv 2403.00409): unbiased where labels are flipped with probability eps < 1/2.

    (-(1 - eps) log sigmoid(u) + eps log sigmoid(-u)) / (1 - 2 eps)
    """
    from torch.nn.functional import logsigmoid

    return (-(1 - eps) * logsigmoid(u) + eps * logsigmoid(-u)) / (1 - 2 * eps)


def bco_pair(r_w: "Tensor", r_l: "Tensor") -> "Tensor":
    """BCO (arXiv 2404.04656) without the running mean. -log sigmoid(r_w) - log sigmoid(-r_l)"""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(r_w) - logsigmoid(-r_l)


def sppo_hard(a_w: "Tensor", a_l: "Tensor", beta: float) -> "Tensor":
    """SPPO (arXiv 2405.00675), eq. 4.7, with certain labels. (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2"""
    return (a_w - 0.5 / beta) ** 2 + (a_l + 0.5 / beta) ** 2


def aot(d: "Tensor", e: "Tensor", beta: float, eps: float) -> "Tensor":
    """AOT (arXiv 2406.05882): the sorted d against the sorted e, over the pairs of one forward.

    Paired: d = lp_w - lp_l, e = the same of the reference. Unpaired: d = a_w, e = a_l.
    """
    return sigmoid(beta * (d.sort().values - e.sort().values), eps)


def apo_zero(r_w: "Tensor", r_l: "Tensor") -> "Tensor":
    """APO (arXiv 2408.06266), eq. 7: chosen up, rejected down. 1 - sigmoid(r_w) + sigmoid(r_l)"""
    return 1 - r_w.sigmoid() + r_l.sigmoid()


def apo_down(r_w: "Tensor", r_l: "Tensor") -> "Tensor":
    """APO, eq. 8: both down, rejected more. sigmoid(r_w) + 1 - sigmoid(r_w - r_l)"""
    return r_w.sigmoid() + 1 - (r_w - r_l).sigmoid()


def discopop(u: "Tensor", tau: float) -> "Tensor":
    """DiscoPOP (arXiv 2406.08414), eq. 5. m = sigmoid(u / tau): -log sigmoid(u) (1 - m) + e^-u m"""
    from torch.nn.functional import logsigmoid

    m = (u / tau).sigmoid()
    return -logsigmoid(u) * (1 - m) + (-u).clamp(max=80).exp() * m  # beyond it there is no float32


def sigmoid_norm(s_w: "Tensor", s_l: "Tensor", n_w: "Tensor", n_l: "Tensor", beta: float) -> "Tensor":
    """DPO on means over tokens (SimPO, arXiv 2405.14734, with a reference). -log sigmoid(beta (s_w/n_w - s_l/n_l))"""
    return sigmoid(beta * (s_w / n_w - s_l / n_l), 0.0)


LOSSES: dict[str, Callable[[Pairs, "Dpo"], "Tensor"]] = {
    "sigmoid": lambda x, k: sigmoid(k.beta * (x.s_w - x.s_l), k.label_smoothing),
    "hinge": lambda x, k: hinge(k.beta * (x.s_w - x.s_l)),
    "ipo": lambda x, k: ipo(x.s_w, x.s_l, x.n_w, x.n_l, k.beta),
    "exo_pair": lambda x, k: exo_pair(k.beta * (x.s_w - x.s_l), k.label_smoothing),
    "nca_pair": lambda x, k: nca_pair(k.beta * x.a_w, k.beta * x.a_l),
    "robust": lambda x, k: robust(k.beta * (x.s_w - x.s_l), k.label_smoothing),
    "bco_pair": lambda x, k: bco_pair(k.beta * x.a_w, k.beta * x.a_l),
    "sppo_hard": lambda x, k: sppo_hard(x.a_w, x.a_l, k.beta),
    "aot": lambda x, k: aot(x.lp_w - x.lp_l, x.ref_w - x.ref_l, k.beta, k.label_smoothing),
    "aot_unpaired": lambda x, k: aot(x.a_w, x.a_l, k.beta, k.label_smoothing),
    "apo_zero": lambda x, k: apo_zero(k.beta * x.a_w, k.beta * x.a_l),
    "apo_down": lambda x, k: apo_down(k.beta * x.a_w, k.beta * x.a_l),
    "discopop": lambda x, k: discopop(k.beta * (x.s_w - x.s_l), k.discopop_tau),
    "sft": lambda x, _: x.nll_w,
    "sigmoid_norm": lambda x, k: sigmoid_norm(x.s_w, x.s_l, x.n_w, x.n_l, k.beta),
}
"""The loss of each pair. Of `sft` it is a sum over tokens, which `Dpo.per_pair` divides by the tokens of the step."""


def divergence(a: "Tensor", kind: str, alpha: float) -> "Tensor":
    """s = f'(e^a), a constant aside (f-DPO, arXiv 2309.16240). An exponent above 80 has no float32."""
    from torch.nn.functional import logsigmoid

    if kind == "forward_kl":
        return 1 - (-a).clamp(max=80).exp()
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(a)
    if kind == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return (((alpha - 1) * a).clamp(max=80).exp() - 1) / (alpha - 1)
    return a


# ── the method ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Dpo(Pairwise):
    """Preference optimisation against a frozen reference."""

    name: Literal["dpo"] = "dpo"
    """The method."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How closely the policy keeps to the reference; for ipo and sppo_hard the regularisation."""
    loss_type: Annotated[list[LossType], OneOrMany(), Field(min_length=1)] = ["sigmoid"]
    """The loss, or several that are added with `loss_weights`. aot and aot_unpaired sort the pairs of one forward
    (`train.per_device_train_batch_size` of them): they are the one loss that changes with how a step is split."""
    loss_weights: list[float] | None = None
    """Weight of each loss of `loss_type`; 1 each where it is not given."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that a label is wrong: of sigmoid (cDPO), robust, aot and, above 0, exo_pair."""
    ref_model: Annotated[str, InputPath()] | None = None
    """The reference. Not given: what the policy is at its start, that is the model with the adapter off, or a frozen
    copy of the starting adapter or model. `start` says the same of an adapter; else a path or hub id."""
    precompute_ref_log_probs: bool | Literal["auto"] = "auto"
    """Compute the reference's log-probabilities before training, keep them on disk for later runs, and hold no second
    model. `auto`: in full fine-tuning, for another model, and where rows are seen more than once."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411); 1 or not given: full."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """The divergence from the reference that is regularised (f-DPO, arXiv 2309.16240)."""
    f_alpha_divergence_coef: float = 0.5
    """alpha of alpha_divergence."""
    use_weighting: bool = False
    """Weigh each pair by how likely the policy is to give its answers (WPO, arXiv 2406.11827)."""
    discopop_tau: Annotated[float, Field(gt=0)] = 0.05
    """Temperature of discopop."""
    sync_ref_model: bool = False
    """Move the reference towards the policy as it learns (TR-DPO, arXiv 2404.09656)."""
    ref_model_mixup_alpha: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Share of the policy in each move of `sync_ref_model`; 1 replaces the reference."""
    ref_model_sync_steps: Annotated[int, Field(ge=1)] = 512
    """Optimiser steps between moves of `sync_ref_model`."""

    summary: ClassVar = "direct preference optimisation: prefer the chosen answer of a pair, close to a reference"
    roles: ClassVar = ("policy", "reference")
    remembers: ClassVar = ("ref_chosen_logps", "ref_rejected_logps")
    lora_rates: ClassVar = LearningRates(default=5e-6, low=1e-6, high=5e-5)
    full_rates: ClassVar = LearningRates(default=5e-7, low=1e-7, high=5e-6)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} values, loss_type {len(self.loss_type)}")
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("loss_type exo_pair needs label_smoothing above 0; the paper uses 1e-3")
        odd = [kind for kind in self.loss_type if kind not in BY_DIVERGENCE]
        if self.f_divergence_type != "reverse_kl" and odd:
            raise ValueError(f"f_divergence_type {self.f_divergence_type} has no meaning for loss_type {odd[0]}")
        if self.use_weighting and any(kind.startswith("aot") for kind in self.loss_type):
            raise ValueError("use_weighting weighs pairs, and the terms of aot are sorted: they belong to none")
        if self.sync_ref_model and self.precompute_ref_log_probs is True:
            raise ValueError("sync_ref_model moves the reference, so precompute_ref_log_probs cannot be true")
        if self.sync_ref_model and self.ref_model not in (None, "start"):
            raise ValueError("sync_ref_model moves a copy of the policy; remove ref_model")
        return self

    def misfits(self, shape: Shape) -> Iterator[tuple[str, str, str]]:
        sorting = [kind for kind in self.loss_type if kind.startswith("aot")]
        if sorting and (shape.forwards > 1 or shape.rows == 1):
            said = (
                f"{sorting[0]} sorts the {shape.rows} pairs of each forward apart; a step has {shape.forwards} of them"
            )
            yield "method.loss_type", said, "warning"
        if self.sync_ref_model and shape.adapters and self.ref_model_mixup_alpha < 1:
            said = "a mixture of two adapters' factors is not the mixture of the models; with adapters it must be 1"
            yield "method.ref_model_mixup_alpha", said, "error"

    def token_agreement(self) -> bool:
        return self.use_weighting

    def reference(self, start: Start) -> Reference:
        """What the policy is at its start, unless another model is named; the base of a brought adapter is no other."""
        named = self.ref_model if self.ref_model != "start" else None
        off = start.neutral if named is None else named == start.base
        other = None if off else named
        kind: Any = "model" if other else "adapter off" if off and not self.sync_ref_model else "start"
        reason = (
            (False, "sync_ref_model moves it") if self.sync_ref_model
            else (True, "so that no second model is held") if other or start.trains == "all weights"
            else (True, f"each pair is seen {start.passes:g} times") if (start.passes or 0) > 1
            else (False, "each pair is seen once" if start.passes else "the run counts steps")
        )  # fmt: skip
        if self.precompute_ref_log_probs != "auto":
            reason = self.precompute_ref_log_probs, "method.precompute_ref_log_probs"
        moves: Any = (
            {"sync_steps": self.ref_model_sync_steps, "sync_alpha": self.ref_model_mixup_alpha}
            if self.sync_ref_model
            else {}
        )
        same = kind == "start" or (kind == "adapter off" and start.neutral)
        return Reference(kind=kind, model=other, precompute=reason[0], because=reason[1], starts_equal=same, **moves)

    def sequence_logps(self, scores: Scores, batch: Layout) -> "Tensor":
        """log p of each answer, tokens beyond the shorter one weighted by ld_alpha. [B, 2]"""
        size = 2 * len(batch.rows)
        if self.ld_alpha is None:
            return sums(scores.logps_N, scores.owner_N, size).view(-1, 2)
        weight_N = beyond(scores.owner_N, size, self.ld_alpha)
        return sums(scores.logps_N * weight_N, scores.owner_N, size).view(-1, 2)

    def remembered(self, batch: Layout, scores: Scores) -> list[list[float]]:
        rows: list[list[float]] = self.sequence_logps(scores, batch).tolist()
        return rows

    def reference_settings(self) -> dict[str, float | None]:
        return {"ld_alpha": self.ld_alpha}

    def pairs(self, scores: Scores, ref_B2: "Tensor", batch: Layout) -> Pairs:
        lp_B2, size = self.sequence_logps(scores, batch), 2 * len(batch.rows)
        a_B2 = lp_B2 - ref_B2
        s_B2 = divergence(a_B2, self.f_divergence_type, self.f_alpha_divergence_coef)
        n_B2 = scores.owner_N.bincount(minlength=size).view(-1, 2).clamp(min=1)
        nll_B2 = -sums(scores.logps_N, scores.owner_N, size).view(-1, 2)
        columns = [column for x_B2 in (lp_B2, ref_B2, a_B2, s_B2, n_B2) for column in x_B2.unbind(1)]
        return Pairs(*columns, nll_w=nll_B2[:, 0])

    def per_pair(self, x: Pairs, counts: Counts) -> "Tensor":
        """The weighted sum of the losses of each pair. [B]"""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        share = {"sft": counts.rows / max(1, counts.named["chosen"])}  # a mean over tokens, not over pairs
        terms = [
            weight * share.get(kind, 1.0) * LOSSES[kind](x, self)
            for kind, weight in zip(self.loss_type, weights, strict=True)
        ]
        return sum(terms[1:], terms[0])

    def loss(self, batch: Layout, models: Models, counts: Counts) -> Loss:
        known = self.remembers[0] in batch.rows[0].extra
        # before the policy, whose backward must find its own weights switched in
        ref_B2 = None if known else self.sequence_logps(models("reference", batch), batch)
        scores: Scores = models("policy", batch)
        if ref_B2 is None:
            ref_B2 = numbers(batch, self.remembers, scores.logps_N)
        x = self.pairs(scores, ref_B2, batch)
        loss_B = self.per_pair(x, counts)
        if scores.log_agreement_N is not None:
            loss_B = loss_B * wpo(scores, 2 * len(batch.rows))
        total = (loss_B * live(batch, loss_B)).sum() / counts.rows
        return Loss(total, self.metrics(batch, scores, x) | whole(total, batch, counts))

    def metrics(self, batch: Layout, scores: Scores, x: Pairs) -> dict[str, Any]:
        """Under TRL's names; rewards are beta a."""
        r_w, r_l = self.beta * x.a_w.detach(), self.beta * x.a_l.detach()
        values = {
            "rewards/chosen": r_w,
            "rewards/rejected": r_l,
            "rewards/margins": r_w - r_l,
            "rewards/accuracies": (r_w > r_l).to(r_w.dtype),
            "logps/chosen": x.lp_w.detach(),
            "logps/rejected": x.lp_l.detach(),
        }
        return averages(batch, values) | measured(batch, scores)


def beyond(owner_N: "Tensor", size: int, alpha: float) -> "Tensor":
    """Weight of each token: alpha beyond the length of the shorter answer of its pair, else 1. Owners are in order."""
    import torch

    n_R = owner_N.bincount(minlength=size)
    place_N = torch.arange(len(owner_N), device=owner_N.device) - (n_R.cumsum(0) - n_R)[owner_N]
    shorter_R = n_R.view(-1, 2).min(1).values.repeat_interleave(2)
    return torch.where(place_N < shorter_R[owner_N], 1.0, alpha)


def wpo(scores: Scores, size: int) -> "Tensor":
    """Weight of each pair: the product over its answers of exp(mean_t(lp_t - log sum_v p_v^2)), detached. [B]"""
    assert scores.log_agreement_N is not None
    value_N = scores.logps_N.detach() - scores.log_agreement_N
    mean_R = sums(value_N, scores.owner_N, size) / scores.owner_N.bincount(minlength=size).clamp(min=1)
    return mean_R.view(-1, 2).sum(1).exp()
