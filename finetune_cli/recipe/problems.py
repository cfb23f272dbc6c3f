"""What pydantic finds wrong, as problems: one a value, with its place, in people's words."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from finetune_cli.errors import Problem
from finetune_cli.recipe import shape
from finetune_cli.recipe.names import EXAMPLES, MEANT, SWITCHES
from finetune_cli.recipe.shape import METHOD, Slot, methods
from finetune_cli.recipe.unknown import Advice, unknown_key
from finetune_cli.recipe.words import close, expected, found, remedy, short
from finetune_cli.recipe.yaml import Node, Place
from finetune_cli.spec import Spec

MOST = 200
WORD = re.compile(r"\w+")
VALUE_ERRORS = frozenset((
    "literal_error", "greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short", "finite_number",
    "model_type", "model_attributes_type", "dict_type", "list_type", "string_type", "int_type", "int_from_float",
    "float_type", "bool_type", "int_parsing", "float_parsing", "bool_parsing",
))  # fmt: skip
Trail = tuple[str | int, ...]


@dataclass(frozen=True)
class Spot:
    """Where an error is: in the data, in the schema, and the value of several types that it is in, if any."""

    trail: Trail
    node: Node | None
    slot: Slot
    block: Slot
    """What may stand around it."""
    group: Trail | None = None


def explain(error: ValidationError, tree: Node, root: type[Spec]) -> list[Problem]:
    """A problem for each value or key; of a value of several types only one."""
    errors: list[Mapping[str, Any]] = list(itertools.islice(error.errors(include_url=False, include_input=False), MOST))
    spots = [locate(one["loc"], tree, root) for one in errors]
    deeper = {spot.group for spot in spots if spot.group is not None and len(spot.trail) > len(spot.group)}
    told: set[Trail] = set()
    problems = []
    for one, spot in zip(errors, spots, strict=True):
        shallow = spot.group is not None and len(spot.trail) == len(spot.group)
        if shallow and (spot.group in deeper or spot.group in told):
            continue
        if spot.group is not None:
            told.add(spot.group)
        problems.append(_problem(one, spot, tree, root))
    return problems


def locate(loc: Iterable[str | int], tree: Node, root: type[Spec]) -> Spot:
    """Follow pydantic's path through the data. It names the chosen alternative too, which is no key."""
    node: Node | None = tree
    slot = block = shape.slot(root)
    trail: Trail = ()
    group: Trail | None = None
    labelled = False
    for step in loc:
        if len(slot.alternatives) > 1 and not labelled:
            labelled = True
            group = trail if len(slot.specs) < len(slot.alternatives) else group
            continue
        value = node.value if node is not None else None
        block, slot = slot, slot.child(value if value is not None else {}, step)
        node = _step(value, step)
        trail = (*trail, step)
        labelled = False
    return Spot(trail, node, slot, block, group)


def nearest(tree: Node, trail: Sequence[str | int]) -> Node:
    """The node at the trail, or the innermost one on the way to it."""
    node = tree
    for step in trail:
        below = _step(node.value, step)
        if below is None and not isinstance(step, int):
            below = _step(_step(node.value, "") and node.value[""].value, step)  # the one unnamed set
        if below is None:
            return node
        node = below
    return node


def dotted(trail: Iterable[str | int]) -> str:
    """`data.train[0].path`; the unnamed set has no name in it."""
    key = ""
    for step in trail:
        if isinstance(step, int):
            key += f"[{step}]"
        elif step:
            key += "." * bool(key) + short(repr(step)[1:-1])
    return key


def at(place: Place, trail: Iterable[str | int], message: str) -> Problem:
    return Problem(dotted(trail), message, place.file, place.line, place.column)


def _step(value: Any, step: str | int) -> Node | None:
    if isinstance(value, dict):
        return value.get(str(step))
    inside = isinstance(value, list) and isinstance(step, int) and step < len(value)
    return value[step] if inside else None


