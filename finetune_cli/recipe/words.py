"""Values and types in people's words: `a number above 0 or auto`, `text '5e-x'`."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

import annotated_types as bounds

from finetune_cli.recipe import scalars
from finetune_cli.recipe.secrets import mask
from finetune_cli.recipe.shape import Alternative, Slot
from finetune_cli.spec import OneOrMany

LONGEST = 60
YES = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def expected(slot: Slot) -> str:
    parts = list(dict.fromkeys(part for alternative in slot.alternatives for part in _parts(alternative)))
    return either([*parts, "null"] if slot.nullable and parts else parts)


def found(value: Any) -> str:
    """The value, shortened; containers only by name, secrets not at all."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {short(str(value))}"
    if isinstance(value, str):
        return f"text {short(repr(mask(value)))}" if value else "empty text"
    kind = "list" if isinstance(value, list) else "mapping"
    return f"a {kind}" if value else f"an empty {kind}"


def remedy(slot: Slot, value: Any) -> str:
    """What to write instead, where the value shows what is meant; else empty."""
    types = {alternative.type for alternative in slot.alternatives}
    if isinstance(value, str):
        number, _ = scalars.read(value.replace("_", "").replace(",", ""))
        if types & {int, float} and isinstance(number, (int, float)) and not isinstance(number, bool):
            return "take the quotes off" if scalars.read(value)[0] == number else f"write {number}"
        if bool in types and value.lower() in YES:
            return f"write {YES[value.lower()]}"
        near = close(value, [text for a in slot.alternatives for text in _literals(a)])
        return f"did you mean {near}?" if near else ""
    if value is False and "no" in (text for a in slot.alternatives for text in _literals(a)):
        return "write no, which is text in YAML 1.2"
    if int in types and isinstance(value, float) and value.is_integer():
        return f"write {short(str(int(value)))}"
    if str in types and isinstance(value, (int, float)):
        return "put it in quotes"
    return ""


def close(word: str, choices: Iterable[str], *, cutoff: float = 0.7) -> str:
    """The choice that the word is probably meant to be, or empty."""
    if not word or len(word) > LONGEST:
        return ""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower, n=1, cutoff=cutoff)
    near = near or difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else ""


def short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def one_line(text: str) -> str:
    """What cannot be printed is escaped, so that no text breaks the line or the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def either(parts: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _parts(alternative: Alternative) -> list[str]:
    kind = alternative.type
    if get_origin(kind) is Literal:
        return _literals(alternative)
    if alternative.spec is not None:
        return ["a mapping", "text"] if alternative.spec.shorthand else ["a mapping"]
    if alternative.container is list:
        items = {str: "text", int: "whole numbers", float: "numbers"}.get((get_args(kind) or (None,))[0], "")
        some = "a list with at least one item" if alternative.mark(bounds.MinLen) else "a list"
        one: list[str] = [items] if alternative.mark(OneOrMany) and items else []
        return [*one, f"{some} of {items}" if items and some == "a list" else some]
    if alternative.container is dict:
        return ["a mapping"]
    if kind is bool:
        return ["true", "false"]
    words = {str: "text", int: "a whole number", float: "a number"}
    return [words.get(kind, "another value") + _range(alternative)]


def _literals(alternative: Alternative) -> list[str]:
    return [str(value) for value in get_args(alternative.type)] if get_origin(alternative.type) is Literal else []


def _range(alternative: Alternative) -> str:
    above, least = alternative.mark(bounds.Gt), alternative.mark(bounds.Ge)
    below, most = alternative.mark(bounds.Lt), alternative.mark(bounds.Le)
    low = f" above {above.gt}" if above else f" of at least {least.ge}" if least else ""
    high = f" below {below.lt}" if below else f" of at most {most.le}" if most else ""
    if least and most:
        return f" from {least.ge} to {most.le}"
    return f"{low} and{high}" if low and high else low + high
