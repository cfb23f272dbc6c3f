"""Tokens and passwords in a recipe: found, refused, and never shown."""

import re
from collections.abc import Iterator

from finetune_cli.recipe.yaml import Node

REFUSED = "looks like a secret; use HF_TOKEN / WANDB_API_KEY in the environment"

VALUE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|xox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|AIza[A-Za-z0-9_-]{30,}|wandb_v1_[A-Za-z0-9_-]{16,}|eyJ[A-Za-z0-9_-]{10,400}\.eyJ[A-Za-z0-9_.-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
NAME = re.compile(
    r"(?:^|[_.-])(?:password|passwd|passphrase|secret|token|credentials?|apikey"
    r"|(?:api|access|private|secret|auth|wandb|hf|hub)[_-]?key)$",
    re.IGNORECASE,
)
ORDINARY = re.compile(r"(?:^|_)(?:stop|eos|bos|pad|unk|sep|cls|mask|image|video|audio|start|end|special|think)_token$")
"""Names of tokens of a vocabulary."""
KEY = re.compile(r"(?:^|[_.-])key$", re.IGNORECASE)
OPAQUE = re.compile(r"[A-Za-z0-9_/+=-]{20,}")


def is_secret(name: str, value: object) -> bool:
    """By its look, or by the name of its key."""
    if not isinstance(value, str) or not value:
        return False
    named = bool(NAME.search(name)) and not ORDINARY.search(name)
    return named or bool(VALUE.search(value)) or bool(KEY.search(name) and OPAQUE.fullmatch(value))


def find(node: Node, trail: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Node]]:
    name = next((step for step in reversed(trail) if isinstance(step, str)), "")
    if is_secret(name, node.value):
        yield trail, node
    elif isinstance(node.value, dict):
        for key, child in node.value.items():
            yield from find(child, (*trail, key))
    elif isinstance(node.value, list):
        for index, child in enumerate(node.value):
            yield from find(child, (*trail, index))


def mask(text: str) -> str:
    return VALUE.sub("***", text)
