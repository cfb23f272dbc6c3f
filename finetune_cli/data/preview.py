"""Rows as the model will see them, on the trainer's own path; no rule stops a preview."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.data.cells import Raw
from finetune_cli.data.chat import Chat
from finetune_cli.data.encode import Outcome, encode_row
from finetune_cli.data.readers import read, shown
from finetune_cli.data.sources import Table, load
from finetune_cli.errors import DataError, Problem
from finetune_cli.recipe.sections import Recipe, Source
from finetune_cli.types import Branch, Row

LONG = 2**40
"""No row has as many tokens."""


@dataclass(frozen=True)
class Found:
    """One row of the data and what became of it."""

    place: str
    """`file:line`, or the number of the row where the file has no lines."""
    outcome: Outcome
    row: Mapping[str, Any] = field(default_factory=dict)
    """In canonical form; empty where there is none."""
    shape: str = ""
    whole: Mapping[int, Row] = field(default_factory=dict)
    """The parts that were cut, by number, as they were before."""

    @property
    def parts(self) -> list[tuple[Row, str | None]]:
        """The rows of tokens and why each is dropped, kept ones and lost ones in the order of the conversation."""
        kept: list[tuple[Row, str | None]] = [(row, None) for row in self.outcome.rows]
        return sorted([*kept, *self.outcome.lost], key=lambda pair: pair[0].part)


@dataclass(frozen=True)
class Preview:
    """One branch of one row, or the reason why there is none."""

    row: int
    branch: str = ""
    part: int | None = None
    """Which of the rows that one conversation was split into; None where it was not."""
    input_ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    text: str = ""
    warnings: list[tuple[str, str]] = field(default_factory=list)
    dropped: str | None = None
    error: tuple[str, str] | None = None
    """(rule, message)"""

    def to_json(self) -> dict[str, Any]:
        """The line of `preview-template --json`."""
        if self.error is not None:
            return {"row": self.row, "error": {"id": self.error[0], "message": self.error[1]}}
        part = {} if self.part is None else {"part": self.part}
        return {
            "row": self.row,
            **part,
            "branch": self.branch,
            "input_ids": self.input_ids,
            "trained": self.trained,
            "text": self.text,
            "warnings": [{"id": name, "message": message} for name, message in self.warnings],
            "dropped": self.dropped,
        }


def nothing_trained(found: Found) -> bool:
    """A row, or a part of one, of which nothing is trained, and not for its length."""
    return found.outcome.dropped in ("no_targets", "empty") or any(
        row.branches and not row.targets for row, _ in found.parts
    )


def too_long(found: Found) -> bool:
    return any(row.truncated or cause == "overlength" for row, cause in found.parts)


WHERE: dict[str, Callable[[Found], bool]] = {
    "zero_loss": nothing_trained,
    "overlength": too_long,
    "split": lambda found: len(found.parts) > 1,
}
"""What `--where` may ask for."""


def search(
    recipe: Recipe,
    chat: Chat,
    *,
    rows: Collection[int] | None = None,
    where: str | None = None,
    most: int | None = None,
) -> Iterator[Found]:
    """The training rows in the order of the sources: those of `rows` by their place, those that `where` says, at most
    `most`. Raises DataError for a row that is not there, and for a file that cannot be read at all."""
    first, count = 0, 0
    for source in recipe.data.train:
        for found in of_source(recipe, source, chat, first=first, rows=rows):
            first += 1
            if found is not None and (where is None or WHERE[where](found)):
                count += 1
                yield found
            if most is not None and count >= most:
                return
    if missing := [row for row in rows or () if not 0 <= row < first]:
        raise DataError(f"there is no row {missing[0]}", f"data.train has {first} rows, counted from 0.")


def of_source(
    recipe: Recipe, source: Source, chat: Chat, *, first: int, rows: Collection[int] | None
) -> Iterator[Found | None]:
    """Every row of a source; None for one that is not among `rows`."""
    try:
        table = load(source, accepts=recipe.method.shapes, first=first)
    except DataError as error:
        # the columns make no rows that the method takes: none of them can be rendered, and each says so
        said = ". ".join(filter(None, (error.message, error.hint)))
        for number, record in enumerate(read(source)):
            problem = record.wrong or Problem("", said, rule="malformed")
            raw = Raw({}, first + number, shown(source.path), number, record.line)
            found = Found(raw.place, Outcome(raw.source, dropped="malformed", error=problem))
            yield found if rows is None or raw.source in rows else None
        return
    for raw in table.raws:
        yield of_raw(recipe, table, raw, chat) if rows is None or raw.source in rows else None


def of_raw(recipe: Recipe, table: Table, raw: Raw, chat: Chat) -> Found:
    outcome = encode_row(recipe.method, table, raw, chat=chat, data=recipe.data)
    if outcome.error is not None:
        return Found(raw.place, outcome)
    whole: dict[int, Row] = {}
    if any(row.truncated for row in outcome.rows):
        longer = recipe.data.model_copy(update={"max_length": LONG})
        again = encode_row(recipe.method, table, raw, chat=chat, data=longer)
        whole = {row.part: row for row in again.rows}
    return Found(raw.place, outcome, table.canonical(raw), table.shape.name, whole)


def previews(recipe: Recipe, chat: Chat, **asked: Any) -> Iterator[Preview]:
    """A line for each part and branch of the rows that `search` finds, kept or not."""
    for found in search(recipe, chat, **asked):
        yield from lines(found, chat)


def lines(found: Found, chat: Chat) -> Iterator[Preview]:
    outcome = found.outcome
    if outcome.error is not None:
        yield Preview(outcome.source, error=(outcome.error.rule, reason(outcome.error)))
        return
    for row, cause in found.parts:
        warnings = warned(found, row)
        for branch in row.branches or (Branch([], [], "prompt"),):
            ids = [*row.prefix, *branch.ids]
            yield Preview(
                outcome.source,
                branch.name,
                row.part if len(found.parts) > 1 else None,
                ids,
                [False] * len(ids) if cause else targets(row, branch),
                chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
                warnings,
                cause,
            )


def targets(row: Row, branch: Branch) -> list[bool]:
    """For each token of a row's prefix and a branch, whether it is a target of the loss. The first of all has no
    predictor; a prefix that is trained is so once, with the first branch."""
    of_prefix = row.prefix_trained and branch is row.branches[0]
    trained = [*[of_prefix] * len(row.prefix), *branch.trained]
    return [False, *trained[1:]] if trained else []


def warned(found: Found, row: Row) -> list[tuple[str, str]]:
    """What is odd about a row of tokens."""
    if not row.truncated:
        return found.outcome.warnings
    said = f"cut from {found.whole[row.part].longest} to {row.longest} tokens, data.max_length"
    return [*found.outcome.warnings, ("truncated", said)]


def reason(problem: Problem) -> str:
    """A problem with its place and its column, on a line."""
    field = problem.key.split(" ")[-1] if problem.rule in ("malformed", "empty") else ""
    place = f"{problem.file}:{problem.line}" if problem.line else problem.file
    return ": ".join(filter(None, (place, " ".join(filter(None, (field, problem.message))))))
