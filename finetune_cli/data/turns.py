"""Tokens as text, turn by turn: which token belongs to which message.

That is found by the messages' own text and by the tokens that end turns. It orders a view and decides nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Any, Literal, Self

from finetune_cli.data.chat import Chat
from finetune_cli.data.forms import REASONING, functions, text_of

State = Literal["trained", "context", "cut"]
UNKNOWN = "\ufffd"
BY_TEMPLATE = "(template)"
"""What a template writes before the first message: its own system prompt, say."""
OPENS = "(opens the answer)"
"""What a template writes after the last message of a prompt."""
ANSWERS = ("assistant", "completion")


@dataclass(frozen=True)
class Piece:
    """A token as text; several where only together they make a character. `at` is the place of the first."""

    text: str
    ids: tuple[int, ...]
    at: int
    state: State = "context"
    special: bool = False


@dataclass(frozen=True)
class Turn:
    """What the template makes of one message."""

    role: str
    pieces: list[Piece]

    @property
    def tokens(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces)

    @property
    def trained(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.state == "trained")

    @property
    def cut(self) -> int:
        return sum(len(piece.ids) for piece in self.pieces if piece.state == "cut")


def read(chat: Chat, ids: Sequence[int], trained: Sequence[bool], *, cut: int | None = None) -> list[Piece]:
    """The pieces of some ids. `cut`: the first token that is cut off."""
    special = {*chat.tokenizer.all_special_ids}
    special |= {i for i, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    pieces, at = [], 0
    for text, count in texts(chat.tokenizer, ids):
        own = slice(at, at + count)
        state: State = "cut" if cut is not None and at >= cut else "trained" if any(trained[own]) else "context"
        pieces.append(Piece(text, tuple(ids[own]), at, state, ids[at] in special))
        at += count
    return pieces


def texts(tokenizer: Any, ids: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The text that each token adds to those before it, and how many tokens that takes: bytes of one character come
    together, and a tokenizer that writes no space at the beginning of a text writes it here."""

    def decoded(some: Sequence[int]) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    begin, at = 0, 0
    for end in range(1, len(ids) + 1):
        known, text = decoded(ids[begin:at]), decoded(ids[begin:end])
        if text.endswith(UNKNOWN) and end - at < 4 and end < len(ids):
            continue
        yield (text[len(known) :] if text.startswith(known) else decoded(ids[at:end])), end - at
        begin, at = at, end


def turns(pieces: list[Piece], messages: Sequence[Mapping[str, Any]], chat: Chat) -> list[Turn]:
    """The pieces by the message that they belong to; what the template puts before the first is its own."""
    laid = Laid.out(pieces, chat)
    named = by_stops(laid, messages, chat.stops) or by_anchors(laid, messages)
    out = []
    for (role, a), (_, b) in pairwise([*named, ("", len(laid.text) + 1)]):
        if own := [piece for piece, start in zip(pieces, laid.starts, strict=True) if a <= start < b]:
            out.append(Turn(role, own))
    return out


@dataclass(frozen=True)
class Laid:
    """The text of some pieces, and at which of its characters things are."""

    text: str
    starts: list[int]
    """Where each piece begins."""
    closed: list[int]
    """What follows each token that ends a turn, and the white space after it."""
    special: list[int]
    trained: list[int]

    @classmethod
    def out(cls, pieces: Sequence[Piece], chat: Chat) -> Self:
        edges = [0, *accumulate(len(piece.text) for piece in pieces)]
        text = "".join(piece.text for piece in pieces)
        named = list(zip(pieces, edges[:-1], edges[1:], strict=True))
        ends = [end for piece, _, end in named if piece.text.strip() in chat.stops]
        return cls(
            text,
            edges[:-1],
            [len(text) - len(text[end:].lstrip()) for end in ends],
            [start for piece, start, _ in named if piece.special],
            [start for piece, start, _ in named if piece.state == "trained"],
        )


def by_stops(laid: Laid, messages: Sequence[Mapping[str, Any]], stops: Sequence[str]) -> list[tuple[str, int]]:
    """(role, first character) of each message, where every turn ends in a stop and the turns are the first messages,
    with or without one of the template's before them, and what opens an answer after them; else nothing."""
    edges = [0, *(end for end in laid.closed if laid.text[end:].strip()), len(laid.text)]
    said = [text_of(message.get("content")).strip() for message in messages]
    sizes = [1 + sum(text.count(stop) for stop in stops) for text in said]  # stops that a message says itself
    for tail, lead in product((0, 1), (0, 1)):
        at, last = list(accumulate(sizes, initial=lead)), len(edges) - 1 - tail
        if last not in at[1:]:
            continue
        own = [(edges[a], edges[b]) for a, b in pairwise(at[: at.index(last) + 1])]
        whole = list(zip(messages, said, own, strict=False))
        learnt = {a for a, b in pairwise(edges) if any(a <= place < b for place in laid.trained)}
        answers = {
            edge for message, _, (a, b) in whole if message["role"] in ANSWERS for edge in edges if a <= edge < b
        }
        if learnt <= answers and all(text in laid.text[a:b] for _, text, (a, b) in whole):
            named = [(BY_TEMPLATE, 0)] * lead + [(str(message["role"]), a) for message, _, (a, _) in whole]
            return named + [(OPENS, edges[last])] * tail
    return []


def by_anchors(laid: Laid, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The same by what the messages say, where there are fewer stops or more. A message begins after the stop between
    it and the one before, else where training does, else at the first special token between the two."""
    at = min((place for message in messages[:1] for place, _ in anchors(message, laid.text, 0)), default=0)
    cursor = max((end for end in laid.closed if end <= at), default=0)
    found = [(BY_TEMPLATE, 0)] if cursor else []
    for message, following in pairwise([*messages, {}]):
        found.append((str(message["role"]), cursor))
        end = max((stop for _, stop in anchors(message, laid.text, cursor)), default=cursor)
        begin = min((start for start, _ in anchors(following, laid.text, end)), default=len(laid.text))
        learnt = laid.trained if following.get("role") in ANSWERS else []
        between = [at for places in (laid.closed, learnt, laid.special) for at in places if end <= at <= begin]
        cursor = between[0] if between else end
    return found or [("", 0)]


def anchors(message: Mapping[str, Any], text: str, at: int) -> Iterator[tuple[int, int]]:
    """Where the text has what a message says, from `at` on."""
    said = [text_of(message.get("content"))]
    said += [message[key] for key in REASONING if isinstance(message.get(key), str)]
    said += [function["name"] for function in functions(message)]
    for words in said:
        found = text.find(words.strip(), at) if words.strip() else -1
        if found >= 0:
            yield found, found + len(words.strip())
