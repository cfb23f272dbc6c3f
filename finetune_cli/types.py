"""The few words that methods and engine share: Row, Counts, Scores, Loss.

Shape letters: B rows, T tokens of a batch, N supervised tokens of a batch, R branches of a batch, V vocabulary,
D hidden size. A name ends in its shape: `logps_N` has one number for each supervised token.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that continue a row's prefix. `trained[i]`: token i is a target of the loss."""

    ids: list[int]
    trained: list[bool]
    name: str = "completion"
    numbers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What is known of its trained tokens, one number each: log-probabilities when they were drawn, advantages."""


@dataclass(frozen=True, slots=True)
class Row:
    """A shared prefix and what may follow it: one branch for SFT, two for a preference pair, none for a prompt that is
    yet to be answered.

    `source` is the 0-based place in the data before shuffling and dropping, `part` counts the rows that one
    conversation was split into.
    """

    prefix: list[int]
    branches: tuple[Branch, ...]
    source: int = 0
    part: int = 0
    truncated: bool = False
    extra: Mapping[str, float] = field(default_factory=dict)
    """Numbers that come with the row: a margin, log-probabilities under the reference."""
    prefix_trained: bool = False
    """The prefix is a target too (ORPO's likelihood is over prompt and answer)."""

    @property
    def length(self) -> int:
        """Tokens that a forward computes: the prefix once."""
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prefix and its longest branch."""
        return len(self.prefix) + max((len(branch.ids) for branch in self.branches), default=0)

    @property
    def targets(self) -> int:
        """Tokens the loss is taken on. The first token of all has no predictor and never counts."""
        return self.named_targets.total()

    @property
    def named_targets(self) -> Counter[str]:
        """The same by the name of the branch, and of a trained prefix under ""."""
        first = not self.prefix
        found = Counter({"": len(self.prefix) - 1} if self.prefix_trained and self.prefix else {})
        for branch in self.branches:
            found[branch.name] += sum(branch.trained[first:])
        return found


@dataclass(frozen=True, slots=True)
class Counts:
    """What the sums of one optimiser step are divided by: over its whole accumulation window and all ranks."""

    rows: int
    """Rows (pairs) that have something to learn."""
    tokens: int
    named: Mapping[str, int] = field(default_factory=dict)
    """Tokens by the name of the branch; those of prefixes under ""."""

    def __add__(self, other: "Counts") -> "Counts":
        names = {**self.named, **other.named}
        named = {name: self.named.get(name, 0) + other.named.get(name, 0) for name in names}
        return Counts(self.rows + other.rows, self.tokens + other.tokens, named)


class Balance(NamedTuple):
    """How unevenly a mixture of experts used them in a batch: 1 for evenly, at most their number."""

    loss: "Tensor"
    coefficient: float
    """Its weight beside the method's loss."""


class Scores(NamedTuple):
    """What a role says about a batch, at its supervised positions only."""

    logps_N: "Tensor"
    """log p(label | what precedes it), float32."""
    owner_N: "Tensor"
    """Which branch of the batch each belongs to, 0..R-1; trained prefixes come after the branches, R..R+B-1."""
    correct_N: "Tensor | None" = None
    """Whether the label was the most probable token; only on logging steps."""
    entropy_N: "Tensor | None" = None
    """Entropy of the prediction in nats; only on logging steps."""
    log_agreement_N: "Tensor | None" = None
    """log sum_v p_v^2: how likely two draws agree; only where the method weighs by it."""
    balance: Balance | None = None
    """Of a mixture of experts whose configuration asks for it, while it is trained."""


class Rewards(NamedTuple):
    """What a reward model says about a batch."""

    reward_RK: "Tensor"
    """A score for each branch and attribute, float32."""


@dataclass(slots=True)
class Loss:
    """This batch's share of the loss of the optimiser step, and its share of what is logged.

    The shares of all batches and ranks add up to the loss. A metric is a pair (sum, count): the logged number is
    the sum of sums over the sum of counts.
    """

    total: "Tensor"
    metrics: dict[str, tuple["Tensor | float", "Tensor | float"]]


class Layout(Protocol):
    """What a method may ask of a batch; the tensors are the engine's business."""

    rows: list[Row]
    measure: bool
    """Whether entropy and accuracy are wanted: only on logging steps, they cost time."""

    @property
    def counts(self) -> Counts: ...


Models = Callable[[str, Any], Any]
"""The roles of a run: `models("policy", batch)` gives the Scores of a batch, or its Rewards."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What inference feeds the model for one row, and the answer that the data holds for it."""

    ids: list[int]
    text: str
    answer: str
    source: int = 0


class Render(Protocol):
    """How a method turns a row's columns into tokens: `data/chat.py`, bound to a tokenizer and its template.

    All raise DataError, with the reason, for a row that cannot be rendered truthfully.
    """

    def conversation(self, row: Mapping[str, Any], *, loss_on: str) -> Iterator[Row]:
        """Rows of `{messages, tools?}`; `loss_on`: assistant | last_assistant | all."""

    def completion(self, row: Mapping[str, Any], *, loss_on: str) -> Iterator[Row]:
        """Rows of `{prompt, completion}`, strings or messages; `loss_on`: completion | all | assistant | ..."""

    def text(self, row: Mapping[str, Any]) -> Iterator[Row]:
        """Rows of `{text}`: everything is trained, an end-of-sequence token included."""

    def pair(self, row: Mapping[str, Any]) -> Iterator[Row]:
        """The row of `{prompt, chosen, rejected}`: what both begin with once, then two branches of answers."""

    def prompt(self, row: Mapping[str, Any], shape: str) -> Prompt | None:
        """The last question of a row and its answer ("" for a prompt alone); None where the row asks nothing."""
