"""Rows of the data to rows of tokens: what is kept, what is dropped and why, and the counts of both.

A row is dropped, and counted under its cause, where a value is empty (`empty`), the template cannot render it
truthfully (`unrenderable`), nothing in it is trained (`no_targets`) or it is too long (`overlength`). A row of another
shape or type than it should be (`malformed`) is a mistake in the file, and always an error.
"""

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

from finetune_cli.data.cells import EmptyValue, Raw, places
from finetune_cli.data.chat import Chat
from finetune_cli.data.readers import together
from finetune_cli.data.sources import Table, load
from finetune_cli.errors import DataError, Problem
from finetune_cli.methods import Method
from finetune_cli.recipe.sections import Data, Source
from finetune_cli.types import Row

EXAMPLES = 3
TOGETHER = 64
"""Rows that are rendered in one exchange and encoded in one call."""
Warnings = list[tuple[str, str]]


@dataclass(frozen=True)
class Outcome:
    """What became of one row of the data.

    `rows` are kept; `lost` are those that were tokenised and then dropped, each with its cause. `dropped` is the cause
    where nothing is kept; `error` says more where the row could not be tokenised at all.
    """

    source: int
    rows: list[Row] = field(default_factory=list)
    dropped: str | None = None
    error: Problem | None = None
    warnings: list[tuple[str, str]] = field(default_factory=list)
    lost: list[tuple[Row, str]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    """Tokens of each of its rows before any was cut."""
    cut: int = 0
    """Tokens that would be trained, had they not been cut or dropped for their length."""


@dataclass(frozen=True)
class Encoded:
    """Rows to train or evaluate on, and how they came about.

    The report counts rows of the data: read = kept + dropped, and `truncated` those that were cut. `rows` counts rows
    of tokens, of which one conversation may give several; `parts_dropped` those dropped from conversations of which
    others are kept.
    """

    rows: list[Row]
    report: dict[str, Any]


def encode_row(method: Method, table: Table, raw: Raw, *, chat: Chat, data: Data) -> Outcome:
    """One row, exactly as training sees it. Never raises for the row's sake."""
    return encode_rows(method, table, [raw], chat=chat, data=data)[0]


def encode_rows(method: Method, table: Table, raws: Sequence[Raw], *, chat: Chat, data: Data) -> list[Outcome]:
    """Rows together: each asks for its tokens first, and then all are answered at once."""
    chat = chat.batched()
    started = [start_row(method, table, raw, chat) for raw in raws]
    size = vocabulary(chat.tokenizer) if table.shape.given else None
    return [
        finish_row(method, raw, rows, notes, data, size=size) for raw, (rows, notes) in zip(raws, started, strict=True)
    ]


def start_row(method: Method, table: Table, raw: Raw, chat: Chat) -> tuple[Iterator[Row] | DataError, Warnings]:
    warnings: Warnings = []
    render = chat.noting(lambda name, message: warnings.append((name, message)))
    try:
        return method.encode(table.canonical(raw), table.shape.name, render), warnings
    except DataError as error:
        return error, warnings


def finish_row(
    method: Method, raw: Raw, found: Iterator[Row] | DataError, warnings: Warnings, data: Data, *, size: int | None
) -> Outcome:
    """`size` is that of the vocabulary, where the row brings its own ids."""
    try:
        if isinstance(found, DataError):
            raise found
        rows = list(found)
        if size is not None:
            known(rows, raw, size)
    except DataError as error:
        said = ". ".join(filter(None, (error.message, error.hint)))
        problem = error.problems[0] if error.problems else raw.problem(said, rule="unrenderable")
        rule = "empty" if isinstance(error, EmptyValue) else problem.rule
        return Outcome(raw.source, dropped=rule, error=problem, warnings=warnings)
    kept: list[Row] = []
    lost: list[tuple[Row, str]] = []
    for row in rows:
        fitted, cause = fit(replace(row, source=raw.source), data.max_length, data.overlength)
        if cause:
            lost.append((fitted, cause))
        else:
            kept.append(fitted)
    dropped = None if kept else lost[0][1] if lost else "no_targets"
    cut = sum(row.targets for row in rows) - sum(row.targets for row in kept)
    kept = [method.marked(row) for row in kept]
    return Outcome(raw.source, kept, dropped, None, warnings, lost, [row.longest for row in rows], cut)


@lru_cache(maxsize=1)
def vocabulary(tokenizer: Any) -> int:
    return len(tokenizer)


def known(rows: Sequence[Row], raw: Raw, size: int) -> None:
    """Raises DataError for an id that the tokenizer has no token for."""
    highest = max(i for row in rows for ids in (row.prefix, *(branch.ids for branch in row.branches)) for i in ids)
    if highest >= size:
        problem = raw.problem(f"has the token id {highest}, the tokenizer {size} tokens", rule="malformed")
        raise DataError(f"{raw.place}: {problem.message}", problems=(problem,))


def fit(row: Row, max_length: int, overlength: Literal["drop", "truncate", "error"]) -> tuple[Row, str | None]:
    """The row as it is trained, and the cause where it is dropped."""
    if not all(any(branch.trained[not row.prefix :]) for branch in row.branches):
        return row, "no_targets"
    if row.longest <= max_length:
        return row, None
    cut = truncated(row, max_length) if overlength == "truncate" else None
    return (cut, None) if cut else (row, "overlength")


def truncated(row: Row, max_length: int) -> Row | None:
    """The row without the end of its answers; None where an answer would have nothing left that is trained."""
    room = max(0, max_length - len(row.prefix))
    branches = tuple(replace(b, ids=b.ids[:room], trained=b.trained[:room]) for b in row.branches)
    first = not row.prefix
    if not branches or not all(any(branch.trained[first:]) for branch in branches):
        return None
    return replace(row, branches=branches, truncated=True)


def encode_set(method: Method, sources: Sequence[Source], chat: Chat, data: Data, *, seed: int) -> Encoded:
    """All rows of some sources, or a DataError that says what is wrong with them and how often."""
    tables: list[Table] = []
    for source in sources:
        tables.append(load(source, accepts=method.shapes, first=sum(len(table.raws) for table in tables)))
    outcomes = [encode_table(method, table, chat, data) for table in tables]
    everything = [outcome for of_table in outcomes for outcome in of_table]
    raws = [raw for table in tables for raw in table.raws]
    report = report_of(everything, raws) | {"unused": {table.file: [*table.unused] for table in tables if table.unused}}
    check(everything, raws, report, data)
    weighed = [
        weighted([outcome.rows for outcome in of_table if outcome.rows], table.weight, f"{seed} {number}")
        for number, (table, of_table) in enumerate(zip(tables, outcomes, strict=True))
    ]
    rows = [row for of_table in weighed for row in of_table]
    if not rows:
        raise DataError("no row is left after `weight`", "Raise the weights of data.train.")
    return Encoded(rows, report | counts(rows))


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Rows of tokens, and conversations of which one was cut."""
    return {"rows": len(rows), "truncated": len({row.source for row in rows if row.truncated})}


def encode_table(method: Method, table: Table, chat: Chat, data: Data) -> list[Outcome]:
    def some(raws: Sequence[Raw]) -> list[Outcome]:
        return encode_rows(method, table, raws, chat=chat, data=data)

    batches = [table.raws[k : k + TOGETHER] for k in range(0, len(table.raws), TOGETHER)]
    if len(batches) < 2:
        return [outcome for raws in batches for outcome in some(raws)]
    # threads, because the tokenizer runs outside Python's lock; one more, because one waits for the templates' process
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1) + 1) as threads:
        return [outcome for outcomes in threads.map(some, batches) for outcome in outcomes]


def report_of(outcomes: Sequence[Outcome], raws: Sequence[Raw]) -> dict[str, Any]:
    dropped = Counter(outcome.dropped for outcome in outcomes if outcome.dropped)
    parts = Counter(cause for outcome in outcomes if outcome.rows for _, cause in outcome.lost)
    warnings: dict[str, dict[str, Any]] = {}
    for outcome, raw in zip(outcomes, raws, strict=True):
        for name, message in dict(reversed(outcome.warnings)).items():
            told = warnings.setdefault(name, {"rows": 0, "example": f"{raw.place}: {message}", "sources": []})
            told["rows"] += 1
            told["sources"] += [raw.source] if len(told["sources"]) < EXAMPLES else []
    return {
        "read": len(outcomes),
        "kept": sum(bool(outcome.rows) for outcome in outcomes),
        "dropped": dict(sorted(dropped.items())),
        "parts_dropped": dict(sorted(parts.items())),
        "warnings": dict(sorted(warnings.items())),
        "examples": examples(outcomes, raws),
        "lengths": percentiles([length for outcome in outcomes for length in outcome.lengths]),
        "targets": {
            "trained": sum(row.targets for outcome in outcomes for row in outcome.rows),
            "cut": sum(outcome.cut for outcome in outcomes),
        },
    }


def percentiles(lengths: list[int]) -> dict[str, int]:
    """p50, p95, p99 and max: the smallest length that so many percent of the rows do not exceed."""
    ordered = sorted(lengths)
    at = {"p50": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: ordered[-(-len(ordered) * percent // 100) - 1] for name, percent in at.items()} if ordered else {}


def examples(outcomes: Iterable[Outcome], raws: Iterable[Raw]) -> dict[str, list[str]]:
    """The first dropped rows of each cause, in words."""
    told: dict[str, list[str]] = {}
    for outcome, raw in zip(outcomes, raws, strict=True):
        if outcome.dropped and len(told.setdefault(outcome.dropped, [])) < EXAMPLES:
            told[outcome.dropped].append(f"{raw.place}: {why(outcome)}")
    return told


def counted(number: int) -> str:
    return f"{number} row{'s' * (number != 1)}"


def why(outcome: Outcome) -> str:
    if outcome.error:
        malformed = outcome.error.rule in ("malformed", "empty")
        field = outcome.error.key.split(" ")[-1] + " " if malformed and outcome.error.key else ""
        return field + outcome.error.message
    longest = max((row.longest for row, _ in outcome.lost), default=0)
    return f"{longest} tokens" if outcome.dropped == "overlength" else "no token of it is trained"


def check(outcomes: Sequence[Outcome], raws: Sequence[Raw], report: Mapping[str, Any], data: Data) -> None:
    """Raises where rows are malformed, too many are dropped, or none is left."""
    malformed = [
        (f"{raw.place}: {why(outcome)}", outcome.error)
        for outcome, raw in zip(outcomes, raws, strict=True)
        if outcome.error and outcome.dropped == "malformed"
    ]
    if malformed:
        problems = [problem for _, problem in malformed]
        raise together([line for line, _ in malformed], problems, "Mend these rows; none of them can be a row.")
    lost = sum(report["dropped"].values())
    too_long = report["dropped"].get("overlength", 0) + report["parts_dropped"].get("overlength", 0)
    if data.overlength == "error" and too_long:
        hint = "Raise data.max_length, or set data.overlength to drop or truncate."
        lines = problems_of(report, raws, "overlength")
        raise DataError(f"{too_long} rows are longer than data.max_length {data.max_length}", hint, problems=lines)
    if not report["kept"] or lost > data.max_dropped_fraction * report["read"]:
        kept = (
            "so none is left"
            if not report["kept"]
            else f"more than data.max_dropped_fraction {data.max_dropped_fraction:g}"
        )
        hint = "Mend the rows, raise data.max_length, or raise data.max_dropped_fraction if they may go."
        lines = problems_of(report, raws, *report["examples"])
        raise DataError(f"{lost} of {report['read']} rows are dropped, {kept}", hint, problems=lines)


RULES = {"overlength": "FT002"}
"""Cause of a drop -> the rule that explains it. The others leave nothing to train on: FT001."""


def problems_of(report: Mapping[str, Any], raws: Sequence[Raw], *causes: str) -> tuple[Problem, ...]:
    """A problem for each cause, with its first rows."""
    lines = []
    for cause in causes:
        first = report["examples"].get(cause) or ["a part of a conversation"]
        count = report["dropped"].get(cause, 0) + report["parts_dropped"].get(cause, 0)
        told = [raw for line in first for raw in raws if line.startswith(f"{raw.place}: ")] or [raws[0]]
        text = f"{counted(count)} dropped as {cause}, the first: {first[0].removeprefix(f'{told[0].place}: ')}"
        text = text.removesuffix(".") + (f"; then {places(told[1:])}" if told[1:] else "")
        lines.append(told[0].problem(text, rule=RULES.get(cause, "FT001")))
    return tuple(lines)


def weighted(conversations: Sequence[list[Row]], weight: float, seed: str) -> list[Row]:
    """All rows as often as the whole part of `weight` says, then a share of them that `seed` draws, each time in the
    order of the file."""
    times, share = divmod(weight, 1)
    drawn = sorted(random.Random(seed).sample(range(len(conversations)), round(share * len(conversations))))
    order = [*range(len(conversations))] * int(times) + drawn
    return [row for i in order for row in conversations[i]]


def split_eval(rows: Sequence[Row], eval_split: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows. All rows of a conversation go to one side; evaluation sees each of them once."""
    conversations = sorted({row.source for row in rows})
    if not eval_split:
        return list(rows), []
    count = max(1, round(eval_split * len(conversations)))
    if count >= len(conversations):
        raise DataError(f"data.eval_split {eval_split:g} of {len(conversations)} rows leaves none to train on")
    held = set(random.Random(f"eval {seed}").sample(conversations, count))
    once = {(row.source, row.part): row for row in rows if row.source in held}
    return [row for row in rows if row.source not in held], list(once.values())
