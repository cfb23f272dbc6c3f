"""What the checks say of a recipe on the tiny model, as `validate` and every run hear it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from finetune_cli import commands
from finetune_cli.checks.rule import SeenRows
from finetune_cli.checks.rules import BY_ID
from finetune_cli.data.encode import Encoded
from finetune_cli.engine import preflight
from finetune_cli.errors import FinetuneError, Problem
from finetune_cli.types import Branch, Row


@pytest.fixture
def says(recipe_of) -> Callable[..., list[Problem]]:
    """Every problem of a recipe, up to the stage that fails. `fast` stops before the tokenizer."""

    def check(*overrides: str, fast: bool = False, **sections: Any) -> list[Problem]:
        heard: list[Problem] = []
        sections = {"ignore": [], **sections}
        try:
            seen = commands.checked(recipe_of(**sections), overrides, heard.append)
            if not fast:
                preflight.examine(seen, heard.append)
        except FinetuneError as error:
            heard += error.problems or [Problem("", str(error))]
        return heard

    return check


@pytest.fixture
def of(says) -> Callable[..., list[Problem]]:
    """The problems of one rule."""

    def check(rule: str, *overrides: str, fast: bool = False, **sections: Any) -> list[Problem]:
        return [problem for problem in says(*overrides, fast=fast, **sections) if problem.rule == rule]

    return check


@pytest.fixture
def seen(recipe_of) -> SeenRows:
    """All that rules may look at, of a recipe without fault."""
    found = preflight.examine(commands.checked(recipe_of(), [], lambda problem: None), lambda problem: None)
    return found.seen


def trips(rule: str, stage: str, seen: SeenRows) -> list[Problem]:
    """What one rule's check of a stage finds."""
    return list(BY_ID[rule].problems(getattr(BY_ID[rule], stage), seen))


def with_rows(seen: SeenRows, *rows: Row) -> SeenRows:
    """The same recipe with other training rows."""
    return replace(seen, sets=replace(seen.sets, train=Encoded(list(rows), seen.sets.train.report)))


def pair(chosen: list[int], rejected: list[int], *, source: int = 0) -> Row:
    """A preference pair whose answers are trained whole."""
    branches = (Branch(ids, [True] * len(ids), name) for ids, name in ((chosen, "chosen"), (rejected, "rejected")))
    return Row([5, 6, 7], tuple(branches), source)
