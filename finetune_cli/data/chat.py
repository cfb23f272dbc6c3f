"""Rows of the data to rows of tokens: `types.Render` in full, bound to a tokenizer and its chat template."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from finetune_cli.data import pairs
from finetune_cli.data.forms import Message, text_of
from finetune_cli.data.spans import Mode, Script, Style, Turn, in_some_form
from finetune_cli.data.tokens import Encoder, Tokens
from finetune_cli.errors import DataError
from finetune_cli.types import Branch, Prompt, Row


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the strings that end a turn; `types.Render` in full.

    `note` hears the id and message of what is odd and trained all the same: straddling, retokenised, no_stop,
    reasoning_lost, tools_lost,
    leading_assistant, template_kwargs, template_mismatch, message_form, control_token.
    """

    tokenizer: Any
    encoder: Encoder
    specials: re.Pattern[str]
    style: Style | None
    """None where the tokenizer has no chat template."""
    note: Callable[[str, str], None] = lambda _id, _message: None

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
        style = Style(template, renderer(tokenizer, template), stops, specials, template_mismatch) if template else None
        return cls(tokenizer, Encoder.bind(tokenizer), specials, style)

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end a turn."""
        return self.style.stops if self.style else ()

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

    def pair(self, row: Mapping[str, Any]) -> Row:
        return pairs.encode(self, row)

    def prompt(self, row: Mapping[str, Any], shape: str) -> Prompt | None:
        """The generation prompt of the last assistant turn and that turn's answer; None where there is no turn."""
        if shape == "pairs":
            return None if "ids" in row else self.prompt({**row, "completion": row["chosen"]}, "completion")
        if shape == "completion" and isinstance(row["prompt"], str):
            return Prompt([*self.encoder.lead, *self.encoder.one(row["prompt"])], row["prompt"], row["completion"])
        messages = row["messages"] if shape == "messages" else [*row.get("prompt", ()), *row.get("completion", ())]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if not last:
            return None
        turn: Turn = self.in_some_form(row, messages, lambda script: script.best(last))
        answer = text_of(messages[last].get("content")) or turn.answer[: len(turn.answer) - turn.stop]
        return Prompt(self.encoder.one(turn.prompt), turn.prompt, answer)

    def feeds(self, row: Mapping[str, Any], messages: list[Message]) -> str:
        """What inference feeds the model after some messages of a row: their render with a generation prompt."""
        text: str = self.in_some_form(row, messages, lambda script: script.upto(len(messages), {}, prompt=True))
        return text

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

    def in_some_form(self, row: Mapping[str, Any], messages: list[Message], use: Callable[[Script], Any]) -> Any:
        """`use` of the conversation in the first form that the template renders whole; its notes are heard."""
        if self.style is None:
            hint = "Set model.chat_template, use an instruct model, or write rows of text or prompt + completion."
            raise DataError("the tokenizer has no chat template, and the row has messages", hint)
        result, notes = in_some_form(self.style, row, messages, use)
        for id_and_message in notes:
            self.note(*id_and_message)
        return result

    def row(self, tokens: Tokens, *, part: int = 0) -> Row:
        if tokens.straddling:
            self.note("straddling", f"{tokens.straddling} tokens lie across the edge of an answer: not trained")
        if tokens.retokenised:
            self.note("retokenised", "the prompt encoded alone, as inference does, has other ids than in this row")
        return Row([], (Branch(tokens.ids, tokens.trained),), part=part)


def renderer(tokenizer: Any, template: str) -> Callable[..., str]:
    def render(
        messages: list[Message], tools: list[Any] | None, kwargs: Mapping[str, Any], *, prompt: bool = False
    ) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt, **kwargs
            )
        )

    return render


def wanted(messages: list[Message], loss_on: str, first: int) -> list[int]:
    """The assistant messages that are trained, by index."""
    if loss_on == "all" and any(message.get("trainable") is False for message in messages):
        raise DataError("a message says `trainable: false`, and method.loss_on is all", "Use loss_on: assistant.")
    roles = [message["role"] if message.get("trainable") is not False else "" for message in messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant" and i >= first]
    return turns[-1:] if loss_on == "last_assistant" else turns
