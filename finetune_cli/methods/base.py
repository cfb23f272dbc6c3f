"""A method: one frozen object whose fields are its knobs and whose functions are its mathematics."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from finetune_cli.spec import Spec
from finetune_cli.types import Counts, Layout, Loss, Models, Render, Row


@dataclass(frozen=True)
class LearningRates:
    """A default and the range in which runs are known to work; ten times outside it is an error."""

    default: float
    low: float
    high: float


class Method(Spec):
    """What a run optimises. A subclass declares `name: Literal["..."] = "..."`, its knobs, and the functions below."""

    shorthand: ClassVar = "name"

    name: str
    """The method."""

    summary: ClassVar[str] = ""
    shapes: ClassVar[tuple[str, ...]] = ()
    """The shapes of rows it takes, as `data/sources.py` names them: messages, completion, text, ..."""
    roles: ClassVar[tuple[str, ...]] = ("policy",)
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

    @abstractmethod
    def encode(self, row: Mapping[str, Any], shape: str, render: Render) -> Iterator[Row]:
        """Tokens of one row of the data; more than one where the template rewrites history. Pure, no torch."""

    def steps(self, batch: Layout, models: Models) -> Iterator[Layout]:  # noqa: ARG002
        """The batches that are trained on for one that was drawn; PPO rolls out here."""
        yield batch

    @abstractmethod
    def loss(self, batch: Layout, models: Models, counts: Counts) -> Loss:
        """This batch's share of the loss; `counts` are those of the whole optimiser step."""
