"""The rows of a recipe: training and evaluation sets, tokenised, and the prompts that evaluation asks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_cli.data.cache import encoded
from finetune_cli.data.chat import Chat
from finetune_cli.data.encode import Encoded, counts, percentiles, split_eval
from finetune_cli.data.forms import text_of
from finetune_cli.data.sources import load
from finetune_cli.errors import DataError
from finetune_cli.recipe.sections import Recipe, Source
from finetune_cli.types import Prompt, Row

HELD_OUT = "held out"


@dataclass(frozen=True)
class RowSets:
    """All rows of a run. `evals` by set name; the unnamed set has the name ""."""

    train: Encoded
    train_prompts: list[Prompt]
    evals: dict[str, tuple[Encoded, list[Prompt]]]
    raws: dict[str, dict[int, Mapping[str, Any]]] = field(default_factory=dict)
    """Rows as they are in the files, by set ("train" or the name of an evaluation set) and source, where a reward may
    want to see them."""

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
    raws = {"train": raws_of(recipe, data.train)} if method.online else {}
    raws |= {name: raws_of(recipe, [source]) for name, source in (data.eval_sets or {}).items() if method.online}
    return RowSets(train, prompts(recipe, data.train, wanted, chat, asked.sample_prompts), evals, raws)


def raws_of(recipe: Recipe, sources: Sequence[Source]) -> dict[int, Mapping[str, Any]]:
    """The rows of some sources with all their columns, by their place."""
    found: dict[int, Mapping[str, Any]] = {}
    for source in sources:
        table = load(source, accepts=recipe.method.shapes, first=len(found))
        found |= {raw.source: raw.values for raw in table.raws}
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
                row = table.canonical(raw)
                prompt = chat.prompt(row, table.shape.name)
                if prompt is not None:
                    yield raw.source, replace(prompt, text=question(row) or prompt.text, source=raw.source)


def question(row: Mapping[str, Any]) -> str:
    """The message before the last answer, as a person reads it."""
    messages = row.get("messages") or [
        *_messages(row.get("prompt")),
        *_messages(row.get("completion") or row.get("chosen")),
    ]
    if messages and "completion" not in row and "chosen" not in row and messages[-1]["role"] != "assistant":
        return text_of(messages[-1].get("content"))
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return text_of(messages[last - 1].get("content")) if last else ""


def _messages(value: Any) -> list[dict[str, Any]]:
    return value if isinstance(value, list) else []
