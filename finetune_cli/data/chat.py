"""Conversations to tokens and loss masks with any chat template as it is, proved by prefix renders.

A row is one render of the beginning of a conversation. For the assistant message i
    P = render(messages[:i], add_generation_prompt=True)   what inference feeds the model
    F = render(messages[:i + 1])                           the same conversation with the answer
    C = F[len(P) : end of the turn's stop token]           what the model would have to emit
A row trains turn i only if its text starts with P + C. Turns that a longer render rewrites (earlier thinking is
stripped, say) get a row of their own, and a turn whose F does not start with P is refused, with the reason.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, NamedTuple, Self

from finetune_cli.data.tokens import Encoder, Span, Tokens
from finetune_cli.errors import DataError
from finetune_cli.types import Branch, Prompt, Row

Message = Mapping[str, Any]
Text = tuple[str, list[Span]]
"""A render and the characters of it that are trained."""
Mode = Literal["refuse", "inference", "render"]

SENTINEL = "Zq7Sentinel7qZ"
THINK = re.compile(r"<think>(.*?)</think>", re.S)
REASONING = ("reasoning_content", "thinking", "reasoning")
THINKING: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False}, {"enable_thinking": True})
HINT = "Set `trainable: false` on the message, change the row, or set model.chat_template to another template."
MISMATCH_HINT = (
    "data.template_mismatch: inference trains prompt + answer + stop as inference would see them; render trains what "
    "the template renders, to which no generation prompt leads."
)


class Mismatch(DataError):
    """The generation prompt is not in the rendered turn: no render is what inference would see."""


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


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the strings that end a turn; `types.Render` in full.

    `note` hears the id and message of what is odd and trained all the same: straddling, retokenised, no_stop,
    reasoning_lost, tools_lost,
    leading_assistant, template_kwargs, template_mismatch, message_form, control_token.
    """

    tokenizer: Any
    encoder: Encoder
    template: str | None
    stops: tuple[str, ...]
    specials: re.Pattern[str]
    template_mismatch: Mode = "refuse"
    note: Callable[[str, str], None] = lambda _id, _message: None
    tails: dict[Any, tuple[str, int]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def bind(
        cls,
        tokenizer: Any,
        *,
        template: str | None = None,
        stop_ids: Iterable[int] = (),
        template_mismatch: Mode = "refuse",
    ) -> Self:
        """`stop_ids`: the eos ids of the model's generation_config; the tokenizer's own eos is always a stop."""
        names = [tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(sorted(stop_ids))]
        stops = tuple(dict.fromkeys(name for name in names if name))
        known = {*stops, *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)}
        longest_first = sorted(known, key=lambda name: (-len(name), name))
        specials = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        template = template or tokenizer.chat_template
        return cls(tokenizer, Encoder.bind(tokenizer), template, stops, specials, template_mismatch)

    def noting(self, note: Callable[[str, str], None]) -> Self:
        return replace(self, note=note)

    def conversation(self, row: Mapping[str, Any], *, loss_on: str) -> Iterator[Row]:
        if loss_on == "completion":
            hint = "Use assistant, last_assistant or all."
            raise DataError("method.loss_on: completion needs prompt + completion, and this row has messages", hint)
        return self.rows(row, row["messages"], loss_on=loss_on)

    def completion(self, row: Mapping[str, Any], *, loss_on: str) -> Iterator[Row]:
        prompt, answer = row["prompt"], row["completion"]
        if not isinstance(prompt, str):
            first = len(prompt) if loss_on == "completion" else 0
            return self.rows(row, [*prompt, *answer], loss_on=loss_on, first=first)
        if loss_on not in ("completion", "all"):
            hint = "Use completion or all, or write prompt and completion as lists of messages."
            raise DataError(f"method.loss_on: {loss_on} needs messages, and this row has plain text", hint)
        start = len(prompt) if loss_on == "completion" else 0
        return iter([self.row(self.encoder.closed(prompt + answer, start))])

    def text(self, row: Mapping[str, Any]) -> Iterator[Row]:
        return iter([self.row(self.encoder.closed(row["text"], 0))])

    def prompt(self, row: Mapping[str, Any], shape: str) -> Prompt | None:
        """The generation prompt of the last assistant turn and that turn's answer; None where there is no turn."""
        if shape == "completion" and isinstance(row["prompt"], str):
            return Prompt([*self.encoder.lead, *self.encoder.one(row["prompt"])], row["prompt"], row["completion"])
        messages = row["messages"] if shape == "messages" else [*row.get("prompt", ()), *row.get("completion", ())]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if not last:
            return None
        turn: Turn = self.in_some_form(row, messages, lambda script: script.best(last))
        answer = text_of(messages[last].get("content")) or turn.answer[: len(turn.answer) - turn.stop]
        return Prompt(self.encoder.one(turn.prompt), turn.prompt, answer)

    def rows(self, row: Mapping[str, Any], messages: list[Message], *, loss_on: str, first: int = 0) -> Iterator[Row]:
        for i, message in enumerate(messages):
            if found := self.specials.search(text_of(message.get("content"))):
                self.note("control_token", f"message {i} ({message['role']}) contains the control token {found[0]!r}")
        turns = wanted(messages, loss_on, first)
        if turns[:1] == [0] and loss_on != "all":
            self.note("leading_assistant", "message 0 is the assistant's: nothing asks for it, it is not trained")
        use = Script.everything if loss_on == "all" else lambda script: script.texts([i for i in turns if i])
        for part, (text, spans) in enumerate(self.in_some_form(row, messages, use)):
            yield self.row(self.encoder.spans(text, spans), part=part)

    def in_some_form(self, row: Mapping[str, Any], messages: list[Message], use: "Callable[[Script], Any]") -> Any:
        """`use` of the conversation in the first form that the template renders whole; else the first refusal."""
        if not self.template:
            hint = "Set model.chat_template, use an instruct model, or write rows of text or prompt + completion."
            raise DataError("the tokenizer has no chat template, and the row has messages", hint)
        plain = [{k: v for k, v in message.items() if k != "trainable"} for message in messages]
        tools, kwargs = parsed(row.get("tools")) or None, row.get("chat_template_kwargs") or {}
        refusals: list[DataError] = []
        for name, form in forms(plain):
            script = Script(self, form, tools, kwargs, [("message_form", f"rendered with {name}")] if name else [])
            try:
                result = use(script)
            except DataError as error:
                refusals.append(error)
                if isinstance(error, Mismatch):
                    break
                continue
            for id_and_message in script.notes:
                self.note(*id_and_message)
            return result
        raise refusals[0]

    def row(self, tokens: Tokens, *, part: int = 0) -> Row:
        if tokens.straddling:
            self.note("straddling", f"{tokens.straddling} tokens lie across the edge of an answer: not trained")
        if tokens.retokenised:
            self.note("retokenised", "the prompt encoded alone, as inference does, has other ids than in this row")
        return Row([], (Branch(tokens.ids, tokens.trained),), part=part)


