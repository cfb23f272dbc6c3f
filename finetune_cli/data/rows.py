"""The rows of a recipe: training and evaluation sets, tokenised, and the prompts that evaluation asks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from finetune_cli.data.cache import encoded
from finetune_cli.data.chat import Chat, wanted
from finetune_cli.data.encode import Encoded, counts, percentiles, split_eval
from finetune_cli.data.forms import text_of
from finetune_cli.data.sources import load
from finetune_cli.errors import DataError
from finetune_cli.recipe.sections import Recipe, Source
from finetune_cli.types import Prompt, Row

HELD_OUT = "held out"


class Given(NamedTuple):
    """A row of the data, as a reward sees it."""

    values: Mapping[str, Any]
    """All columns, as they are in the file."""
    row: Mapping[str, Any]
    """In its canonical form."""


@dataclass(frozen=True)
class RowSets:
    """All rows of a run. `evals` by set name; the unnamed set has the name ""."""

    train: Encoded
    train_prompts: list[Prompt]
    evals: dict[str, tuple[Encoded, list[Prompt]]]
    raws: dict[str | None, dict[int, Given]] = field(default_factory=dict)
    """Rows by set (None is what is trained on) and source, where a reward may want to see them."""

    def summary(self) -> dict[str, Any]:
        """The counts of every set."""
        return {
            "sets": {
                "train": self.train.report,
                **{f"eval {name}".strip(): found.report for name, (found, _) in self.evals.items()},
            }
        }


def load_rows(recipe: Recipe, chat: Chat) -> RowSets:
    """Raises DataError where too many rows are dropped, or none is left."""
    data, method, asked = recipe.data, recipe.method, recipe.eval
    train, held = train_rows(recipe, chat)
    number = asked.metric_rows if asked.metric is not None or method.online else asked.sample_prompts
    number = number if method.generates else 0
    evals: dict[str, tuple[Encoded, list[Prompt]]] = {}
    if held:
        evals[""] = Encoded(held, report_of_held(held)), prompts(recipe, data.train, held, chat, number)
    for name, source in (data.eval_sets or {}).items():
        found = encoded(method, [source], chat, data, seed=recipe.seed)
        if name in evals:
            raise DataError("data.eval_sets and data.eval_split both make the unnamed set", "Keep one of them.")
        evals[name] = found, prompts(recipe, [source], found.rows, chat, number)
    wanted = [] if evals else train.rows[: asked.sample_prompts if method.generates else 0]
    raws: dict[str | None, dict[int, Given]] = {None: raws_of(recipe, data.train)} if method.online else {}
    raws |= {name: raws_of(recipe, [source]) for name, source in (data.eval_sets or {}).items() if method.online}
    return RowSets(train, prompts(recipe, data.train, wanted, chat, asked.sample_prompts), evals, raws)


def raws_of(recipe: Recipe, sources: Sequence[Source]) -> dict[int, Given]:
    """The rows of some sources, by their place."""
    found: dict[int, Given] = {}
    for source in sources:
        table = load(source, accepts=recipe.method.shapes, first=len(found))
        for raw in table.raws:
            row: dict[str, Any] = {}
            with suppress(DataError):  # a row that is dropped is never asked about
                row = table.canonical(raw)
            found[raw.source] = Given(raw.values, row)
    return found


def train_rows(recipe: Recipe, chat: Chat) -> tuple[Encoded, list[Row]]:
    """The rows to train on, and those held out by `eval_split`."""
    data = recipe.data
    found = encoded(recipe.method, data.train, chat, data, seed=recipe.seed)
    rows, held = split_eval(found.rows, data.eval_split, recipe.seed)
    if not held:
        return found, []
    return Encoded(rows, {**found.report, **counts(rows), "held_out": len({row.source for row in held})}), held


def report_of_held(rows: Sequence[Row]) -> dict[str, Any]:
    """Of rows that were read, dropped and warned of with the training rows."""
    sources = len({row.source for row in rows})
    return {
        "read": sources,
        "kept": sources,
        "dropped": {},
        "parts_dropped": {},
        "warnings": {},
        "examples": {},
        **counts(rows),
        "lengths": percentiles([row.longest for row in rows]),
        "targets": {"trained": sum(row.targets for row in rows), "cut": 0},
        "unused": {},
    }


def prompts(recipe: Recipe, sources: Sequence[Source], rows: Sequence[Row], chat: Chat, number: int) -> list[Prompt]:
    """What the first `number` conversations of `rows` ask last, and what they answer."""
    wanted = list(dict.fromkeys(row.source for row in rows))[:number]
    if not wanted:
        return []
    found = dict(canonical(recipe, sources, chat, set(wanted)))
    return [found[source] for source in wanted if source in found]


def canonical(recipe: Recipe, sources: Sequence[Source], chat: Chat, wanted: set[int]) -> Iterator[tuple[int, Prompt]]:
    first = 0
    for source in sources:
        table = load(source, accepts=recipe.method.shapes, first=first)
        first += len(table.raws)
        for raw in table.raws:
            if raw.source in wanted:
                row, shape = recipe.method.asks(table.canonical(raw), table.shape.name)
                prompt: Prompt | None = None
                with suppress(DataError):  # a row may be trained whose last answer has no truthful prompt
                    prompt = chat.prompt(row, shape)
                if prompt is not None and prompt.ids:
                    yield raw.source, replace(prompt, text=question(row, shape) or prompt.text, source=raw.source)


def question(row: Mapping[str, Any], shape: str) -> str:
    """The message before the last answer, or the last where nobody has answered yet, as a person reads it."""
    if shape == "prompt":
        asked = _messages(row["prompt"])
        return text_of(asked[-1].get("content")) if asked else ""
    messages = row.get("messages") or [
        *_messages(row.get("prompt")),
        *_messages(row.get("completion") or row.get("chosen")),
    ]
    last = max(wanted(messages, "assistant", 0), default=0)
    return text_of(messages[last - 1].get("content")) if last else ""


def _messages(value: Any) -> list[dict[str, Any]]:
    return value if isinstance(value, list) else []
