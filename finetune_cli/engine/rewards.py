"""Rewards: what answers are worth, by a function of the user's or by a model; checked before anything is trained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli.data.chat import Chat
from finetune_cli.engine import judge
from finetune_cli.engine.actor import Actor
from finetune_cli.engine.judge import Answers, Judge
from finetune_cli.engine.metrics import function_of, said
from finetune_cli.errors import FinetuneError, TrainError
from finetune_cli.methods.online import RewardSource

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job

SIGNATURE = "function(prompts, responses, rows) -> one number for each response"


@dataclass(frozen=True)
class Source:
    """One reward, by the name it is logged under."""

    name: str
    weight: float
    judge: Judge

    def scores(self, answers: Answers) -> list[float]:
        """A finite number for each answer. Raises TrainError where it gives anything else."""
        try:
            found = list(self.judge(answers))
        except FinetuneError:
            raise
        except Exception as error:  # a user's function may raise anything
            raise TrainError(f"method.reward {self.name} failed: {said(error)}", "Mend the function.") from error
        hint = f"It is called as {SIGNATURE}."
        if len(found) != len(answers.responses):
            count = len(answers.responses)
            raise TrainError(f"method.reward {self.name} gave {len(found)} numbers for {count} responses", hint)
        for value, response in zip(found, answers.responses, strict=True):
            if not is_number(value):
                shown = f"{value!r} ({type(value).__name__})"
                raise TrainError(f"method.reward {self.name} gave {shown} for the response {response[:60]!r}", hint)
        return [float(value) for value in found]


def is_number(value: Any) -> bool:
    """True, a number, or an array of one: finite."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return False
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def find(wanted: Sequence[RewardSource], job: "Job", actor: Actor, chat: Chat) -> list[Source]:
    """The rewards of a recipe. Raises RecipeError or ModelError for one that cannot be had."""
    names = unique([name_of(w.source) for w in wanted])
    return [
        Source(name, w.weight, judge_of(w.source, number, job, actor, chat))
        for number, (name, w) in enumerate(zip(names, wanted, strict=True))
    ]


def name_of(source: str) -> str:
    file, _, function = source.rpartition(":")
    return function if file.endswith(".py") else Path(source).name


def unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(names)]


def judge_of(source: str, number: int, job: "Job", actor: Actor, chat: Chat) -> Judge:
    file, _, name = source.rpartition(":")
    if file.endswith(".py"):
        function = function_of(file, name, key="method.reward", signature=SIGNATURE)
        return lambda answers: function(answers.prompts, answers.responses, [given.values for given in answers.data])
    return judge.judge_of(source, f"judge_{number}", job, actor, chat)
