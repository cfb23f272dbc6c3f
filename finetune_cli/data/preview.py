"""Rows as the model will see them, on the trainer's own path; no rule stops a preview."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.data.chat import Chat
from finetune_cli.data.encode import Outcome, encode_row
from finetune_cli.data.sources import load
from finetune_cli.recipe.sections import Recipe
from finetune_cli.types import Row


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
    pieces: list[str] = field(default_factory=list)
    """The text of each token."""
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


def previews(recipe: Recipe, chat: Chat, *, rows: Sequence[int] | None, most: int | None) -> Iterator[Preview]:
    """Of the training rows: those of `rows` by their place, or the first `most`, or all."""
    first = 0
    for source in recipe.data.train:
        table = load(source, accepts=recipe.method.shapes, first=first)
        first += len(table.raws)
        for raw in table.raws:
            if rows is not None and raw.source not in rows:
                continue
            if rows is None and most is not None and raw.source >= most:
                return
            outcome = encode_row(recipe.method, table, raw, chat=chat, data=recipe.data)
            yield from of_outcome(outcome, chat)


def of_outcome(outcome: Outcome, chat: Chat) -> Iterator[Preview]:
    """A line for each part and branch, kept or not."""
    if outcome.error is not None:
        yield Preview(outcome.source, error=(outcome.error.rule, outcome.error.message))
        return
    found: list[tuple[Row, str | None]] = [(row, None) for row in outcome.rows] + [(r, c) for r, c in outcome.lost]
    found.sort(key=lambda pair: pair[0].part)
    for row, cause in found:
        for branch in row.branches:
            ids = [*row.prefix, *branch.ids]
            trained = [*([False] * len(row.prefix)), *branch.trained]
            yield Preview(
                outcome.source,
                branch.name,
                row.part if len(found) > 1 else None,
                ids,
                [is_trained and place > 0 for place, is_trained in enumerate(trained)],
                chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
                [chat.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids],
                outcome.warnings,
                cause,
            )
