"""`validate --fix`: other tools' names, misplaced keys and plain typos put right in the file itself.

ruamel.yaml keeps comments, order and quoting; scalars are never read as numbers on the way, so every value stays as it
was written, but for a switch that is on where a word of ours says the same. One key moves at a time, and only where
the result reads as a better recipe of the same values and the same comments. What is not certain is left for a person,
with the reason.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from finetune_cli.recipe import yaml
from finetune_cli.recipe.expand import expand
from finetune_cli.recipe.problems import dotted, explain, misnamed
from finetune_cli.recipe.roundtrip import Document, Unsure
from finetune_cli.recipe.sections import Recipe
from finetune_cli.recipe.shape import slot
from finetune_cli.recipe.yaml import Node, Place

MOST = 100
COMMENT = re.compile(r"(?:^|\s)(#.*)$", re.M)
FOLLOWED = ("unknown key", "required key missing")
"""What may still be wrong below a key that has found its place."""


@dataclass(frozen=True)
class Move:
    """A key that gets another name or place; both are dotted."""

    key: str
    target: str
    place: Place = field(compare=False)
    value: str | None = None
    """What is written there, where a switch that is on stands for it."""

    @property
    def written(self) -> str:
        """The target, with its value where that is new."""
        return self.target if self.value is None else f"{self.target}: {self.value}"


@dataclass(frozen=True)
class Fixed:
    """The text afterwards, what was moved in it, and what was not, with the reason."""

    text: str
    moves: tuple[Move, ...]
    left: tuple[tuple[Move, str], ...]

    def to_json(self) -> dict[str, list[dict[str, str]]]:
        return {
            "moved": [{"key": move.key, "to": move.written} for move in self.moves],
            "left": [{"key": move.key, "to": move.written, "reason": reason} for move, reason in self.left],
        }


def fix(text: str, file: str, *, root: type[Recipe] = Recipe) -> Fixed:
    """Move after move until none is certain. A text that cannot be read stays as it is."""
    moves: list[Move] = []
    while True:
        left: list[tuple[Move, str]] = []
        candidates = list(misnamed_in(text, file, root))
        for move in candidates if len(moves) < MOST else ():
            try:
                text = moved(text, file, move, candidates, root)
            except Unsure as reason:
                left.append((move, str(reason)))
            else:
                moves.append(move)
                break
        else:
            return Fixed(text, tuple(moves), tuple(left))


def misnamed_in(text: str, file: str, root: type[Recipe]) -> Iterator[Move]:
    tree, error = read(text, file, root)
    if tree is not None and error is not None:
        for trail, place, target, value in misnamed(error, tree, root):
            yield Move(dotted(trail), target, place, value)


def read(text: str, file: str, root: type[Recipe]) -> tuple[Node | None, ValidationError | None]:
    """The tree in full form, and what is wrong with it; no tree where the text is no mapping."""
    tree, wrong = yaml.parse(text, file)
    if tree is None or wrong or not isinstance(tree.value, dict):
        return None, None
    tree = expand(Node({k: v for k, v in tree.value.items() if k != "extends"}, tree.place), slot(root))
    try:
        root.model_validate(tree.plain())
    except ValidationError as error:
        return tree, error
    return tree, None


def moved(text: str, file: str, move: Move, all_moves: Sequence[Move], root: type[Recipe]) -> str:
    """The text with the key in its place. Raises Unsure where a person has to look."""
    rivals = [other.key for other in all_moves if other.target == move.target and other != move]
    if rivals:
        raise Unsure(f"{', '.join([move.key, *rivals])} all stand for {move.target}; keep one")
    document = Document(text)
    if move.value is not None:
        document.write(move.place.line, move.place.column, move.value)
    document.move(move.place.line, move.place.column, move.target, shorthand=lambda key: shorthand(key, root))
    after = document.text()
    tree, error = read(after, file, root)
    before = yaml.parse(text, file)[0]
    if tree is None or before is None or values(tree) != expected(before, move) or comments(after) != comments(text):
        raise Unsure("the file cannot be rewritten without touching more than this key")
    for problem in explain(error, tree, root) if error is not None else ():
        if (problem.key + ".").startswith(move.target + ".") and not problem.message.startswith(FOLLOWED):
            raise Unsure(f"{move.target} does not take its value: {problem.message}")
    return after


def shorthand(key: str, root: type[Recipe]) -> str:
    """The field of a section that a bare value of it stands for."""
    where = slot(root).child({}, key)
    return next((spec.shorthand for spec in where.specs if spec.shorthand), "")


def values(node: Node) -> list[str]:
    """Every scalar with its type, in no order; a recipe that says the same elsewhere has the same. Where an item is
    written bare or in full makes no difference."""

    def each(node: Node) -> Iterator[Any]:
        inner = node.value.values() if isinstance(node.value, dict) else node.value
        if isinstance(node.value, dict | list):
            for child in inner:
                yield from each(child)
        else:
            yield node.value

    return sorted(map(repr, each(node)))


def expected(before: Node, move: Move) -> list[str]:
    """The scalars after a move."""
    found = values(before)
    if move.value is not None:
        found.remove(repr(True))
        found.append(repr(move.value))
    return sorted(found)


def comments(text: str) -> list[str]:
    return sorted(comment.strip() for comment in COMMENT.findall(text))