def _problem(error: Mapping[str, Any], spot: Spot, tree: Node, root: type[Spec]) -> Problem:
    node = spot.node or nearest(tree, spot.trail)
    kind = error["type"]
    if kind == "extra_forbidden":
        return at(node.key or node.place, spot.trail, _unknown(spot, tree, root).text)
    if kind in ("missing", "union_tag_not_found"):
        trail = spot.trail if kind == "missing" else (*spot.trail, "name")
        return at(node.key or node.place, trail, _missing(trail, spot.slot, root))
    if _names_method(kind, spot.trail):
        named = nearest(tree, (METHOD, "name"))
        return at(named.place, (METHOD,), _no_method(named.value, root))
    if kind in ("value_error", "assertion_error"):
        said = error["msg"].partition(", ")[2]
        key = named_first(said, node.value)
        if key is None:
            return at(node.key or node.place, spot.trail, said)
        return at(node.value[key].key or node.value[key].place, (*spot.trail, key), said)
    if kind in VALUE_ERRORS and spot.node is not None:
        return at(node.place, spot.trail, _wrong_value(spot, root))
    return at(node.place, spot.trail, error["msg"][:1].lower() + error["msg"][1:])


def named_first(said: str, value: Any) -> str | None:
    """Of keys that do not go together, the first that a section has and that is spoken of."""
    return next((word for word in WORD.findall(said) if word in value), None) if isinstance(value, dict) else None


def misnamed(error: ValidationError, tree: Node, root: type[Spec]) -> Iterator[tuple[Trail, Place, str, str | None]]:
    """(where it is, place of the key, the dotted key that it stands for, the value of that where it is not its own) of
    every unknown key of which that is certain."""
    for one in error.errors(include_url=False, include_input=False):
        if one["type"] == "extra_forbidden":
            spot = locate(one["loc"], tree, root)
            if spot.node is None or spot.node.key is None:
                continue
            target, value = _unknown(spot, tree, root).target, None
            if not target and spot.node.value is True:
                target, value = MEANT.get(str(spot.trail[-1]), ("", None))
            if target:
                yield spot.trail, spot.node.key, target, value


def _unknown(spot: Spot, tree: Node, root: type[Spec]) -> Advice:
    valid = list(spot.block.fields(nearest(tree, spot.trail[:-1]).value))
    return unknown_key(spot.trail, valid, root, method_name(tree))


def method_name(tree: Node) -> str:
    named = nearest(tree, (METHOD, "name"))
    return named.value if isinstance(named.value, str) else ""


def _names_method(kind: str, trail: Trail) -> bool:
    return kind == "union_tag_invalid" or (kind == "literal_error" and trail == (METHOD, "name"))


def _no_method(value: Any, root: type[Spec]) -> str:
    names = list(methods(root))
    what = f"unknown method {short(repr(value))}" if isinstance(value, str) else f"a method's name, not {found(value)}"
    near = close(value, names, cutoff=0.6) if isinstance(value, str) else ""
    return f"{what}; did you mean {near}?" if near else f"{what}; the methods are {', '.join(names)}"


def _missing(trail: Trail, slot: Slot, root: type[Spec]) -> str:
    if trail[:1] == (METHOD,) and trail[1:] in ((), ("name",)):
        return f"required key missing; add `{'name' if trail[1:] else METHOD}: {next(iter(methods(root)))}`"
    example = EXAMPLES.get(".".join(str(step) for step in trail if isinstance(step, str) and step))
    example = example or EXAMPLES.get(str(trail[-1])) or f"{trail[-1]}: {expected(slot)}"
    return f"required key missing; add `{example}`"


def _wrong_value(spot: Spot, root: type[Spec]) -> str:
    value = spot.node.value if spot.node is not None else None
    key = dotted(spot.trail)
    if spot.trail == (METHOD,):
        return f"expected a method ({', '.join(methods(root))}) or a mapping with its name, found {found(value)}"
    advice = remedy(spot.slot, value)
    if isinstance(value, bool) and (key, value) in SWITCHES:
        advice = SWITCHES[key, value]
    elif value is None and spot.slot.specs and len(spot.trail) == 1:
        advice = f"add `{EXAMPLES[key]}`" if key in EXAMPLES else f"leave {key}: out, or put its keys under it"
    return f"expected {expected(spot.slot)}, found {found(value)}" + (f"; {advice}" if advice else "")


def sort_and_bound(problems: Iterable[Problem], first: str) -> Iterator[Problem]:
    """By place, the recipe's own file first; not too many."""
    order = {first: 0}
    listed = list(dict.fromkeys(problems))
    for one in listed:
        order.setdefault(one.file, len(order))
    listed.sort(key=lambda p: (order[p.file], p.line, p.column))
    yield from listed[:MOST]
    if len(listed) > MOST:
        yield Problem("", f"and {len(listed) - MOST} more", first)
