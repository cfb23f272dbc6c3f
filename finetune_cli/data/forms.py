"""Messages in the forms that chat templates want them, and what of a message its rendered text has lost."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

Message = Mapping[str, Any]
THINK = re.compile(r"<think>(.*?)</think>", re.S)
REASONING = ("reasoning_content", "thinking", "reasoning")


def plain(message: Message) -> dict[str, Any]:
    """A message as transformers hands it to templates: no key without a value, reasoning under all its names."""
    out = {key: value for key, value in message.items() if value is not None and key != "trainable"}
    thought = next((out[key] for key in REASONING if key in out), None)
    return out if thought is None else {"thinking": thought, **out, "reasoning_content": thought}


def text_of(content: Any) -> str:
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else content or ""


def in_parts(content: Any) -> Any:
    """Text as a part; no content at all (beside tool calls) stays none."""
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
    if (new_content := content(message.get("content"))) is not None:
        out["content"] = new_content
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


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds the longest of some strings."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def decoded(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
