"""Rows of a data source: read from where they are, their shape found from the columns, written in one canonical form.

The shapes: messages {messages, tools?, chat_template_kwargs?}, completion {prompt, completion} (two strings or two
lists of messages), text {text}, tokens {input_ids, trained?}, pairs {prompt, chosen, rejected} and prompt {prompt}
(text or messages). Every error names the file and the row.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from finetune_cli.data import pairs
from finetune_cli.data.cells import ROLES, Cells, Raw
from finetune_cli.data.readers import described, read, shown, together
from finetune_cli.errors import DataError
from finetune_cli.recipe.sections import Source


@dataclass(frozen=True)
class Shape:
    """Columns that make a shape, columns that it also reads, and how a row of them becomes canonical."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[Cells], dict[str, Any]]

    @property
    def given(self) -> bool:
        """Whether its rows are tokens already."""
        return self.required[0].startswith("input_ids")


@dataclass(frozen=True)
class Table:
    """The rows of one source, not yet looked at one by one. `unused`: columns that nothing reads."""

    file: str
    shape: Shape
    raws: list[Raw]
    unused: tuple[str, ...]
    roles: Mapping[str, str]
    weight: float = 1.0

    def canonical(self, raw: Raw) -> dict[str, Any]:
        """The row in its canonical form. Raises DataError for what is malformed, EmptyValue for what is empty."""
        if raw.wrong is not None:
            raise DataError(f"{raw.place}: {raw.wrong.message}", problems=(raw.wrong,))
        return self.shape.build(Cells(raw, self.roles))


CHAT = ("system", "tools", "chat_template_kwargs")
PROMPTS = ("prompt", "messages", "conversations", "instruction", "input")
LABELS = ("labels_chosen", "labels_rejected")
SHAPES = (
    Shape("tokens", ("input_ids",), ("labels", "attention_mask"), Cells.tokens),
    Shape("pairs", ("chosen", "rejected"), (*PROMPTS, "margin", "label", *CHAT), pairs.canonical),
    Shape("pairs", ("input_ids_chosen", "input_ids_rejected"), ("margin", "label", *LABELS), pairs.canonical),
    Shape("messages", ("messages",), CHAT, lambda c: c.conversation("messages")),
    Shape("messages", ("conversations",), CHAT, lambda c: c.conversation("conversations")),
    Shape("completion", ("prompt", "completion"), CHAT[1:], Cells.completion),
    Shape("messages", ("instruction", "output"), ("input", "history", *CHAT), Cells.instruction),
    Shape("text", ("text",), (), lambda c: {"text": c.text("text")}),
    Shape("prompt", ("prompt",), CHAT[1:], lambda c: c.question("prompt")),
    Shape("prompt", ("query",), CHAT[1:], lambda c: c.question("query")),
)  # fmt: skip
"""The first whose required columns are all there is the shape of a file."""
TEXT_OR_MESSAGES = {"prompt", "query", "completion", "chosen", "rejected"}
"""Columns that hold either, but the same in every row of a file."""


def shape_of(columns: Collection[str], accepts: Collection[str] = ()) -> str | None:
    """The name of the shape that these columns make; with `accepts`, among these shapes only."""
    found = find_shape(columns, accepts)
    return found.name if found else None


def find_shape(columns: Collection[str], accepts: Collection[str] = (), mapped: Collection[str] = ()) -> Shape | None:
    """The first that has its columns; with `mapped`, names that the recipe gives columns, one that reads them."""
    has = [s for s in SHAPES if set(s.required) <= set(columns) and (not accepts or s.name in accepts)]
    reads = (shape for shape in has if set(mapped) <= {*shape.required, *shape.optional})
    return next(reads, has[0] if has else None)


