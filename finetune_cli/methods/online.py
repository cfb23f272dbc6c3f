"""Methods that learn from answers of their own: prompts in, answers drawn, each worth what a reward says of it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from finetune_cli.errors import DataError
from finetune_cli.methods.base import Method, Reference, Start
from finetune_cli.spec import InputPath, OneOrMany, Spec
from finetune_cli.types import Counts, Layout, Loss, Models, Render, Row

if TYPE_CHECKING:
    from torch import Tensor


class RewardSource(Spec):
    """What answers are worth, or a share of it."""

    shorthand: ClassVar = "source"

    source: Annotated[str, InputPath()]
    """A folder that `method: reward` made, any sequence-classification model with one label, or `file.py:function`,
    which is called as function(prompts, responses, rows) and returns a list of numbers, one for each response."""
    weight: float = 1.0
    """What its numbers are multiplied by before they are summed."""

    @field_validator("source")
    @classmethod
    def _names_a_function(cls, source: str) -> str:
        if source.endswith(".py"):
            raise ValueError(f"name the function in it: {Path(source).name}:FUNCTION")
        return source


@dataclass(frozen=True)
class Rollout:
    """R answers, right-padded to T tokens with zeros, and all that was found of them. float32."""

    logps_RT: "Tensor"
    """Of the policy that gave the answers."""
    ref_logps_RT: "Tensor"
    values_RT: "Tensor"
    """What the critic expected before each token; zeros where the method has none."""
    mask_RT: "Tensor"
    """1 at the tokens of an answer."""
    score_R: "Tensor"
    ended_R: "Tensor"
    """1 where the answer ends in a stop token, 0 where it was cut at its longest."""
    group: int
    """Answers to one prompt, which lie side by side."""


@dataclass(frozen=True)
class Credit:
    """What each token of a rollout is worth, by the names under which `loss` finds it, and what is logged of it."""

    numbers_RT: "dict[str, Tensor]"
    metrics: dict[str, tuple[Any, Any]]


Total = Callable[["Tensor"], "Tensor"]
"""The sum of a tensor over all processes. Collective."""


def told(batch: Layout, name: str, like: "Tensor") -> "Tensor":
    """Numbers that the tokens of a batch bring, in the order of its scores. [N]"""
    return like.new_tensor([x for row in batch.rows for branch in row.branches for x in branch.numbers[name]])


class Online(Method):
    """A method that answers prompts itself, and learns from what its answers are worth."""

    reward: Annotated[list[RewardSource], OneOrMany(), Field(min_length=1)]
    """What an answer is worth: a folder that `method: reward` made, a sequence-classification model, or
    `file.py:function`; of several, with weights, the sum."""
    num_generations: Annotated[int, Field(ge=1)] = 1
    """Answers drawn for each prompt; the prompt is computed once for all of them."""
    stop_token: str = "eos"
    """Where an answer ends: `eos` for the ids that end a turn at inference, else the text of one token."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = None
    """Taken off the reward of an answer that was cut at `generation.max_new_tokens`."""
    total_episodes: Annotated[int, Field(ge=1)] | None = None
    """Answers to draw in all; overrides `train.num_train_epochs`."""

    online: ClassVar = True
    shapes: ClassVar = ("prompt", "messages", "completion", "pairs")
    judged_by: ClassVar = ("objective/scores", 1)

    @model_validator(mode="after")
    def _episodes(self) -> Self:
        if self.total_episodes is not None and self.total_episodes < self.num_generations:
            raise ValueError("total_episodes is below num_generations: not one prompt would be answered")
        return self

    @property
    def answers(self) -> int:
        return self.num_generations

    def paid(self, score: Any, *, ended: Any) -> Any:
        """What an answer's score is after the penalty for one that was cut; numbers, or tensors of them."""
        return score - (self.missing_eos_penalty or 0.0) * (1 - ended)

    @property
    def epochs(self) -> int:
        """Times that the answers of a step are learned from."""
        return 1

    def scripts(self) -> Iterator[tuple[str, str]]:
        for number, reward in enumerate(self.reward):
            file = reward.source.rpartition(":")[0]
            if file.endswith(".py"):
                yield f"method.reward.{number}.source", file
            elif Path(reward.source).is_absolute():
                yield f"method.reward.{number}.source", reward.source

    def steps_in_all(self, rows_a_step: int) -> int | None:
        if self.total_episodes is None:
            return None
        return -(-self.total_episodes // (rows_a_step * self.num_generations))

    def encoding(self) -> dict[str, Any]:
        return {"name": "prompts"}

    def asks(self, row: Mapping[str, Any], shape: str) -> tuple[Mapping[str, Any], str]:
        """A conversation that ends with a question asks that one."""
        open_ended = shape == "messages" and row["messages"][-1]["role"] != "assistant"
        return ({**row, "prompt": row["messages"]}, "prompt") if open_ended else (row, shape)

    def encode(self, row: Mapping[str, Any], shape: str, render: Render) -> Iterator[Row]:
        """The prompt alone; an answer that the data has is not trained on."""
        prompt = render.prompt(*self.asks(row, shape))
        if prompt is None or not prompt.ids:
            raise DataError("the row asks nothing: it has no turn of the assistant that something comes before")
        yield Row(prompt.ids, ())

    def reference(self, start: Start) -> Reference:
        """What the policy is at its start."""
        kind: Any = "adapter off" if start.neutral else "start"
        because = "answers are new in every step"
        return Reference(kind=kind, precompute=False, because=because, starts_equal=False)

    @abstractmethod
    def credit(self, x: Rollout, total: Total) -> Credit:
        """What each token is worth. Collective: every process has its share of the step's answers."""

    def enough(self, found: Mapping[str, float]) -> bool:  # noqa: ARG002
        """Whether, by what an update logged, the answers of this step are learned from no more."""
        return False

    @abstractmethod
    def losses(self, batch: Layout, models: Models, counts: Counts) -> Iterator[Loss]:
        """Shares of the loss, one role after the other: each one's backward ends before the next is asked for."""

    def loss(self, batch: Layout, models: Models, counts: Counts) -> Loss:
        raise NotImplementedError(f"{self.name} has one loss for each role")
