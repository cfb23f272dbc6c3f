"""Rows for people: every token with what becomes of it, turn by turn, how the row differs from inference, its bin.

Ids and what is trained are those of `data/preview.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.data.batches import pack
from finetune_cli.data.chat import Chat
from finetune_cli.data.preview import Found, reason, targets, warned
from finetune_cli.data.rows import train_rows
from finetune_cli.data.turns import Turn, read, turns
from finetune_cli.errors import DataError
from finetune_cli.recipe.sections import Recipe
from finetune_cli.types import Row

NEAR = 3
"""Tokens shown on each side of a difference."""


@dataclass(frozen=True)
class Block:
    """A stretch of a row: all of it, or of a pair the shared prompt, the chosen and the rejected answer."""

    name: str
    turns: list[Turn]

    @property
    def tokens(self) -> int:
        return sum(turn.tokens for turn in self.turns)

    @property
    def titled(self) -> bool:
        """Whether its name says more than those of its turns."""
        return self.name == "prompt"


@dataclass(frozen=True)
class Bin:
    """The bin that a packed row is in, and the rows it shares it with, each as (row, part)."""

    number: int
    others: list[tuple[int, int]]
    tokens: int
    capacity: int


@dataclass(frozen=True)
class Sheet:
    """One row of tokens, or the reason why there is none."""

    row: int
    place: str
    part: int = 0
    parts: int = 1
    blocks: list[Block] = field(default_factory=list)
    tokens: int = 0
    trained: int = 0
    dropped: str = ""
    """Why the row is not trained on: the cause, and what of the row makes it so."""
    warnings: list[tuple[str, str]] = field(default_factory=list)
    prompts: int = 0
    """Trained answers whose prompt was compared with what inference feeds."""
    differences: list[str] = field(default_factory=list)
    bins: list[Bin] = field(default_factory=list)
    error: str = ""


def sheets(found: Found, recipe: Recipe, chat: Chat, bins: "Bins") -> Iterator[Sheet]:
    """A sheet for each row of tokens of a row of the data."""
    outcome = found.outcome
    if outcome.error is not None:
        yield Sheet(outcome.source, found.place, error=f"{outcome.error.rule}: {reason(outcome.error)}")
        return
    scored = recipe.method.labels() is not None  # a reward model is fed whole conversations
    fed = [] if scored else asked(found, chat)
    for row, cause in found.parts:
        whole = found.whole.get(row.part, row)
        compared, differences = comparison(row, fed, chat)
        yield Sheet(
            outcome.source,
            found.place,
            row.part,
            len(found.parts),
            list(blocks(row, whole, found, chat)),
            row.length,
            0 if cause else row.targets,
            f"{cause}: {why(row, cause, recipe.data.max_length)}" if cause else "",
            warned(found, row),
            compared,
            differences,
            bins.get((outcome.source, row.part), []),
        )


def why(row: Row, cause: str, max_length: int) -> str:
    return f"{row.longest} tokens, data.max_length is {max_length}" if cause == "overlength" else "nothing is trained"


def blocks(row: Row, whole: Row, found: Found, chat: Chat) -> Iterator[Block]:
    """The prefix once and then each branch; a row of one branch and no prefix is one block."""
    start = len(row.prefix)
    if start:
        trained = targets(row, row.branches[0])[:start] if row.branches else [False] * start  # prompts alone have none
        pieces = read(chat, row.prefix, trained)
        yield Block("prompt", turns(pieces, said(found)[0], chat))
    for branch, longer in zip(row.branches, whole.branches, strict=True):
        ids = [*row.prefix, *longer.ids]
        trained = targets(row, branch)
        pieces = [piece for piece in read(chat, ids, trained, cut=len(trained)) if piece.at >= start]
        messages = said(found)[1] if not start else []
        yield Block(branch.name, turns(pieces, messages, chat) if messages else [Turn(branch.name, pieces)])


def said(found: Found) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The messages of a row's prompt, and of all of it; text as one message under the name of its column."""
    row = found.row
    if "messages" in row:
        return list(row["messages"]), list(row["messages"])
    parts: list[list[Mapping[str, Any]]] = [
        value if isinstance(value, list) else [{"role": name, "content": value}]
        for name in ("prompt", "completion")
        if (value := row.get(name))
    ]
    return (parts[0] if parts else []), [message for part in parts for message in part]


def asked(found: Found, chat: Chat) -> list[list[int]]:
    """Ids that inference would feed for each answer of a row: its history, rendered with a generation prompt."""
    if isinstance(found.row.get("prompt"), str):
        lead = [*chat.encoder.lead, *chat.encoder.one(found.row["prompt"])]
        return [lead] if "input_ids" not in found.row else []
    prompt, messages = said(found)
    ends = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
    ends += [len(prompt)] if len(prompt) == len(messages) and "messages" not in found.row and messages else []
    fed = []
    for end in ends:
        try:
            text = chat.noting(lambda _id, _message: None).feeds(found.row, messages[:end])
        except DataError:
            continue
        fed.append(chat.encoder.one(text))
    return fed


def comparison(row: Row, fed: list[list[int]], chat: Chat) -> tuple[int, list[str]]:
    """How many answers of a row were compared with inference, and each difference in words."""
    compared, differences = 0, []
    for branch in row.branches if fed else ():
        ids = [*row.prefix, *branch.ids]
        trained = [False] * len(row.prefix) + branch.trained
        for start in [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]:
            compared += 1
            if ids[:start] not in fed:
                nearest = max(fed, key=lambda other: (shared(other, ids[:start]), -abs(len(other) - start)))
                differences.append(difference(nearest, ids[:start], chat))
    return compared, list(dict.fromkeys(differences))


def difference(fed: list[int], ids: list[int], chat: Chat) -> str:
    at = shared(fed, ids)

    def around(some: list[int]) -> str:
        return repr(chat.tokenizer.decode(some[max(0, at - NEAR) : at + NEAR], clean_up_tokenization_spaces=False))

    return f"from token {at} on inference feeds {around(fed)}, the row has {around(ids)}"


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


Bins = Mapping[tuple[int, int], list[Bin]]
"""The bins of each packed row of training, by (row, part); a row with a weight may be in several."""


def packing(recipe: Recipe, chat: Chat) -> tuple[Bins, str]:
    """The bins, and a line about all of them or why there are none; nothing where rows are not packed."""
    capacity = recipe.method.bin_tokens(recipe.data.max_length)
    if capacity is None:
        return {}, ""
    try:
        rows, _ = train_rows(recipe, chat)
    except DataError as error:
        return {}, f"which rows share a bin is not known before all can be trained on: {error.message}"
    packed = pack([row.length for row in rows.rows], capacity, seed=recipe.seed)
    found: dict[tuple[int, int], list[Bin]] = {}
    for number, some in enumerate(packed):
        names = [(rows.rows[i].source, rows.rows[i].part) for i in some]
        tokens = sum(rows.rows[i].length for i in some)
        for at, name in enumerate(names):
            found.setdefault(name, []).append(Bin(number, names[:at] + names[at + 1 :], tokens, capacity))
    total = sum(row.length for row in rows.rows)
    fill = total / (capacity * len(packed))
    return found, f"packing: {len(rows.rows)} rows in {len(packed)} bins of {capacity} tokens, {fill:.1%} full"
