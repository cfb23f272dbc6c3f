"""What a run watches in itself: signs that it goes wrong, each told with what to do about it.

Everything is judged by numbers that are logged anyway, robustly: medians, and deviations from them (Iglewicz and
Hoaglin 1993). Where a threshold comes from, or what was measured for it, is in docs/decisions.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from statistics import fmean, median
from typing import Any, NamedTuple

WINDOW = 50
"""Lines that a spike is compared with."""
LEAST = 10
"""Fewer lines than this say nothing of what is usual."""
SPIKE = 10.0
"""Robust standard deviations above the median."""
RISE = 0.05
"""Evaluation loss over the lowest so far (Prechelt 1998, GL with alpha 5%)."""
NEAR_ZERO = 0.01
"""Losses may be 0 (hinge) or below (robust): a rise is a share of at least this."""
COLLAPSE = 1 / 3
"""Share of the usual speed."""
CREEP = 0.1
"""Growth of memory over GROUPS groups of lines, each above the one before."""
GROUPS, GROUP = 4, 25
AT_FIRST = 50
"""Lines in which memory may grow: allocators keep what they freed, and long rows come late."""
FEW = 5
"""Lines that make a mean of a preference method."""
DISPLACED = -1.0
"""Reward of the chosen answers, in the units of beta: at beta 0.1 they are e^10 times less likely than before."""
FAR = 1.0
"""Nats of divergence from the reference for each token of an answer. InstructGPT's runs end at some 0.1."""
ALIKE = 1 / 4
"""Share of the different answers that there were at first."""
LONG = 2.0
"""Times the length of answers at first."""
MAX_SKIPPED = 10
"""Steps that `on_nan: skip` passes over in a run. PaLM (arXiv 2204.02311) had about 20 spikes to skip, in months."""
MAX_OVERFLOWS = 25
"""fp16 steps in a row that overflow: the scale has fallen from 65536 to 0.002."""


class Finding(NamedTuple):
    """One sign: its rule, and a line for people."""

    rule: str
    message: str


