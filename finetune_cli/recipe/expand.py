"""Shorthands, paths and merging: what a file says, in full form and relative to that file."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune_cli.recipe.shape import Slot
from finetune_cli.recipe.yaml import Node
from finetune_cli.spec import InputPath, OneOrMany, OneOrNamed

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".jinja", ".gguf", ".txt", ".arrow", ".py")
FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<function>[^:/\\]+)")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def expand(node: Node, slot: Slot) -> Node:
    """The full form: `model: X` becomes `model: {name_or_path: X}`, `report_to: wandb` a list of one."""
    return _walk(node, slot, _wrap)


def absolute(node: Node, slot: Slot, folder: Path) -> Node:
    """Input paths made absolute; hub ids, `builtin:` names and names of metrics are left as they are."""

    def change(node: Node, slot: Slot) -> Node:
        if not (slot.marked(InputPath) and isinstance(node.value, str)):
            return node
        return replace(node, value=_absolute(node.value, folder))

    return _walk(node, slot, change)


def merge(base: Node, child: Node, slot: Slot) -> Node:
    """The child over the base, mapping by mapping; lists, null and a method of another name replace."""
    if not (isinstance(base.value, dict) and isinstance(child.value, dict)) or _apart(base, child, slot):
        return child
    merged = dict(base.value)
    for key, node in child.value.items():
        where = slot.child({**base.value, **child.value}, key)
        merged[key] = merge(merged[key], node, where) if key in merged else node
    # a section that an option added to stays where the file has it
    return replace(child if child.place.line else base, value=merged)


def _walk(node: Node, slot: Slot, change: Callable[[Node, Slot], Node]) -> Node:
    node = change(node, slot)
    value = node.value
    if isinstance(value, dict):
        return replace(node, value={k: _walk(v, slot.child(value, k), change) for k, v in value.items()})
    if isinstance(value, list):
        return replace(node, value=[_walk(item, slot.item(list), change) for item in value])
    return node


def _wrap(node: Node, slot: Slot) -> Node:
    if slot.marked(OneOrNamed) and _one_set(node):
        return replace(node, value={"": _inner(node)})
    if slot.marked(OneOrMany) and _one_item(node, slot):
        return replace(node, value=[_inner(node)])
    short = next((spec.shorthand for spec in slot.specs if spec.shorthand), None)
    if short is None or any(a.type is str for a in slot.alternatives):
        return node
    takes_list = any(a.container is list for a in slot.fields({}).get(short, Slot()).alternatives)
    if isinstance(node.value, str) or (takes_list and isinstance(node.value, list)):
        return replace(node, value={short: _inner(node)})
    return node


def _inner(node: Node) -> Node:
    return replace(node, key=None)


def _one_set(node: Node) -> bool:
    """A bare value, or a mapping that is one set rather than sets by name."""
    if isinstance(node.value, dict):
        return "path" in node.value and isinstance(node.value["path"].value, str)
    return isinstance(node.value, str)


def _one_item(node: Node, slot: Slot) -> bool:
    if isinstance(node.value, dict):
        return bool(slot.item(list).specs)
    return node.value is not None and not isinstance(node.value, list)


def _apart(base: Node, child: Node, slot: Slot) -> bool:
    """Two methods, or one unnamed set and sets by name: nothing of the base is kept."""
    if slot.marked(OneOrNamed):
        return ("" in base.value) != ("" in child.value)
    if any(spec.shorthand == "name" for spec in slot.specs):
        names = [node.value["name"].value for node in (base, child) if "name" in node.value]
        return len(names) == 2 and names[0] != names[1]
    return False


def _absolute(text: str, folder: Path) -> str:
    function = FUNCTION.fullmatch(text)
    if function:
        return f"{_join(function['file'], folder)}:{function['function']}"
    if not text or text.startswith("builtin:") or URL.match(text):
        return text
    looks = text.startswith((".", "/", "~")) or text.lower().endswith(SUFFIXES)
    return _join(text, folder) if looks or os.path.exists(folder / text) else text


def _join(text: str, folder: Path) -> str:
    return os.path.abspath(folder / os.path.expanduser(text))