def load(source: Source, *, accepts: Collection[str] = (), first: int = 0) -> Table:
    """All rows of a source, not yet in canonical form. `accepts`: shapes the method takes; `first`: number of row 0."""
    file, records = shown(source.path), read(source)
    if not records:
        raise DataError(f"{file} has no rows")
    readable = [record for record in records if record.wrong is None]
    if not readable:
        problems = [record.wrong for record in records if record.wrong is not None]
        raise together([f"{p.file}:{p.line}: {p.message}" for p in problems], problems, "No row of it can be read.")
    columns = dict.fromkeys(name for record in readable for name in record.values)
    names = renamed(source, columns, file=file)
    said = dict.fromkeys(name for record in readable for name, value in record.values.items() if value is not None)
    mapped = source.columns or {}
    shape = find_shape([names.get(c, c) for c in readable[0].values if c in said], accepts, mapped)
    shape = shape or find_shape([names.get(c, c) for c in said], accepts, mapped)
    shape = shape or find_shape([names.get(c, c) for c in columns], accepts, mapped)
    if shape is None:
        raise no_shape(file, columns, accepts)
    raws = [
        Raw({names.get(k, k): v for k, v in record.values.items()}, first + row, file, row, record.line, record.wrong)
        for row, record in enumerate(records)
    ]
    used = {*shape.required, *shape.optional}
    if idle := [name for name in mapped if name not in used]:
        raise DataError(
            f"{file}: columns.{idle[0]}: the rows are read as {shape.name} ({' + '.join(shape.required)}), "
            f"which have no {idle[0]}",
            "Take it out, or map the columns of another shape.",
        )
    unused = tuple(column for column in columns if names.get(column, column) not in used)
    roles = {name: role for role, given in (source.roles or {}).items() for name in given}
    if wrong := {*roles.values()} - {*ROLES.values()}:
        raise DataError(f"roles: there is no role {sorted(wrong)[0]!r}", f"The roles: {', '.join({*ROLES.values()})}")
    return Table(file, shape, one_kind(raws, TEXT_OR_MESSAGES & used), unused, {**ROLES, **roles}, source.weight)


def one_kind(raws: list[Raw], columns: Collection[str]) -> list[Raw]:
    """The rows, those marked as wrong whose columns hold messages where the first that has any holds text, or so."""
    first: dict[str, tuple[str, Raw]] = {}
    kinds: dict[type, str] = {str: "text", list: "messages", dict: "messages"}

    def marked(raw: Raw) -> Raw:
        for column, value in raw.values.items():
            kind = kinds.get(type(value)) if column in columns else None
            if kind is not None:
                other, place = first.setdefault(column, (kind, raw))
                if kind != other:
                    said = f"is {described(value)}, and in {place.place} it is {other}: keep one kind in a column"
                    return replace(raw, wrong=raw.problem(said, rule="malformed", field=column))
        return raw

    return [marked(raw) for raw in raws]


def renamed(source: Source, columns: Collection[str], *, file: str) -> dict[str, str]:
    """The file's column name -> ours."""
    ours = sorted({name for shape in SHAPES for name in (*shape.required, *shape.optional)})
    for name, theirs in (source.columns or {}).items():
        if name not in ours:
            near = get_close_matches(name, ours, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise DataError(f"columns: {name} is not a column we read", f"{meant}Ours: {', '.join(ours)}")
        if theirs not in columns:
            raise DataError(f"{file}: columns.{name}: there is no column {theirs!r}", f"It has: {', '.join(columns)}")
    taken = {theirs: name for name, theirs in (source.columns or {}).items()}
    # a column of the file that already has a name given to another one steps aside
    return taken | {name: f"{name} (unmapped)" for name in {*taken.values()} & ({*columns} - {*taken})}


def no_shape(file: str, columns: Collection[str], accepts: Collection[str]) -> DataError:
    other = find_shape(columns)
    why = f"are {other.name}, which the method does not take" if other else "make no shape of rows that we know"
    wanted = dict.fromkeys(" + ".join(s.required) for s in SHAPES if not accepts or s.name in accepts)
    hint = f"Wanted: {', or '.join(wanted)}. Map names with `data.train[0].columns: {{messages: NAME_IN_THE_FILE}}`."
    return DataError(f"{file}: the columns {', '.join(columns)} {why}", hint)
