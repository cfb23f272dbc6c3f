"""Rules on rows as they are in the files: the order of turns, and whether there is a template for them."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from finetune_cli.checks.rule import FEW, Found, SeenRaw, share
from finetune_cli.errors import DataError
from finetune_cli.recipe.sections import Recipe

if TYPE_CHECKING:
    from finetune_cli.data.sources import Table

TELLING = ("chosen", "rejected", "completion", "system", "tools")
"""Columns that are part of a row wherever they are."""
CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected")
"""Columns that may hold messages."""


def tables_of(recipe: Recipe) -> "dict[str, list[Table]]":
    """The sources of every set, by its key in the recipe. Raises DataError for a file that cannot be read."""
    from finetune_cli.data.sources import load

    data, accepts = recipe.data, recipe.method.shapes
    train: list[Table] = []
    for source in data.train:
        train.append(load(source, accepts=accepts, first=sum(len(table.raws) for table in train)))
    evals = {
        f"data.eval_sets.{name}".rstrip("."): [load(source, accepts=accepts)]
        for name, source in (data.eval_sets or {}).items()
    }
    return {"data.train": train, **evals}


def no_template(seen: SeenRaw) -> Iterator[Found]:
    """Messages for a tokenizer that cannot write them."""
    if seen.chat.template is not None:
        return
    for key, tables in seen.tables.items():
        for table in tables:
            talks = any(isinstance(table.raws[0].values.get(name), list) for name in (*CONVERSATIONS, "conversations"))
            if talks or table.shape.name == "messages":
                said = (
                    f"the rows of {table.file} are messages, and the tokenizer has no chat template to write them with"
                )
                yield Found(key, said)


def unread(seen: SeenRaw) -> Iterator[Found]:
    """Columns that hold answers or tools, in a shape that does not read them."""
    for key, tables in seen.tables.items():
        for table in tables:
            left = [column for column in table.unused if column in TELLING]
            if left:
                said = f"the rows of {table.file} are read as {table.shape.name}, so {', '.join(left)} is not read"
                yield Found(key, said if len(left) == 1 else said.replace("is not read", "are not read"))


def turns(seen: SeenRaw) -> Iterator[Found]:
    """Conversations whose turns are not in the order that a chat model is used in."""
    for key, tables in seen.tables.items():
        odd: dict[str, list[int]] = {}
        for table in tables:
            for raw in table.raws:
                try:
                    row = table.canonical(raw)
                except DataError:  # told where rows are encoded
                    continue
                for what in oddities(row, answers=table.shape.name != "prompt"):
                    odd.setdefault(what, []).append(raw.source)
        whole = len(seen.raws(key))
        for what, sources in odd.items():
            if len(sources) >= FEW * whole:
                yield Found(key, f"{share(len(sources), whole)} {what}; {seen.first(key, sources)}")


def oddities(row: Mapping[str, Any], *, answers: bool) -> Iterator[str]:
    """What is odd about the order of turns of one row; `answers`: whether the rows hold answers at all."""
    roles = {name: roles_of(row.get(name)) for name in CONVERSATIONS}
    prompt, whole = roles["prompt"], roles["messages"]
    if whole and answers and whole[-1] != "assistant":
        yield f"end in a turn of the {whole[-1]}, which nothing answers"
    if prompt and prompt[-1] == "assistant":
        yield "have a prompt that ends in a turn of the assistant"
    talk = [role for role in whole or [*prompt, *roles["completion"]] if role not in ("system", "developer")]
    if talk[:1] == ["assistant"]:
        yield "begin with a turn of the assistant, which nothing asks for and which is not trained"
    if any(one == other == "user" for one, other in pairwise(talk)):
        yield "have two turns of the user in a row"
    if any(one == other == "assistant" for one, other in pairwise(talk)):
        yield "have two turns of the assistant in a row"


def roles_of(value: Any) -> list[str]:
    """The roles of messages; [] for anything else."""
    messages = [value] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [str(message["role"]) for message in messages if isinstance(message, dict) and "role" in message]
