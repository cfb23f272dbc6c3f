"""The cells of one row, each read with its type checked; every error names the file, the row and the column."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from finetune_cli.data.forms import REASONING, decoded
from finetune_cli.data.readers import described
from finetune_cli.errors import DataError, Problem

ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "observation": "tool", "function_call": "function_call",
}  # fmt: skip
"""Names of roles in files -> ours; `function_call` is an assistant's message that calls tools."""

RENDER = ("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize")
"""Arguments of a render that `chat_template_kwargs` may not set."""


class EmptyValue(DataError):
    """A value that has to say something is empty or null."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A row as it is in the file, its columns under our names. `source` counts over all sources of a set, from 0;
    `wrong` says why nothing can be made of it, whatever its columns hold."""

    values: Mapping[str, Any]
    source: int
    file: str
    row: int
    line: int = 0
    wrong: Problem | None = None

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else f"{self.file} row {self.row}"

    def problem(self, message: str, *, rule: str, field: str = "") -> Problem:
        key = field if self.line else " ".join(filter(None, (f"row {self.row}", field)))
        return Problem(key, message, file=self.file, line=self.line, column=int(self.line > 0), rule=rule)


def places(raws: Iterable[Raw]) -> str:
    """Where some rows are: `train.jsonl:3, 9`, or `train.json rows 2, 8` where rows have no line of their own."""
    by_file: dict[str, list[Raw]] = {}
    for raw in raws:
        by_file.setdefault(Path(raw.file).name, []).append(raw)
    told = []
    for name, some in by_file.items():
        between = ":" if some[0].line else " rows " if len(some) > 1 else " row "
        told.append(f"{name}{between}{', '.join(str(raw.line or raw.row) for raw in some)}")
    return ", ".join(told)


