"""The few words that methods and engine share: Row, Counts, Scores, Loss.

Shape letters: B rows, T tokens of a batch, N supervised tokens of a batch, R branches of a batch, V vocabulary,
D hidden size. A name ends in its shape: `logps_N` has one number for each supervised token.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that continue a row's prefix. `trained[i]`: token i is a target of the loss."""

    ids: list[int]
    trained: list[bool]
    name: str = "completion"


@dataclass(frozen=True, slots=True)
class Row:
    """A shared prefix and what may follow it: one branch for SFT, two for a preference pair.

    `source` is the 0-based place in the data before shuffling and dropping, `part` counts the rows that one
    conversation was split into.
    """

    prefix: list[int]
    branches: tuple[Branch, ...]
    source: int = 0
    part: int = 0
    truncated: bool = False
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens that a forward computes: the prefix once."""
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prefix and its longest branch."""
        return len(self.prefix) + max(len(branch.ids) for branch in self.branches)

    @property
    def targets(self) -> int:
        """Tokens the loss is taken on. The first token of all has no predictor and never counts."""
        first = not self.prefix
        return sum(sum(branch.trained[first:]) for branch in self.branches)


@dataclass(frozen=True, slots=True)
class Counts:
    """What the sums of one optimiser step are divided by: over its whole accumulation window and all ranks."""

    rows: int
    tokens: int

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.rows + other.rows, self.tokens + other.tokens)


@dataclass(slots=True)
class Scores:
    """What a role says about a batch, at its supervised positions only."""

    logps_N: "Tensor"
    """log p(label | what precedes it), float32."""
    owner_N: "Tensor"
    """Which branch of the batch each belongs to, 0..R-1."""
    correct_N: "Tensor | None" = None
    """Whether the label was the most probable token; only on logging steps."""
    entropy_N: "Tensor | None" = None
    """Entropy of the prediction in nats; only on logging steps."""


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


Models = Callable[[str, Any], Scores]
"""The roles of a run: `models("policy", batch)` scores a batch."""


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

    def prompt(self, row: Mapping[str, Any], shape: str) -> Prompt | None:
        """The last question of a row and its answer; None where the row has none (text)."""
