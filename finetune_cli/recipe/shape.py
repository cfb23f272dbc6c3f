"""What may stand where in a recipe, read off the classes: alternatives, marks, fields, items."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from finetune_cli.spec import Spec

T = TypeVar("T")
METHOD = "method"
"""The key whose block is one of several, by its `name`."""


@dataclass(frozen=True)
class Alternative:
    """One type that a value may have, with the marks and bounds on it."""

    type: Any
    marks: tuple[Any, ...] = ()

    def mark(self, kind: type[T]) -> T | None:
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)

    @property
    def container(self) -> Any:
        """`list` or `dict` for those, else None."""
        origin = get_origin(self.type) or self.type
        return origin if origin in (list, dict) else None

    @property
    def spec(self) -> type[Spec] | None:
        return self.type if isinstance(self.type, type) and issubclass(self.type, Spec) else None


@dataclass(frozen=True)
class Slot:
    """A place in the recipe: what may stand there."""

    alternatives: tuple[Alternative, ...] = ()
    nullable: bool = True

    @property
    def specs(self) -> tuple[type[Spec], ...]:
        return tuple(a.spec for a in self.alternatives if a.spec is not None)

    def marked(self, kind: type[Any]) -> bool:
        return any(a.mark(kind) for a in self.alternatives)

    def item(self, container: type[Any]) -> "Slot":
        """What may stand in the list or mapping; any key of a mapping has the same."""
        for alternative in self.alternatives:
            if alternative.container is container and (arguments := get_args(alternative.type)):
                return slot(arguments[-1])
        return ANY

    def fields(self, value: Mapping[str, Any]) -> Mapping[str, "Slot"]:
        """The keys of the block. Of several blocks the one with its `name`, else all of them together."""
        chosen = [spec for spec in self.specs if name_of(spec) == _plain(value.get("name"))]
        merged: dict[str, Slot] = {}
        for spec in chosen if len(self.specs) > 1 and chosen else self.specs:
            merged = {**fields(spec), **merged}
        return merged

    def child(self, value: Any, step: str | int) -> "Slot":
        """What may stand at a key of this value, or at a place in this list."""
        if isinstance(value, dict) and self.specs:
            return self.fields(value).get(str(step), ANY)
        return self.item(type(value)) if isinstance(value, (dict, list)) else ANY


ANY = Slot()


def slot(annotation: Any, marks: tuple[Any, ...] = ()) -> Slot:
    found = tuple(_alternatives(annotation, marks))
    some = tuple(a for a in found if a.type is not type(None))
    return Slot(some, nullable=len(some) < len(found))


@cache
def fields(spec: type[Spec]) -> Mapping[str, Slot]:
    return {name: slot(info.annotation, tuple(info.metadata)) for name, info in spec.model_fields.items()}


def name_of(spec: type[Spec]) -> str | None:
    """The fixed name of a block that is one of several."""
    info = spec.model_fields.get("name")
    return str(info.default) if info is not None and info.default is not None and spec.shorthand == "name" else None


def methods(root: type[Spec]) -> dict[str, type[Spec]]:
    return {str(name_of(spec)): spec for spec in fields(root)[METHOD].specs}


@cache
def leaves(root: type[Spec]) -> Mapping[str, str]:
    """Leaf name -> dotted key, over all sections; names of sections and method blocks aside."""
    top = fields(root)
    found = {leaf: f"{section}.{leaf}" for section, leaf in section_leaves(root) if leaf not in top}
    return {**found, **{name: name for name, where in top.items() if not where.specs}}


def section_leaves(root: type[Spec]) -> Iterator[tuple[str, str]]:
    for section, where in fields(root).items():
        if section != METHOD:
            yield from ((section, leaf) for spec in where.specs for leaf in fields(spec))


@cache
def item_leaves(root: type[Spec]) -> Mapping[str, str]:
    """Keys of the items of lists: `columns` -> `data.train[].columns`."""
    found: dict[str, str] = {}
    for section, leaf in section_leaves(root):
        for spec in fields(root)[section].specs:
            for item in fields(spec)[leaf].item(list).specs if leaf in fields(spec) else ():
                found |= {name: f"{section}.{leaf}[].{name}" for name in fields(item) if name not in found}
    return found


def _alternatives(annotation: Any, marks: tuple[Any, ...]) -> Iterator[Alternative]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        yield from _alternatives(inner, (*marks, *_flat(more)))
    elif origin in (Union, UnionType):
        for one in get_args(annotation):
            yield from _alternatives(one, marks)
    else:
        yield Alternative(annotation, marks)


def _flat(marks: list[Any]) -> Iterator[Any]:
    for mark in marks:
        if isinstance(mark, FieldInfo):
            yield from mark.metadata
        else:
            yield mark


def _plain(node: Any) -> Any:
    return getattr(node, "value", node)
