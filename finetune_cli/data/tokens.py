"""Text to token ids, and which of them are trained: spans of characters become a mask that is proved, not guessed.

The proof: what precedes the last span, encoded piece by piece, gives the first ids of the whole text, and what follows
it the last ones. Then no token lies across an edge, and inference, which sees a prompt alone, sees the same ids.
Where that fails the tokenizer's offsets decide, and a token that lies across an edge is not trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from finetune_cli.data.spans import Span
from finetune_cli.errors import DataError


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

    @classmethod
    def bind(cls, tokenizer: Any) -> Self:
        # this call also clears truncation and padding that tokenizer.json may have left on in the backend
        bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return cls(tokenizer, tuple(full[:at]), tuple(full[at + len(bare) :]), tokenizer.eos_token_id)

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
        spans = sorted(span for span in spans if span[0] < span[1])
        if not spans:
            ids = self.one(text)
            return Tokens(ids, [False] * len(ids))
        edges = [0, *(edge for span in spans for edge in span)]
        pieces = [text[a:b] for a, b in pairwise(edges[:-1])]
        ids, *parts = self.many([text, *pieces, text[edges[-1] :]])
        return proved(ids, parts[:-1], parts[-1]) or self.by_offsets(text, ids, spans)

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
        if self.eos is None:
            raise DataError("the tokenizer has no end-of-sequence token", "Use rows of messages, or another tokenizer.")
        inner = self.spans(text, [(start, len(text))])
        ids = [*self.lead, *inner.ids, *self.trail]
        ids += [] if ids[-1:] == [self.eos] else [self.eos]
        closing = len(ids) - len(self.lead) - len(inner.ids)
        trained = [start == 0] * len(self.lead) + inner.trained + [True] * closing
        return Tokens(ids, trained, inner.straddling, inner.retokenised)


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