@dataclass
class Script:
    """One conversation, in one form, before one chat template; each beginning of it is rendered once."""

    chat: Chat
    messages: list[Message]
    tools: list[Any] | None
    kwargs: Mapping[str, Any]
    notes: list[tuple[str, str]]
    rendered: dict[Any, str] = field(default_factory=dict)

    def render(self, messages: list[Message], kwargs: Mapping[str, Any], *, prompt: bool = False) -> str:
        try:
            text = self.chat.tokenizer.apply_chat_template(
                messages, tools=self.tools, chat_template=self.chat.template, tokenize=False,
                add_generation_prompt=prompt, **{**self.kwargs, **kwargs},
            )  # fmt: skip
        except Exception as error:  # a template may raise anything
            said = " ".join(str(error).split())[:200]
            raise DataError(f"the chat template refuses the row: {type(error).__name__}: {said}", HINT) from error
        return str(text)

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
            for turn in sorted(left.values()):
                end = end_in(text, turn, self.chat) if turn.kwargs == last.kwargs else None
                if end is not None:
                    spans.append((len(turn.prompt), end))
                    del left[turn.at]
            out.insert(0, (text, spans))
        return out or [(self.upto(len(self.messages), {}), [])]

    def row_text(self, turn: Turn) -> str:
        """The render that ends in the turn; where it has no stop the next message may begin with one, so one more."""
        if turn.stop:
            return turn.full
        self.notes.append(("no_stop", f"the template does not end message {turn.at} with a stop token"))
        longer = self.upto(turn.at + 2, turn.kwargs) if turn.at + 1 < len(self.messages) else ""
        return longer if end_in(longer, turn, self.chat) else turn.full

    def everything(self) -> list[Text]:
        """One render, trained up to and including its last stop."""
        self.check_context("")
        text = self.upto(len(self.messages), {})
        end = max((text.rfind(stop) + len(stop) for stop in self.chat.stops if stop in text), default=0)
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
            if message["role"] != but and (gone := lost(message, whole) - {"reasoning"}):
                what = " and ".join(sorted(gone))
                raise DataError(f"the chat template loses the {what} of message {i} ({message['role']})", HINT)

    def best(self, i: int) -> Turn:
        """Turn i under the first thinking setting whose generation prompt its render continues, unless white space
        touches white space there and another setting avoids it. A setting other than the default is noted."""
        free = "enable_thinking" in str(self.chat.template) and "enable_thinking" not in self.kwargs
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
        if self.chat.template_mismatch == "refuse":
            shown = f"it has {prompt[c : c + 30]!r} where the turn has {full[c : c + 30]!r}"
            raise Mismatch(f"the generation prompt is not in the rendered message {i}: {shown}", MISMATCH_HINT)
        self.notes.append(
            ("template_mismatch", f"message {i} is trained by data.template_mismatch: {self.chat.template_mismatch}")
        )
        rest, stop = self.tail(i, kwargs)
        if self.chat.template_mismatch == "render":
            head, _ = self.probe(i, kwargs)
            c = shared(prompt, head)
            c = next((m.start() for m in self.chat.specials.finditer(prompt) if m.start() < c < m.end()), c)
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
        if key not in self.chat.tails:
            self.chat.tails[key] = self.stop_in(self.probe(i, kwargs)[1])
        return self.chat.tails[key]

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
        declared = [(rest.find(stop), -len(stop)) for stop in self.chat.stops if stop in rest]
        special = [(found.start(), len(found[0])) for found in self.chat.specials.finditer(rest)]
        at, size = min(declared) if declared else max(special, default=(len(rest.rstrip()), 0))
        return rest[at:], abs(size)


