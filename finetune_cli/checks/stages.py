"""The stages of a check: all problems of a stage at once, and its error class where one of them is an error."""

from collections.abc import Callable, Iterable

from finetune_cli.checks.rule import Seen, SeenModel, SeenRaw, SeenRows
from finetune_cli.checks.rules import RULES
from finetune_cli.errors import DataError, FinetuneError, ModelError, Problem, RecipeError

Note = Callable[[Problem], None]
"""Hears every warning that the recipe does not accept."""


def unheard(_: Problem) -> None:
    """For those who only want to know what is an error."""


def lints(seen: Seen, note: Note) -> None:
    """Raises RecipeError."""
    found = (problem for rule in RULES for problem in rule.problems(rule.lint, seen))
    settle(seen, found, note, RecipeError(f"{seen.loaded.name} cannot be run"))


def model(seen: SeenModel, note: Note) -> None:
    """Raises ModelError."""
    found = (problem for rule in RULES for problem in rule.problems(rule.model, seen))
    settle(seen, found, note, ModelError(f"{seen.recipe.model.name_or_path} cannot be trained like this"))


def raw(seen: SeenRaw, note: Note) -> list[Problem]:
    """The errors, which are told together with those of the rows that are trained. Raises DataError for a file that
    cannot be read at all."""
    found = (problem for rule in RULES for problem in rule.problems(rule.raw, seen))
    return sift(seen, found, note)


def rows(seen: SeenRows, note: Note, before: Iterable[Problem] = ()) -> None:
    """Raises DataError. `before`: the errors that were found in the files."""
    found = (problem for rule in RULES for problem in rule.problems(rule.rows, seen))
    settle(seen, found, note, DataError("the rows cannot be trained on"), before)


def settle(
    seen: Seen, found: Iterable[Problem], note: Note, error: FinetuneError, before: Iterable[Problem] = ()
) -> None:
    errors = [*before, *sift(seen, found, note)]
    if errors:
        raise type(error)(error.message, "`finetune explain ID` says why, and what to do.", problems=tuple(errors))


def sift(seen: Seen, found: Iterable[Problem], note: Note) -> list[Problem]:
    """The errors; warnings that are not accepted are noted."""
    accepted = set(seen.recipe.ignore)
    errors: list[Problem] = []
    for problem in found:
        if problem.severity == "error":
            errors.append(problem)
        elif problem.rule not in accepted:
            note(problem)
    return errors


def together(problems: Iterable[Problem], error: FinetuneError) -> FinetuneError:
    """An error with the problems that were found before it."""
    return type(error)(error.message, error.hint, problems=(*problems, *error.problems))
