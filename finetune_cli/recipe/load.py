"""A recipe file to a Recipe: reads it and its bases, applies `--set`, and says all that is wrong at once."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_cli.errors import Problem, RecipeError
from finetune_cli.recipe import overrides as options
from finetune_cli.recipe import scalars, secrets, yaml
from finetune_cli.recipe.expand import absolute, expand, merge
from finetune_cli.recipe.problems import at, explain, nearest, sort_and_bound
from finetune_cli.recipe.sections import Recipe
from finetune_cli.recipe.shape import slot
from finetune_cli.recipe.words import one_line
from finetune_cli.recipe.yaml import Node, Place

MOST_BASES = 10


@dataclass(frozen=True)
class Loaded:
    """A valid recipe, and where each of its values was written."""

    recipe: Recipe
    data: dict[str, Any]
    """What was written: full form, bases and `--set` merged in, input paths absolute; no defaults."""
    path: Path
    name: str
    """The file as it is shown: relative to the working directory where it is below it."""
    tree: Node = field(repr=False)

    def problem(self, key: str, message: str, *, rule: str = "", severity: str = "error") -> Problem:
        """A problem at a dotted key (`data.train[0].path`, `data.train.0.path`), or at what is around it."""
        steps = re.findall(r"[^.\[\]]+", key)
        trail = [int(step) if re.fullmatch("[0-9]{1,9}", step) else step for step in steps]
        node = nearest(self.tree, trail)
        place = node.key or node.place
        return Problem(key, message, place.file, place.line, place.column, rule, severity)

    def dump(self) -> str:
        """The recipe as one YAML file that stands alone."""
        return scalars.dump(_unnamed(self.data))


def load(path: Path, overrides: Sequence[str] = (), *, root: type[Recipe] = Recipe) -> Loaded:
    """Raises RecipeError with every problem of the recipe, its bases and the overrides."""
    name = shown(path)
    problems: list[Problem] = []
    tree = _read(path, name, root, problems, ())
    if tree is None:
        raise _error(name, problems)
    tree, found = options.apply(replace(tree, place=Place(name, 1, 1)), overrides, root)
    problems += found
    tree = _home(tree)
    data = tree.plain()
    try:
        recipe = root.model_validate(data)
    except ValidationError as error:
        told = {(one.file, one.line, one.column) for one in problems}
        found = explain(error, tree, root)
        problems += [one for one in found if (one.file, one.line, one.column) not in told]
    if problems:
        raise _error(name, problems)
    return Loaded(recipe, data, path, name, tree)


def _unnamed(data: Any) -> Any:
    """The one unnamed evaluation set as it is written: without a name."""
    if isinstance(data, dict):
        return _unnamed(data[""]) if list(data) == [""] else {key: _unnamed(value) for key, value in data.items()}
    return data


def shown(path: Path) -> str:
    """Relative to the working directory where the file is below it, else as given."""
    try:
        return str(Path(os.path.abspath(path)).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _error(name: str, problems: list[Problem]) -> RecipeError:
    """No problem shows a secret, whatever text it is made of."""
    listed = sort_and_bound(problems, name)
    safe = [replace(p, key=_safe(p.key), message=_safe(p.message), file=_safe(p.file)) for p in listed]
    return RecipeError(f"{_safe(name)} is not a valid recipe", problems=tuple(safe))


def _safe(text: str) -> str:
    return one_line(secrets.mask(text))


def _read(
    path: Path,
    name: str,
    root: type[Recipe],
    problems: list[Problem],
    above: tuple[str, ...],
    asked: Place | None = None,
) -> Node | None:
    """The tree of a file with its bases merged in; None where one cannot be read. `above` extend this one."""
    node, wrong = _parse(path, name, asked or Place(name))
    problems += wrong
    if node is None:
        return None
    where = slot(root)
    bases = node.value.get("extends")
    node = replace(node, value={key: child for key, child in node.value.items() if key != "extends"})
    node = absolute(expand(node, where), where, Path(os.path.abspath(path)).parent)
    problems += [at(found.place, trail, secrets.REFUSED) for trail, found in secrets.find(node)]
    if bases is None or bases.value is None:
        return node
    base = _base(bases, path, root, problems, (*above, os.path.realpath(path)))
    return None if base is None else merge(base, node, where)


def _parse(path: Path, name: str, asked: Place) -> tuple[Node | None, list[Problem]]:
    try:
        with path.open("rb") as file:
            raw = file.read(yaml.MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or "it cannot be read"
        reason = "no such file" if isinstance(error, FileNotFoundError) else reason[:1].lower() + reason[1:]
        return None, [
            at(asked, ("extends",) if asked.line else (), f"{reason}: {name}" if asked.file != name else reason)
        ]
    text, wrong = yaml.decode(raw, name)
    if wrong:
        return None, wrong
    node, wrong = yaml.parse(text, name)
    if node is not None and not isinstance(node.value, dict):
        empty = node.value is None
        message = "the file is empty" if empty else "expected a mapping: `method:`, `model:`, `data:`, ..."
        return None, [*wrong, yaml.problem(Place(name, 1, 1) if empty else node.place, message)]
    return node, wrong


def _base(
    written: Node, path: Path, root: type[Recipe], problems: list[Problem], above: tuple[str, ...]
) -> Node | None:
    """The tree of the file that `extends` names."""
    value, place = written.value, written.place
    if not isinstance(value, str) or not value:
        problems.append(at(place, ("extends",), "expected the path of one recipe file"))
        return None
    if "://" in value:
        problems.append(at(place, ("extends",), "only a local file can be extended"))
        return None
    base = path.parent / os.path.expanduser(value)
    if os.path.realpath(base) in above:
        problems.append(at(place, ("extends",), f"{shown(base)} extends itself"))
        return None
    if len(above) > MOST_BASES:
        problems.append(at(place, ("extends",), f"more than {MOST_BASES} files extend one another"))
        return None
    return _read(base, shown(base), root, problems, above, place)


def _home(tree: Node) -> Node:
    """`~` of output_dir written out."""
    node = tree.value.get("output_dir")
    if node is None or not isinstance(node.value, str):
        return tree
    return replace(tree, value={**tree.value, "output_dir": replace(node, value=os.path.expanduser(node.value))})
