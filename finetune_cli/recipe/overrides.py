"""`--set key=value`: the key by its dotted or its leaf name, the value as YAML."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune_cli.errors import Problem
from finetune_cli.recipe import secrets
from finetune_cli.recipe.expand import absolute, expand, merge
from finetune_cli.recipe.problems import at, method_name
from finetune_cli.recipe.shape import METHOD, fields, leaves, methods, slot
from finetune_cli.recipe.words import one_line, short
from finetune_cli.recipe.yaml import Node, Place, parse
from finetune_cli.spec import Spec

MOST_STEPS = 10


@dataclass(frozen=True)
class Override:
    """A value for a key. The place is the option itself, without the value where that may be a secret."""

    key: str
    value: Node


def apply(tree: Node, texts: Sequence[str], root: type[Spec]) -> tuple[Node, list[Problem]]:
    """The tree with the overrides in it. The method comes first, since it decides which keys there are."""
    problems: list[Problem] = []
    read = [one for text in texts if (one := _read(text, problems)) is not None]
    where = slot(root)
    for one in sorted(read, key=lambda one: one.key not in (METHOD, f"{METHOD}.name")):
        key = _full_key(one.key, root, method_name(tree))
        branch = absolute(expand(_branch(key, one.value), where), where, Path.cwd())
        problems += [at(node.place, trail, secrets.REFUSED) for trail, node in secrets.find(branch)]
        tree = merge(tree, branch, where)
    return tree, problems


def _read(text: str, problems: list[Problem]) -> Override | None:
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key or "" in key.split(".") or key.count(".") >= MOST_STEPS:
        start = key if re.fullmatch(r"[a-z_.]+", key) else ""  # it may be a secret
        problems.append(Problem("", "expected KEY=VALUE, such as learning_rate=1e-5", f"--set {short(start)}"))
        return None
    node, wrong = parse(raw, "") if raw.strip() else (Node(None, Place("")), [])
    hidden = secrets.is_secret(key, raw) or (node and any(secrets.find(node, (key,)))) or (wrong and raw[:1] in "{[")
    place = Place(f"--set {one_line(short(key))}=..." if hidden else f"--set {one_line(short(text))}")
    problems += [replace(one, key=key, file=place.file, line=0, column=0) for one in wrong]
    return Override(key, _at(node, place)) if node is not None else None


def _at(node: Node, place: Place) -> Node:
    """The same value, all of it from one place."""
    if isinstance(node.value, dict):
        return Node({key: _at(child, place) for key, child in node.value.items()}, place, place)
    return Node([_at(item, place) for item in node.value] if isinstance(node.value, list) else node.value, place, place)


def _full_key(key: str, root: type[Spec], method: str) -> str:
    """The dotted key of a leaf name; what is not known stays as it is, and is found out as an unknown key."""
    if "." in key or key in fields(root):
        return key
    known = [leaves(root)[key]] if key in leaves(root) else []
    if not known and method in methods(root) and key in fields(methods(root)[method]):
        known = [f"{METHOD}.{key}"]
    return known[0] if known else key


def _branch(key: str, value: Node) -> Node:
    node = value
    for step in reversed(key.split(".")):
        node = Node({step: node}, value.place, value.place)
    return node
