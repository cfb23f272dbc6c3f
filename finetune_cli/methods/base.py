"""A method: one frozen object whose fields are its knobs and whose functions are its mathematics."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from finetune_cli.spec import Spec
from finetune_cli.types import Counts, Layout, Loss, Models, Render, Row, Scores


@dataclass(frozen=True)
class LearningRates:
    """A default and the range in which runs are known to work; ten times outside it is an error."""

    default: float
    low: float
    high: float


@dataclass(frozen=True)
class Shape:
    """How an optimiser step is made, as far as a method may mind."""

    adapters: bool
    """Adapters are trained, not all weights."""
    forwards: int
    """Forwards of a step, over all processes."""
    rows: int
    """Rows in one forward."""


@dataclass(frozen=True)
class Start:
    """What a run starts from, as far as a reference depends on it."""

    trains: Literal["fresh adapter", "adapter", "all weights"]
    """What is trained: a new adapter, one that `model.name_or_path` brings, or the model itself."""
    neutral: bool
    """A fresh adapter that changes nothing before it is trained."""
    base: str | None
    """The model that the policy is with its adapter off; None in full fine-tuning."""
    passes: float | None
    """How often each row is seen; None where the run counts steps."""


class Reference(Spec):
    """The frozen model that a policy is compared with, and how its log-probabilities are come by."""

    kind: Literal["adapter off", "start", "model"]
    """The policy's own weights without the adapter; a frozen copy of what the policy starts as; another model."""
    model: str | None = None
    """Path or hub id of another model."""
    precompute: bool
    """Its log-probabilities are computed before training (or found on disk), and no second model is held."""
    because: str
    """Why they are, or are not."""
    starts_equal: bool
    """The policy is this model before its first step: every margin is exactly 0 there, or the run stops."""
    sync_steps: int | None = None
    """Optimiser steps between moves towards the policy; None for a reference that stays."""
    sync_alpha: float = 1.0
    """Share of the policy in a move."""

    @property
    def about(self) -> str:
        """In words, for the header and the report."""
        who = {"adapter off": "the model with the adapter off", "start": "a frozen copy of the policy at its start"}
        how = "log-probabilities computed before training" if self.precompute else "computed inside each step"
        return f"{who.get(self.kind, self.model)}; {how} ({self.because})"


class Method(Spec):
    """What a run optimises. A subclass declares `name: Literal["..."] = "..."`, its knobs, and the functions below."""

    shorthand: ClassVar = "name"

    name: str
    """The method."""

    summary: ClassVar[str] = ""
    shapes: ClassVar[tuple[str, ...]] = ()
    """The shapes of rows it takes, as `data/sources.py` names them: messages, completion, text, ..."""
    roles: ClassVar[tuple[str, ...]] = ("policy",)
    branches: ClassVar[int] = 1
    """Answers of a row, as far as memory is planned before rows are read."""
    remembers: ClassVar[tuple[str, ...]] = ()
    """Names in `Row.extra` of what is kept of the reference."""
    generates: ClassVar[bool] = True
    """Whether what is trained answers prompts, so that samples and generation metrics have a meaning."""
    online: ClassVar[bool] = False
    """Whether it learns from answers that it draws itself (methods/online.py)."""
    judged_by: ClassVar[tuple[str, int]] = ("loss", -1)
    """What the best checkpoint is chosen by where the recipe has no metric; 1: higher is better, -1: lower."""
    lora_rates: ClassVar[LearningRates]
    full_rates: ClassVar[LearningRates]

    @classmethod
    def method_name(cls) -> str:
        return str(cls.model_fields["name"].default)

    @classmethod
    def rates(cls, *, lora: bool) -> LearningRates:
        return cls.lora_rates if lora else cls.full_rates

    def bin_tokens(self, max_length: int) -> int | None:  # noqa: ARG002
        """Tokens of a bin that whole rows are packed into; None where a row is a unit of its own."""
        return None

    def embedding_noise(self) -> float | None:
        """NEFTune's alpha; None for no noise."""
        return None

    def encoding(self) -> dict[str, Any]:
        """The knobs that `encode` reads, under which its rows are kept on disk. All, where a method says nothing."""
        return self.model_dump(mode="json")

    def labels(self) -> int | None:
        """Scores that a sequence-classification head gives; None for a language model."""
        return None

    def token_agreement(self) -> bool:
        """Whether `Scores.log_agreement_N` is wanted."""
        return False

    def reference(self, start: Start) -> Reference | None:  # noqa: ARG002
        """The frozen model it compares with; None for methods without one."""
        return None

    def remembered(self, batch: Layout, scores: Scores) -> list[list[float]]:
        """What each row keeps of the reference's scores, under the names of `remembers`: all that `loss` will ask."""
        raise NotImplementedError(f"{self.name} has no reference to remember")

    def reference_settings(self) -> dict[str, float | None]:
        """The method's own settings that `remembered` depends on."""
        return {}

    def misfits(self, shape: Shape) -> Iterator[tuple[str, str, str]]:  # noqa: ARG002
        """(key, evidence, error | warning) of the method's own settings that do not fit how a step is made."""
        yield from ()

    def asks(self, row: Mapping[str, Any], shape: str) -> tuple[Mapping[str, Any], str]:
        """The row, and its shape, whose last answer an evaluation asks for."""
        return row, shape

    def marked(self, row: Row) -> Row:
        """A row once it has its length: where its loss is read."""
        return row

    @abstractmethod
    def encode(self, row: Mapping[str, Any], shape: str, render: Render) -> Iterator[Row]:
        """Tokens of one row of the data; more than one where the template rewrites history. Pure, no torch."""

    @property
    def answers(self) -> int:
        """Answers that it draws for each prompt; 0 where it draws none."""
        return 0

    @property
    def parts(self) -> int:
        """Optimiser updates that the rows of a step are split into."""
        return 1

    def scripts(self) -> Iterator[tuple[str, str]]:
        """(key in the recipe, path) of the user's own Python that it runs, and of models that it loads."""
        yield from ()

    def steps_in_all(self, rows_a_step: int) -> int | None:  # noqa: ARG002
        """Steps of a run of `rows_a_step` rows each, where the method says how long it is."""
        return None

    @abstractmethod
    def loss(self, batch: Layout, models: Models, counts: Counts) -> Loss:
        """This batch's share of the loss; `counts` are those of the whole optimiser step."""

    def losses(self, batch: Layout, models: Models, counts: Counts) -> Iterator[Loss]:
        """The same in parts that each have a backward of their own, done before the next is asked for."""
        yield self.loss(batch, models, counts)