@dataclass(frozen=True)
class Cells:
    """The columns of one row, each read with its type checked."""

    raw: Raw
    roles: Mapping[str, str]

    def fail(self, field: str, value: Any, wanted: str, *, empty: bool = False, hint: str = "") -> NoReturn:
        said = f"is {described(value)}, expected {wanted}"
        problem = self.raw.problem(said, rule="empty" if empty else "malformed", field=field)
        raise (EmptyValue if empty else DataError)(f"{self.raw.place}: {field} {said}", hint, problems=(problem,))

    def get(self, field: str) -> Any:
        if field not in self.raw.values:
            self.missing(field)
        return self.raw.values[field]

    def missing(self, field: str) -> NoReturn:
        said = f"the row has no {field}, as other rows have; it has {', '.join(self.raw.values) or 'no columns'}"
        problem = self.raw.problem(said, rule="malformed")
        raise DataError(f"{self.raw.place}: {said}", "Keep rows of one shape in a file.", problems=(problem,))

    def text(self, field: str, *, blank: bool = False) -> str:
        value = self.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            return value or "" if blank else self.fail(field, value, "text", empty=True)
        return value if isinstance(value, str) else self.fail(field, value, "text")

    def optional(self, field: str) -> str:
        said = self.text(field, blank=True) if field in self.raw.values else ""
        return said if said.strip() else ""

    def object_or_json(self, field: str, kind: type, wanted: str) -> Any:
        """An optional column that may also be JSON text; None where it says nothing."""
        value = self.raw.values.get(field)
        value = None if isinstance(value, str) and not value.strip() else value
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            self.fail(field, value, f"{wanted}, or JSON text of one")
        return (value if isinstance(value, kind) else self.fail(field, value, wanted)) if value else None

    def extras(self) -> dict[str, Any]:
        tools = self.object_or_json("tools", list, "a list of tools")
        kwargs = self.object_or_json("chat_template_kwargs", dict, "an object")
        for i, tool in enumerate(tools or ()):
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name", ""), str):
                self.fail(f"tools[{i}]", tool, "an object with name, description and parameters")
        if taken := [key for key in kwargs or () if key in RENDER]:
            self.fail(f"chat_template_kwargs.{taken[0]}", kwargs[taken[0]], "nothing: it is not the row's to set")
        bare = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()]
        return ({"tools": bare} if bare else {}) | ({"chat_template_kwargs": kwargs} if kwargs else {})

    def messages(self, field: str) -> list[dict[str, Any]]:
        value = self.get(field)
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list):
            self.fail(field, value, "a list of messages", empty=value is None)
        if not value:
            self.fail(field, value, "at least one message", empty=True)
        return [self.message(f"{field}[{i}]", message) for i, message in enumerate(value)]

    def conversation(self, field: str) -> dict[str, Any]:
        messages = self.messages(field)
        if system := self.optional("system"):
            if messages[0]["role"] == "system":
                self.fail("system", system, f"nothing, because {field} begins with a system message")
            messages = [{"role": "system", "content": system}, *messages]
        return {"messages": messages, **self.extras()}

    def message(self, field: str, value: Any) -> dict[str, Any]:
        named = ("role", "content") if isinstance(value, dict) and "role" in value else ("from", "value")
        if not isinstance(value, dict) or named[0] not in value:
            self.fail(field, value, "an object with role and content (or from and value)")
        role = self.role(f"{field}.{named[0]}", value[named[0]])
        said = {k: v for k, v in value.items() if k not in named and v is not None}
        if role == "function_call":
            calls = self.calls(f"{field}.{named[1]}", decoded(value.get(named[1])))
            self.check_trainable(field, said, role)
            return {"role": "assistant", "content": "", **said, "tool_calls": calls}
        if said.get("tool_calls") == []:  # as some tools write a turn that calls none
            del said["tool_calls"]
        if "tool_calls" in said:
            said["tool_calls"] = self.calls(f"{field}.tool_calls", said["tool_calls"])
        self.check_trainable(field, said, role)
        if named[1] not in value and "tool_calls" not in said:
            self.fail(field, value, f"an object with {' and '.join(named)}")
        content = self.content(f"{field}.{named[1]}", value.get(named[1]), role, said)
        return {"role": role, "content": content, **said}

    def check_trainable(self, field: str, said: Mapping[str, Any], role: str) -> None:
        own = role in ("assistant", "function_call")
        if not isinstance(said.get("trainable", True), bool) or ("trainable" in said and not own):
            self.fail(f"{field}.trainable", said["trainable"], "true or false, on an assistant's message")

    def role(self, field: str, name: Any) -> str:
        if not isinstance(name, str) or name not in self.roles:
            hint = f"Map it with `roles: {{assistant: [{name}]}}` under the source." if isinstance(name, str) else ""
            self.fail(field, name, f"one of {', '.join(self.roles)}", hint=hint)
        return self.roles[name]

    def content(self, field: str, value: Any, role: str, said: Mapping[str, Any]) -> Any:
        if isinstance(value, list):
            for i, part in enumerate(value):
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    self.fail(f"{field}[{i}]", part, "a part {type: text, text: ...}; images and sound are not read")
        elif value is not None and not isinstance(value, str):
            self.fail(field, value, "text")
        text = value if isinstance(value, str) else "".join(part["text"] for part in value or ())
        acts = role == "assistant" and any(said.get(key) for key in ("tool_calls", *REASONING))
        if not text.strip() and not acts and (value is None or role in ("user", "assistant")):
            self.fail(field, value, "text", empty=True)
        return "" if value is None else value

    def calls(self, field: str, value: Any) -> list[dict[str, Any]]:
        calls = [value] if isinstance(value, dict) else value
        wanted = "tool calls with a name and arguments (an object, or its JSON text)"
        if not isinstance(calls, list) or not calls:
            self.fail(field, value, wanted)
        return [self.call(f"{field}[{i}]", call, wanted) for i, call in enumerate(calls)]

    def call(self, field: str, call: Any, wanted: str) -> dict[str, Any]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            self.fail(field, call, wanted)
        arguments = decoded(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            self.fail(f"{field}.arguments", arguments, wanted)
        outer = {k: v for k, v in call.items() if k != "function" and v is not None} if "function" in call else {}
        return {"type": "function", **outer, "function": {**function, "arguments": arguments}}

    def instruction(self) -> dict[str, Any]:
        """Alpaca's columns: the user says instruction and input, the assistant output."""
        turns = [("system", self.optional("system"))]
        history = self.raw.values.get("history") or []
        if not isinstance(history, list):
            self.fail("history", history, "a list of pairs [question, answer]")
        for i, pair in enumerate(history):
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
                self.fail(f"history[{i}]", pair, "a pair [question, answer]")
            if not all(said.strip() for said in pair):
                self.fail(f"history[{i}]", pair, "a pair [question, answer] that says something", empty=True)
            turns += [("user", pair[0]), ("assistant", pair[1])]
        asked = "\n\n".join(filter(None, (self.text("instruction"), self.optional("input"))))
        turns += [("user", asked), ("assistant", self.text("output"))]
        return {"messages": [{"role": r, "content": t} for r, t in turns if r != "system" or t], **self.extras()}

    def completion(self) -> dict[str, Any]:
        prompt, answer = self.get("prompt"), self.get("completion")
        if not isinstance(prompt, list | dict) and not isinstance(answer, list | dict):
            return {"prompt": self.plain("prompt"), "completion": self.text("completion")}
        if not (isinstance(prompt, list | dict) and isinstance(answer, list | dict)):
            self.fail("completion", answer, f"the kind of prompt, which is {described(prompt)}")
        return {"prompt": self.messages("prompt"), "completion": self.messages("completion"), **self.extras()}

    def plain(self, field: str) -> str:
        """Text that no template renders, so that nothing which belongs to a template may stand beside it."""
        if extras := self.extras():
            self.fail(field, self.get(field), f"messages, because the row has {' and '.join(extras)}")
        return self.text(field)

    def as_is(self) -> dict[str, Any]:
        """All columns; for shapes that no method here takes yet."""
        return {**self.raw.values}

    def question(self, field: str) -> dict[str, Any]:
        """A prompt alone, under our name for it."""
        if isinstance(self.get(field), list | dict):
            return {"prompt": self.messages(field), **self.extras()}
        return {"prompt": self.plain(field)}

    def tokens(self, suffix: str = "") -> dict[str, Any]:
        """{input_ids, trained?} as they are: -100 in `labels` is not trained. `suffix` names a side of a pair."""
        name, labels = f"input_ids{suffix}", self.raw.values.get(f"labels{suffix}")
        ids = self.get(name)
        if ids is None or ids == []:
            self.fail(name, ids, "at least one token", empty=True)
        if not whole_numbers(ids) or min(ids) < 0:
            self.fail(name, ids, "a list of token ids")
        mask = self.raw.values.get("attention_mask")
        if mask is not None and (not whole_numbers(mask) or 0 in mask):
            self.fail("attention_mask", mask, "ones alone: rows are read without padding")
        if labels is None:
            return {"input_ids": ids}
        if not whole_numbers(labels) or len(labels) != len(ids):
            self.fail(f"labels{suffix}", labels, f"{len(ids)} labels, as many as {name}")
        if wrong := [i for i, (label, token) in enumerate(zip(labels, ids, strict=True)) if label not in (-100, token)]:
            self.fail(f"labels{suffix}[{wrong[0]}]", labels[wrong[0]], f"-100, or {ids[wrong[0]]} as in {name}")
        return {"input_ids": ids, "trained": [label != -100 for label in labels]}


def whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)