def end_in(text: str, turn: Turn, chat: Chat) -> int | None:
    """Where the turn ends in a render that has it as inference would; None where the render has rewritten it.

    A turn without a stop takes the one that opens the next message; anything else that follows is another turn.
    """
    if not (text.startswith(turn.prompt) and text.startswith(turn.answer, len(turn.prompt))):
        return None
    end = len(turn.prompt) + len(turn.answer)
    if turn.stop:
        return end
    follows = chat.specials.match(text, end)
    if follows is None:
        return None if text[end:].strip() else end
    return follows.end() if follows[0] in chat.stops else end


def shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def wanted(messages: list[Message], loss_on: str, first: int) -> list[int]:
    """The assistant messages that are trained, by index."""
    if loss_on == "all" and any(message.get("trainable") is False for message in messages):
        raise DataError("a message says `trainable: false`, and method.loss_on is all", "Use loss_on: assistant.")
    roles = [message["role"] if message.get("trainable") is not False else "" for message in messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant" and i >= first]
    return turns[-1:] if loss_on == "last_assistant" else turns


def text_of(content: Any) -> str:
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content or ""


def in_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def parsed(value: Any) -> Any:
    """JSON text as what it says; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def functions(message: Message) -> list[dict[str, Any]]:
    return [call.get("function", call) for call in message.get("tool_calls") or ()]


def converted(
    message: Message, *, content: Callable[[Any], Any] = lambda c: c, arguments: Callable[[Any], Any] = lambda a: a
) -> Message:
    out = {**message}
    if message.get("content") is not None:
        out["content"] = content(message["content"])
    if calls := message.get("tool_calls"):
        new = [{**function, "arguments": arguments(function.get("arguments", {}))} for function in functions(message)]
        out["tool_calls"] = [{**c, "function": f} if "function" in c else f for c, f in zip(calls, new, strict=True)]
    return out


def forms(messages: Sequence[Message]) -> Iterator[tuple[str, list[Message]]]:
    """Name and messages in the forms that templates want; arguments as text last: most templates quote them twice."""
    contents = {"": lambda c: c, "content as text": lambda c: text_of(c), "content as parts": in_parts}
    texts = {"": parsed, "arguments as JSON text": lambda a: a if isinstance(a, str) else json.dumps(a)}
    seen: list[list[Message]] = []
    for (first, content), (second, arguments) in product(contents.items(), texts.items()):
        form = [converted(message, content=content, arguments=arguments) for message in messages]
        if form not in seen:
            seen.append(form)
            yield ", ".join(filter(None, (first, second))), form


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def survives(value: Any, text: str) -> bool:
    """Whether the text has a value, stripped or not, as it is or as JSON writes it."""
    if not isinstance(value, str):
        return str(value) in text or json.dumps(value) in text
    value = value.strip()
    return value in text or any(
        json.dumps(value, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (True, False)
    )


def lost(message: Message, text: str) -> set[str]:
    """Which of a message's content, reasoning and tool calls its rendered text lacks."""
    content, printed = text_of(message.get("content")), isinstance(message.get("content"), list) and "{'type': " in text
    thoughts = [message[key] for key in REASONING if message.get(key)]
    if "<think>" in content:
        thoughts += THINK.findall(content)
    said = THINK.split(content)[::2]
    if message["role"] == "tool" and not survives(content, text):
        said = list(leaves(parsed(content)))  # a template may write JSON in its own way
    calls = [value for f in functions(message) for value in (f["name"], *leaves(parsed(f.get("arguments", {}))))]
    parts = {"content": said, "reasoning": thoughts, "tool calls": calls}
    gone = {name for name, values in parts.items() if not all(survives(value, text) for value in values)}
    return gone | ({"content"} if printed else set())
