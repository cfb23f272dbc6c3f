"""Renders of a conversation and the characters of them that are trained, with any chat template as it is.

A row is one render of the beginning of a conversation. For the assistant message i
    P = render(messages[:i], add_generation_prompt=True)   what inference feeds the model
    F = render(messages[:i + 1])                           the same conversation with the answer
    C = F[len(P) : end of the turn's stop token]           what the model would have to emit
A row trains turn i only if its text starts with P + C. Turns that a longer render rewrites (earlier thinking is
stripped, say) get a row of their own, and a turn whose F does not start with P is refused, with the reason.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, Self

from finetune_cli.data.forms import REASONING, Message, any_of, converted, in_parts, lost, text_of
from finetune_cli.errors import DataError

Span = tuple[int, int]
"""Characters from the first, included, to the second, not included."""
Text = tuple[str, Sequence[Span]]
"""A render and the characters of it that are trained."""
Mode = Literal["refuse", "inference", "render"]

SENTINEL = "Zq7Sentinel7qZ"
THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})
HINT = "Set `trainable: false` on the message, change the row, or set model.chat_template to another template."
MISMATCH_HINT = (
    "data.template_mismatch: inference trains prompt + answer + stop as inference would see them; render trains what "
    "the template renders, to which no generation prompt leads."
)


class Renders(Protocol):
    """A chat template as it is rendered: `render.Renderer`. Raises whatever the template raises."""

    source: str
    marks: bool
    """Whether the template has `{% generation %}` blocks."""

    def __call__(
        self, messages: list[Any], tools: list[Any] | None, kwargs: Mapping[str, Any], *, prompt: bool = False
    ) -> str: ...

    def marked(self, *conversation: Any) -> tuple[str, list[Span]]: ...


@dataclass(frozen=True)
class Style:
    """A chat template, and the strings that end a turn."""

    render: Renders
    stops: tuple[str, ...]
    specials: re.Pattern[str]
    mismatch: Mode = "refuse"
    tails: dict[Any, tuple[str, int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def bind(cls, render: Renders, settings: Mapping[str, Any]) -> Self:
        return cls(render, tuple(settings["stops"]), any_of(settings["specials"]), settings["mismatch"])


class Mismatch(DataError):
    """The generation prompt is not in the rendered turn: no render is what inference would see."""


class Raised(DataError):
    """The template raises."""


class Turn(NamedTuple):
    """One assistant message as text. `stop` is the length of the stop that ends `answer`, 0 where there is none."""

    at: int
    prompt: str
    answer: str
    stop: int
    full: str
    kwargs: dict[str, Any]

    @property
    def touches(self) -> bool:
        """White space on both sides of the boundary: it may become one token."""
        return self.prompt[-1:].isspace() and self.answer[:1].isspace()


@dataclass
class Script:
    """One conversation, in one form, before one chat template; each beginning of it is rendered once."""

    style: Style
    messages: list[Message]
    tools: list[Any] | None
    kwargs: Mapping[str, Any]
    notes: list[tuple[str, str]]
    rendered: dict[Any, str] = field(default_factory=dict)

    def render(self, messages: list[Message], kwargs: Mapping[str, Any], *, prompt: bool = False) -> str:
        try:
            return self.style.render(messages, self.tools, {**self.kwargs, **kwargs}, prompt=prompt)
        except Exception as error:  # a template may raise anything
            said = " ".join(str(error).split())[:200]
            raise Raised(f"the chat template refuses the row: {type(error).__name__}: {said}", HINT) from error

    def upto(self, count: int, kwargs: Mapping[str, Any], *, prompt: bool = False) -> str:
        key = (count, prompt, *kwargs.items())
        if key not in self.rendered:
            self.rendered[key] = self.render(self.messages[:count], kwargs, prompt=prompt)
        return self.rendered[key]

    def texts(self, turns: list[int]) -> list[Text]:
        """Renders that train each of `turns` once: the longest takes every turn that it renders as inference would."""
        self.check_context("assistant")
        left = {i: self.best(i) for i in turns}
        out: list[Text] = []
        while left:
            last = left[max(left)]
            text, spans = self.row_text(last), []
            marked = self.marked(last, text)
            for turn in sorted(left.values()):
                end = end_in(text, turn, self.style) if turn.kwargs == last.kwargs else None
                if end is not None:
                    if marked is None or any(a < end and b > len(turn.prompt) for a, b in marked):
                        spans.append((len(turn.prompt), end))
                    else:
                        self.notes.append(
                            ("unmarked", f"no `{{% generation %}}` block has message {turn.at}: not trained")
                        )
                    del left[turn.at]
            out.insert(0, (text, spans))
        return out or [(self.upto(len(self.messages), {}), [])]

    def row_text(self, turn: Turn) -> str:
        """The render that ends in the turn; where it has no stop the next message may begin with one, so one more."""
        if turn.stop:
            return turn.full
        self.notes.append(("no_stop", f"the template does not end message {turn.at} with a stop token"))
        longer = self.upto(turn.at + 2, turn.kwargs) if turn.at + 1 < len(self.messages) else ""
        return longer if end_in(longer, turn, self.style) else turn.full

    def marked(self, last: Turn, text: str) -> list[Span] | None:
        """What the template's own `{% generation %}` blocks enclose of the row that ends with `last` or one later.

        They tell which turns are meant to be trained. Where a turn begins and ends they do not tell: most enclose what
        the generation prompt holds already, or white space after the stop, and some leave the stop out.
        """
        if not self.style.render.marks:
            return None
        for count in (last.at + 1, last.at + 2):
            render, blocks = self.style.render.marked(self.messages[:count], self.tools, {**self.kwargs, **last.kwargs})
            if render == text:
                return blocks
        return None

    def everything(self) -> list[Text]:
        """One render, trained up to and including its last stop."""
        self.check_context("")
        text = self.upto(len(self.messages), {})
        end = max((text.rfind(stop) + len(stop) for stop in self.style.stops if stop in text), default=0)
        if not end:
            self.notes.append(("no_stop", "the template renders no stop token"))
        return [(text, [(0, end or len(text.rstrip()))])]

    def check_context(self, but: str) -> None:
        """Refuses a conversation that does not render, or of which a message (but those of a role) does not survive."""
        whole = self.upto(len(self.messages), {})
        names = [tool.get("function", tool).get("name", "") for tool in self.tools or ()]
        if missing := [name for name in names if name not in whole]:
            self.notes.append(("tools_lost", f"the template does not show the row's tools ({', '.join(missing[:3])})"))
        for i, message in enumerate(self.messages):
            if found := self.style.specials.search(text_of(message.get("content"))):
                text = f"message {i} ({message['role']}) contains the control token {found[0]!r}"
                self.notes.append(("control_token", text))
            if message["role"] != but and (gone := lost(message, whole) - {"reasoning"}):
                what = " and ".join(sorted(gone))
                raise DataError(f"the chat template loses the {what} of message {i} ({message['role']})", HINT)

    def best(self, i: int) -> Turn:
        """Turn i under the first thinking setting whose generation prompt its render continues, unless white space
        touches white space there and another setting avoids it. A setting other than the default is noted."""
        free = "enable_thinking" in str(self.style.render.source) and "enable_thinking" not in self.kwargs
        refusals: list[DataError] = []
        found: list[Turn] = []
        for kwargs in THINKING if free else THINKING[:1]:
            try:
                found.append(self.turn(i, kwargs))
            except DataError as error:
                refusals.append(error)
            if found and not found[-1].touches:
                break
        if not found:
            raise refusals[0]
        return self.noted(found[0] if found[-1].touches else found[-1])

    def noted(self, turn: Turn) -> Turn:
        if turn.kwargs:
            setting = ", ".join(f"{k}: {json.dumps(v)}" for k, v in turn.kwargs.items())
            text = f"message {turn.at} is trained with {setting}: use the same chat_template_kwargs at inference"
            self.notes.append(("template_kwargs", text))
        if lost(self.messages[turn.at], turn.answer):
            self.notes.append(("reasoning_lost", f"the template drops the reasoning of message {turn.at}"))
        return turn

    def turn(self, i: int, kwargs: dict[str, Any]) -> Turn:
        full, prompt = self.upto(i + 1, kwargs), self.upto(i, kwargs, prompt=True)
        if not full.startswith(prompt):
            return self.mismatched(i, kwargs, prompt, full)
        rest, stop = self.tail(i, kwargs)
        end = len(full) - len(rest) + stop
        if not full.endswith(rest) or end < len(prompt):
            raise DataError(f"message {i} ends unlike other turns: {full[-30:]!r}, expected {rest[-30:]!r}", HINT)
        turn = Turn(i, prompt, full[len(prompt) : end], stop, full, kwargs)
        if gone := lost(self.messages[i], turn.answer) - {"reasoning"}:
            raise DataError(
                f"the chat template loses the {' and '.join(sorted(gone))} of message {i} (assistant)", HINT
            )
        return turn

    def mismatched(self, i: int, kwargs: dict[str, Any], prompt: str, full: str) -> Turn:
        """What `template_mismatch` makes of a turn whose render does not begin with its generation prompt."""
        c = shared(full, prompt)
        if self.upto(i, kwargs).startswith(prompt[: c + 1]):
            raise DataError(f"answering in message {i} rewrites the history before it, at {full[c : c + 30]!r}", HINT)
        if self.style.mismatch == "refuse":
            shown = f"it has {prompt[c : c + 30]!r} where the turn has {full[c : c + 30]!r}"
            raise Mismatch(f"the generation prompt is not in the rendered message {i}: {shown}", MISMATCH_HINT)
        self.notes.append(
            ("template_mismatch", f"message {i} is trained by data.template_mismatch: {self.style.mismatch}")
        )
        rest, stop = self.tail(i, kwargs)
        if self.style.mismatch == "render":
            head, _ = self.probe(i, kwargs)
            c = shared(prompt, head)
            c = next((m.start() for m in self.style.specials.finditer(prompt) if m.start() < c < m.end()), c)
            return Turn(i, full[:c], full[c : len(full) - len(rest) + stop], stop, full, kwargs)
        if self.messages[i].get("tool_calls") or any(self.messages[i].get(key) for key in REASONING):
            raise Mismatch(f"template_mismatch: inference takes plain content only, and message {i} has more", HINT)
        # an answer that opens its thinking itself, where the prompt has opened it already
        answer = text_of(self.messages[i].get("content")).removeprefix(prompt[c:].strip() or SENTINEL).lstrip("\n")
        return Turn(i, prompt, answer + rest[:stop], stop, prompt + answer + rest[:stop], kwargs)

    def tail(self, i: int, kwargs: Mapping[str, Any]) -> tuple[str, int]:
        """The end of turn i's render, from its stop on, and the length of the stop. The same for turns of a kind."""
        turn, before = self.messages[i], self.messages[i - 1]["role"]
        content, calls = turn.get("content"), bool(turn.get("tool_calls"))
        kind = (isinstance(content, list), not text_of(content), calls, any(turn.get(key) for key in REASONING))
        key = (before, *kind, bool(self.tools), str(self.kwargs), *kwargs.items())
        if key not in self.style.tails:
            self.style.tails[key] = self.stop_in(self.probe(i, kwargs)[1])
        return self.style.tails[key]

    def probe(self, i: int, kwargs: Mapping[str, Any]) -> tuple[str, str]:
        """Turn i's render before and after its content, or after the arguments of its last tool call."""
        turn, mark = self.messages[i], {"x": SENTINEL}
        if turn.get("tool_calls"):
            turn = converted(turn, arguments=lambda value: json.dumps(mark) if isinstance(value, str) else mark)
        else:
            turn = {**turn, "content": in_parts(SENTINEL) if isinstance(turn.get("content"), list) else SENTINEL}
        head, found, rest = self.render([*self.messages[:i], turn], kwargs).rpartition(SENTINEL)
        if not found:
            what = "tool calls" if turn.get("tool_calls") else "content"
            raise DataError(f"the chat template loses the {what} of message {i} (assistant)", HINT)
        return head, rest

    def stop_in(self, rest: str) -> tuple[str, int]:
        """From the first declared stop, else the last special token, else (no turn end) the white space at the end."""
        declared = [(rest.find(stop), -len(stop)) for stop in self.style.stops if stop in rest]
        special = [(found.start(), len(found[0])) for found in self.style.specials.finditer(rest)]
        at, size = min(declared) if declared else max(special, default=(len(rest.rstrip()), 0))
        return rest[at:], abs(size)


def end_in(text: str, turn: Turn, style: Style) -> int | None:
    """Where the turn ends in a render that has it as inference would; None where the render has rewritten it.

    A turn without a stop takes the one that opens the next message; anything else that follows is another turn.
    """
    if not (text.startswith(turn.prompt) and text.startswith(turn.answer, len(turn.prompt))):
        return None
    end = len(turn.prompt) + len(turn.answer)
    if turn.stop:
        return end
    follows = style.specials.match(text, end)
    if follows is None:
        return None if text[end:].strip() else end
    return follows.end() if follows[0] in style.stops else end


def shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
