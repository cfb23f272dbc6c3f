"""Text to token ids, and which of them are trained: spans of characters become a mask that is proved, not guessed.

Two proofs, the cheaper one first. Sections: tokenizers encode what stands between special tokens by itself, so where a
span begins shortly after one, that short head, encoded alone, has to begin the ids of the section. Pieces: what
precedes the last span, encoded piece by piece, gives the first ids of the whole text, and what follows it the last.
Either way no token lies across an edge, and inference, which sees a prompt alone, sees the same ids. Where neither
holds the tokenizer's offsets decide, and a token that lies across an edge is not trained.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

from finetune_cli.data.forms import any_of
from finetune_cli.data.spans import Span, Text
from finetune_cli.errors import DataError

LONGEST_HEAD = 100


@dataclass(frozen=True, slots=True)
class Tokens:
    """Ids of one text. `straddling` tokens lie across the edge of a span and are kept out of the loss; `retokenised`
    counts the spans whose preceding text, encoded alone as inference does, is not the beginning of these ids."""

    ids: list[int]
    trained: list[bool]
    straddling: int = 0
    retokenised: int = 0


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the ids that it puts around a text by itself: BOS before it, EOS after it, or neither."""

    tokenizer: Any
    lead: tuple[int, ...]
    trail: tuple[int, ...]
    eos: int | None
    specials: Mapping[str, int]
    """Special tokens, which are never part of another token."""
    special_ids: frozenset[int]
    edges: re.Pattern[str] | None
    """Finds them, where each is a hard edge: it takes no white space with it and is no part of a word."""
    heads: dict[str, list[int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def bind(cls, tokenizer: Any) -> Self:
        # this call also clears truncation and padding that tokenizer.json may have left on in the backend
        bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        hard = tokenizer.is_fast and not any(
            token.lstrip or token.rstrip or token.single_word or token.normalized for token in added.values()
        )
        specials = {token.content: i for i, token in added.items()}
        lead, trail = tuple(full[:at]), tuple(full[at + len(bare) :])
        edges = any_of(specials) if hard else None
        return cls(tokenizer, lead, trail, tokenizer.eos_token_id, specials, frozenset(added), edges)

    def many(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text as `tokenizer(text, add_special_tokens=False)` gives them; other threads run meanwhile."""
        if not self.tokenizer.is_fast:
            return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        backend = self.tokenizer.backend_tokenizer
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def one(self, text: str) -> list[int]:
        return self.many([text])[0]

    def spans(self, text: str, spans: Sequence[Span]) -> Tokens:
        """Ids of one render, in which `spans` are trained. The render brings its own special tokens."""
        (found,) = self.batch([(text, spans)])
        if isinstance(found, DataError):
            raise found
        return found

    def batch(self, texts: Sequence[Text]) -> list[Tokens | DataError]:
        """`spans` of many texts; a DataError stands in the place of a text whose mask cannot be had."""
        texts = [(text, sorted((a, b) for a, b in spans if a < b)) for text, spans in texts]
        every = self.many([text for text, _ in texts])
        found: list[Tokens | DataError | None] = [
            self.by_sections(text, ids, spans) for (text, spans), ids in zip(texts, every, strict=True)
        ]
        left = [k for k, tokens in enumerate(found) if tokens is None]
        for k, tokens in zip(left, self.by_pieces([texts[k] for k in left], [every[k] for k in left]), strict=True):
            try:
                found[k] = tokens or self.by_offsets(texts[k][0], every[k], texts[k][1])
            except DataError as error:
                found[k] = error
        return [tokens for tokens in found if tokens is not None]

    def by_sections(self, text: str, ids: list[int], spans: Sequence[Span]) -> Tokens | None:
        """The mask, if each span begins in a proved head and ends where a special token does."""
        trained = [False] * len(ids)
        if not spans:
            return Tokens(ids, trained)
        if self.edges is None:
            return None
        marks = [(found.start(), found.end(), self.specials[found[0]]) for found in self.edges.finditer(text)]
        at = places(ids, [token for _, _, token in marks])
        if at is None or sum(map(self.special_ids.__contains__, ids)) != len(at):
            return None
        ends = [end for _, end, _ in marks]
        for a, b in spans:
            first, last = bisect_right(ends, a) - 1, bisect_left(ends, b)
            if first < 0 or last == len(ends) or ends[last] != b:
                return None
            head = self.head(text[marks[first][0] : a])
            start, stop = at[first] + len(head), at[last] + 1
            if not head or ids[at[first] : start] != head or start >= stop:
                return None
            trained[start:stop] = [True] * (stop - start)
        return Tokens(ids, trained)

    def head(self, text: str) -> list[int]:
        """Ids of what stands between a special token, included, and an answer: few texts, met again and again."""
        if len(text) > LONGEST_HEAD:
            return []
        if text not in self.heads:
            self.heads[text] = self.one(text)
        return self.heads[text]

    def by_pieces(self, texts: Sequence[Text], every: Sequence[list[int]]) -> list[Tokens | None]:
        cut = []
        for text, spans in texts:
            edges = [0, *(edge for span in spans for edge in span)]
            cut.append([*(text[a:b] for a, b in pairwise(edges[:-1])), text[edges[-1] :]])
        parts = iter(self.many([piece for pieces in cut for piece in pieces]))
        of_text = [[next(parts) for _ in pieces] for pieces in cut]
        return [proved(ids, pieces[:-1], pieces[-1]) for ids, pieces in zip(every, of_text, strict=True)]

    def by_offsets(self, text: str, ids: list[int], spans: Sequence[Span]) -> Tokens:
        if not self.tokenizer.is_fast:
            raise DataError(
                "a token lies across the edge of what is trained, and this tokenizer cannot say which",
                "Use a model with a tokenizer.json (a fast tokenizer).",
            )
        offsets = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
        places = list(widened(offsets))
        inner = [any(s <= a and b <= e for s, e in spans) for a, b in places]
        astride = sum(any(a < edge < b for span in spans for edge in span) for a, b in places)
        prompts = self.many([text[:start] for start, _ in spans])
        return Tokens(ids, inner, astride, sum(ids[: len(prompt)] != prompt for prompt in prompts))

    def closed(self, text: str, start: int) -> Tokens:
        """Ids of a plain text as `tokenizer(text)` gives them, and an end-of-sequence token if there is none yet.

        Trained from character `start`; 0 is everything.
        """
        return self.close(self.spans(text, [(start, len(text))]), start)

    def close(self, inner: Tokens, start: int) -> Tokens:
        if self.eos is None:
            raise DataError("the tokenizer has no end-of-sequence token", "Use rows of messages, or another tokenizer.")
        ids = [*self.lead, *inner.ids, *self.trail]
        ids += [] if ids[-1:] == [self.eos] else [self.eos]
        closing = len(ids) - len(self.lead) - len(inner.ids)
        trained = [start == 0] * len(self.lead) + inner.trained + [True] * closing
        return Tokens(ids, trained, inner.straddling, inner.retokenised)


def places(ids: list[int], tokens: Sequence[int]) -> list[int] | None:
    """Where each of `tokens` is in `ids`, one after the other."""
    found, last = [], -1
    try:
        for token in tokens:
            last = ids.index(token, last + 1)
            found.append(last)
    except ValueError:
        return None
    return found


def proved(ids: list[int], pieces: list[list[int]], tail: list[int]) -> Tokens | None:
    """The mask, if the pieces before the last span begin `ids` and the tail ends them: even pieces are not trained."""
    front = [token for piece in pieces for token in piece]
    middle = len(ids) - len(front) - len(tail)
    if middle <= 0 or ids[: len(front)] != front or ids[len(ids) - len(tail) :] != tail:
        return None
    trained = [k % 2 == 1 for k, piece in enumerate(pieces) for _ in piece]
    return Tokens(ids, trained + [True] * middle + [False] * len(tail))


def widened(offsets: Sequence[Span]) -> Iterator[Span]:
    """Characters of each token. Spaces that offsets leave out (`trim_offsets`) belong to the token after them."""
    before = 0
    for a, b in offsets:
        yield (min(a, before) if b > before else a), b
        before = max(before, b)
