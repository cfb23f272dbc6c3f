"""Plain scalars by the YAML 1.2 core schema, in both directions: `2e-5` is a number, `no` is text."""

import math
import re
from typing import Any

import yaml

MAX_DIGITS = 100

NULL = frozenset(("", "~", "null", "Null", "NULL"))
BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read(text: str) -> tuple[Any, str]:
    """The value of a plain scalar, and what is wrong with it: numbers must be finite and of a sane length."""
    if text in NULL:
        return None, ""
    if text in BOOL:
        return BOOL[text], ""
    if INT.fullmatch(text):
        if len(text) <= MAX_DIGITS:
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)), ""
        return text, f"a number of {len(text)} digits; put it in quotes if it is text"
    if FLOAT.fullmatch(text):
        value = float(text)
        return (
            (value, "") if math.isfinite(value) else (text, "the number is too large; put it in quotes if it is text")
        )
    if NOT_FINITE.fullmatch(text):
        return text, "a number must be finite; put it in quotes if it is text"
    return text, ""


def dump(data: Any) -> str:
    """YAML that `read` takes back as the same data, and other YAML readers too."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    """Quotes the text that YAML 1.2 would take for a number; PyYAML quotes by YAML 1.1."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    value, wrong = read(text)
    plain = isinstance(value, str) and not wrong
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else "'")


_Dumper.add_representer(str, _text)