@dataclass
class Health:
    """What was seen so far; part of every checkpoint, so that a resumed run judges as the whole one would."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    """[chosen, rejected, accuracy, margin] of every line of a preference method."""
    answers: list[list[float]] = field(default_factory=list)
    """[different ones, as a share, length] of the first lines of a method that draws its own answers."""
    evals: list[list[float]] = field(default_factory=list)
    """[evaluation loss, training loss] of every evaluation."""
    still: int = 0
    """Lines in a row with a learning rate of zero."""
    skipped: int = 0
    """Steps that were passed over because their gradient was not finite."""
    overflows: int = 0
    """fp16 steps in a row without an update."""
    standing: list[str] = field(default_factory=list)
    """Rules that hold on; they are told of again when they have not held for a while."""

    def line(self, numbers: Mapping[str, float], *, step: int, memory_gib: float) -> list[Finding]:
        """Signs in one logged line. `memory_gib` is what is used now, not the peak."""
        spikes = (
            self._spike("loss_spike", self.losses, numbers.get("loss")),
            self._spike("grad_norm_spike", self.norms, numbers.get("grad_norm")),
        )
        return [
            *(spike for spike in spikes if spike is not None),
            *self._zero(numbers["learning_rate"]),
            *self._slow(numbers["tokens_per_second"]),
            *self._creep(memory_gib),
            *self._preferences(numbers, step),
            *self._own_answers(numbers),
        ]

    def evaluation(self, eval_loss: float, train_loss: float) -> list[Finding]:
        """Signs in an evaluation after step 0."""
        before = [seen for seen, _ in self.evals]
        gaps = {seen: seen - trained for seen, trained in self.evals}
        self.evals.append([eval_loss, train_loss])
        if len(before) < 2:
            return []
        lowest = min(before)
        grown = eval_loss - lowest > RISE * max(abs(lowest), NEAR_ZERO) and eval_loss > before[-1]
        holds = grown and eval_loss - train_loss > gaps[lowest]
        return self._once(
            "overfitting",
            holds,
            f"evaluation loss {eval_loss:.4g} is {eval_loss - lowest:.3g} above its lowest {lowest:.4g} while the "
            f"training loss is {train_loss:.4g}: fewer epochs, more rows, or a lower train.learning_rate",
        )

    def _spike(self, rule: str, history: list[float], value: float | None) -> Finding | None:
        if value is None or not isfinite(value):
            return None
        usual = median(history) if history else 0.0
        high = len(history) >= LEAST and value > usual + SPIKE * deviation(history)
        history.append(value)
        del history[:-WINDOW]
        if not high:
            return None
        name = rule.removesuffix("_spike").replace("_", " ")
        return Finding(
            rule,
            f"{name} {value:.4g} is far above the usual {usual:.4g}: if it does not come back soon, lower "
            "train.learning_rate or look at the rows of this step",
        )

    def _zero(self, learning_rate: float) -> list[Finding]:
        self.still = self.still + 1 if learning_rate == 0 else 0
        return self._once(
            "zero_learning_rate",
            self.still >= 2,
            "the learning rate is 0, nothing is learned: look at train.warmup_steps, train.lr_scheduler_type and the "
            "length of the run",
        )

    def _slow(self, speed: float) -> list[Finding]:
        self.speeds.append(speed)
        del self.speeds[: -WINDOW - 3]
        now, usual = median(self.speeds[-3:]), median(self.speeds[:-3] or [0.0])
        return self._once(
            "slow",
            len(self.speeds) >= LEAST + 3 and now < COLLAPSE * usual,
            f"{now:,.0f} tokens/s, it was {usual:,.0f}: something else uses this machine, it is too hot, or memory is "
            "swapped",
        )

    def _creep(self, memory_gib: float) -> list[Finding]:
        self.memory.append(memory_gib)
        del self.memory[AT_FIRST : -GROUPS * GROUP]
        if len(self.memory) < AT_FIRST + GROUPS * GROUP:
            return []
        groups = [median(self.memory[i : i + GROUP]) for i in range(AT_FIRST, AT_FIRST + GROUPS * GROUP, GROUP)]
        rising = all(after > before for before, after in pairwise(groups))
        return self._once(
            "memory_creep",
            rising and groups[-1] > groups[0] * (1 + CREEP),
            f"memory grows from line to line ({groups[0]:.2f} to {groups[-1]:.2f} GiB): save more often, and go on "
            "with --resume should it run out",
        )

    def _preferences(self, numbers: Mapping[str, float], step: int) -> list[Finding]:
        """The failures of methods that learn from pairs, by what they log (arXiv 2410.08847 for the first)."""
        names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
        if not all(name in numbers for name in names):
            return []
        if not self.rewards and step != 1:
            return []  # a run that goes on without its history
        self.rewards.append([numbers[name] for name in names])
        start = self.rewards[:FEW]
        del self.rewards[FEW : -2 * FEW]
        told = all(accuracy >= 1.0 for _, _, accuracy, _ in start) and start[0][3] > 0.1
        found = self._once(
            "separated_from_the_start",
            len(start) == FEW and told,
            "chosen and rejected were told apart before anything was learned: the reference is not the starting model, "
            "or the answers differ in length or format",
        )
        if len(self.rewards) < 3 * FEW:
            return found
        before, now = self.rewards[-2 * FEW : -FEW], self.rewards[-FEW:]
        falls = all(fmean(r[i] for r in now) < min(DISPLACED, fmean(r[i] for r in before)) for i in (0, 1))
        return found + self._once(
            "both_fall",
            falls,
            "chosen and rejected answers both become unlikely: lower train.learning_rate, raise method.beta, or add "
            "the likelihood of the chosen answers to the loss",
        )

    def _own_answers(self, numbers: Mapping[str, float]) -> list[Finding]:
        """The ways in which a policy earns its reward without doing what was meant (arXiv 2009.01325, 1606.06565)."""
        names = ("objective/kl", "completions/distinct_ratio", "completions/mean_length", "completions/clipped_ratio")
        if not all(name in numbers for name in names):
            return []
        kl, distinct, length, clipped = (numbers[name] for name in names)
        if len(self.answers) < FEW:
            self.answers.append([distinct, length])
        usual, before = (fmean(column) for column in zip(*self.answers, strict=True))
        return [
            *self._once(
                "kl_blow_up",
                kl > FAR * max(1.0, length),
                f"the policy is {kl:.3g} nats from its reference in an answer of {length:.0f} tokens: raise "
                "method.kl_coef, lower train.learning_rate or set method.target_kl",
            ),
            *self._once(
                "one_answer",
                distinct < ALIKE * usual,
                f"{distinct:.0%} of the answers are different, at first it was {usual:.0%}: read the samples; the "
                "reward may be had with one answer to everything",
            ),
            *self._once(
                "length_runaway",
                length > LONG * before and clipped > 0.5,
                f"answers have {length:.0f} tokens, at first {before:.0f}, and {clipped:.0%} are cut: the reward may "
                "like length; set method.missing_eos_penalty",
            ),
        ]

    def _once(self, rule: str, holds: bool, message: str) -> list[Finding]:
        """A state that lasts is told of when it begins."""
        known = rule in self.standing
        if holds and not known:
            self.standing.append(rule)
            return [Finding(rule, message)]
        if known and not holds:
            self.standing.remove(rule)
        return []


def deviation(history: Sequence[float]) -> float:
    """A robust standard deviation: 1.4826 times the median distance from the median, and at least 5% of that median
    (and 0.01): on a flat stretch everything else would be a spike."""
    middle = median(history)
    return max(1.4826 * median(abs(x - middle) for x in history), 0.05 * abs(middle), 0.01)


def counted(lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Health events of metrics.jsonl by rule."""
    rules = [str(line["rule"]) for line in lines if line["event"] == "health"]
    return {rule: rules.count(rule) for rule in dict.fromkeys(rules)}
