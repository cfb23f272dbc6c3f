"""Rows of the data to rows of tokens: `types.Render` in full, bound to a tokenizer and its chat template."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from finetune_cli.data import pairs
from finetune_cli.data.forms import Message, text_of
from finetune_cli.data.sandbox import Sandbox
from finetune_cli.data.spans import Mode, Text
from finetune_cli.data.tokens import Encoder, Tokens
from finetune_cli.errors import DataError
from finetune_cli.types import Branch, Prompt, Row

Request = dict[str, Any]


@dataclass(eq=False)
class Asked:
    """What one row of the data asks for; answered together with what other rows have asked for by then.

    A request is for `answers.answer`, and its result `texts`; a plain text comes without one.
    """

    request: Request | None = None
    texts: Sequence[Text] = ()
    closes_from: int | None = None
    """Where a plain text is trained from."""
    notes: Sequence[tuple[str, str]] = ()
    tokens: list[Tokens] | None = None
    error: DataError | None = None

    @property
    def answered(self) -> bool:
        return self.tokens is not None or self.error is not None


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the strings that end a turn; `types.Render` in full.

    What it returns is made when first looked at, together with all that has been asked for until then: ask for many
    rows (of `batched`), then read them. `note` hears the id and message of what is odd and trained all the same:
    straddling, retokenised, no_stop, reasoning_lost, tools_lost, leading_assistant, template_kwargs, template_mismatch,
    message_form, control_token, unmarked.
    """

    tokenizer: Any
    encoder: Encoder
    template: str | None
    """None where the tokenizer has no chat template."""
    stops: tuple[str, ...]
    mismatch: Mode
    sandbox: Sandbox
    note: Callable[[str, str], None] = lambda _id, _message: None
    queue: list[Asked] = field(default_factory=list, repr=False)

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
        encoder, template = Encoder.bind(tokenizer), template or one_template(tokenizer.chat_template)
        settings = {
            "template": template,
            "names": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "stops": stops,
            "specials": sorted({*stops, *encoder.specials}),
            "mismatch": template_mismatch,
        }
        return cls(tokenizer, encoder, template or None, stops, template_mismatch, Sandbox(settings))

    def noting(self, note: Callable[[str, str], None]) -> Self:
        return replace(self, note=note)

    def batched(self) -> Self:
        """The same with a queue of its own, for one thread."""
        return replace(self, queue=[])

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
        return self.closed(prompt + answer, len(prompt) if loss_on == "completion" else 0)

    def text(self, row: Mapping[str, Any]) -> Iterator[Row]:
        return self.closed(row["text"], 0)

    def closed(self, text: str, start: int) -> Iterator[Row]:
        """A plain text, trained from the character `start` to the end-of-sequence token that it is given."""
        return self.later(Asked(texts=[(text, [(start, len(text))])], closes_from=start))

    def rows(self, row: Mapping[str, Any], messages: list[Message], *, loss_on: str, first: int = 0) -> Iterator[Row]:
        """Rows that train the assistant's messages from the one with index `first` on."""
        turns = wanted(messages, loss_on, first)
        if turns[:1] == [0] and loss_on != "all":
            self.note("leading_assistant", "message 0 is the assistant's: nothing asks for it, it is not trained")
        want = "all" if loss_on == "all" else "turns"
        return self.later(Asked(self.request(row, messages, want, [i for i in turns if i])))

    def pair(self, row: Mapping[str, Any]) -> Iterator[Row]:
        return pairs.encode(self, row)

    def prompt(self, row: Mapping[str, Any], shape: str) -> Prompt | None:
        """The generation prompt of the last assistant turn and that turn's answer; None where there is no turn."""
        if shape == "prompt":
            return self.question(row)
        if shape == "pairs":
            return None if "ids" in row else self.prompt({**row, "completion": row["chosen"]}, "completion")
        if shape == "completion" and isinstance(row["prompt"], str):
            return Prompt([*self.encoder.lead, *self.encoder.one(row["prompt"])], row["prompt"], row["completion"])
        messages = row["messages"] if shape == "messages" else [*row.get("prompt", ()), *row.get("completion", ())]
        last = max(wanted(messages, "assistant", 0), default=0)
        if not last:
            return None
        text, answer, stop = self.ask(self.request(row, messages, "prompt", [last]))
        said = text_of(messages[last].get("content")) or answer[: len(answer) - stop]
        return Prompt(self.encoder.one(text), text, said)

    def feeds(self, row: Mapping[str, Any], messages: list[Message]) -> str:
        """What inference feeds the model after some messages of a row: their render with a generation prompt."""
        return str(self.ask(self.request(row, messages, "feeds", [])))

    def question(self, row: Mapping[str, Any]) -> Prompt:
        """The generation prompt after all of a row's `prompt`, which nobody has answered yet."""
        asked = row["prompt"]
        if isinstance(asked, str):
            return Prompt([*self.encoder.lead, *self.encoder.one(asked)], asked, "")
        if asked[-1]["role"] == "assistant":
            raise DataError("the prompt ends with the assistant's own message, so nothing is asked")
        text = self.feeds(row, asked)
        return Prompt(self.encoder.one(text), text, "")

    def ask(self, request: Request) -> Any:
        (reply,) = self.sandbox.answers([request])
        if "error" in reply:
            raise DataError(*reply["error"])
        for id_and_message in reply["notes"]:
            self.note(*id_and_message)
        return reply["result"]

    def request(self, row: Mapping[str, Any], messages: list[Message], want: str, turns: list[int]) -> Request:
        if not self.template:
            hint = "Set model.chat_template, use an instruct model, or write rows of text or prompt + completion."
            raise DataError("the tokenizer has no chat template, and the row has messages", hint)
        tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
        return {"want": want, "turns": turns, "messages": messages, "tools": tools, "kwargs": kwargs}

    def later(self, asked: Asked) -> Iterator[Row]:
        self.queue.append(asked)
        return self.answered(asked)

    def answered(self, asked: Asked) -> Iterator[Row]:
        if not asked.answered:
            self.flush()
        if asked.error is not None:
            raise asked.error
        for id_and_message in asked.notes:
            self.note(*id_and_message)
        for part, tokens in enumerate(asked.tokens or ()):
            yield self.row(tokens, part=part)

    def flush(self) -> None:
        """Answer all that has been asked for: one exchange with the templates' process, one call of the tokenizer."""
        asked = self.queue[:]
        self.queue.clear()
        rendered = [one for one in asked if one.request is not None]
        replies = self.sandbox.answers([one.request for one in rendered if one.request is not None])
        for one, reply in zip(rendered, replies, strict=True):
            if "error" in reply:
                one.error = DataError(*reply["error"])
            else:
                one.texts, one.notes = reply["result"], reply["notes"]
                if not all(is_unicode(text) for text, _ in one.texts):
                    one.texts = []
                    one.error = DataError("the row holds half of a surrogate pair, which is no character")
        found = iter(self.encoder.batch([text for one in asked for text in one.texts]))
        for one in asked:
            if one.error is None:
                self.take(one, [next(found) for _ in one.texts])

    def take(self, one: Asked, found: list[Tokens | DataError]) -> None:
        one.error = next((tokens for tokens in found if isinstance(tokens, DataError)), None)
        whole = [tokens for tokens in found if isinstance(tokens, Tokens)]
        try:
            start = one.closes_from
            one.tokens = whole if start is None else [self.encoder.close(tokens, start) for tokens in whole]
        except DataError as error:
            one.error = error

    def row(self, tokens: Tokens, *, part: int = 0) -> Row:
        if tokens.straddling:
            self.note("straddling", f"{tokens.straddling} tokens lie across the edge of an answer: not trained")
        if tokens.retokenised:
            self.note("retokenised", "the prompt encoded alone, as inference does, has other ids than in this row")
        return Row([], (Branch(tokens.ids, tokens.trained),), part=part)


def one_template(own: str | Mapping[str, str] | None) -> str | None:
    """A tokenizer may have several templates by name: rows with tools are for `tool_use`, as transformers has it."""
    if not isinstance(own, Mapping):
        return own
    if "default" not in own:
        hint = "Set model.chat_template to the one that is meant."
        raise DataError(f"the tokenizer has the chat templates {', '.join(own)} and none is the default", hint)
    if "tool_use" not in own:
        return own["default"]
    return f"{{% if tools %}}{own['tool_use']}{{% else %}}{own['default']}{{% endif %}}"


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write it; JSON can also write the half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def wanted(messages: list[Message], loss_on: str, first: int) -> list[int]:
    """The assistant messages that are trained, by index."""
    if loss_on == "all" and any(message.get("trainable") is False for message in messages):
        raise DataError("a message says `trainable: false`, and method.loss_on is all", "Use loss_on: assistant.")
    roles = [message["role"] if message.get("trainable") is not False else "" for message in messages]
    turns = [i for i, role in enumerate(roles) if role == "assistant" and i >= first]
    return turns[-1:] if loss_on == "last_assistant" else turns
