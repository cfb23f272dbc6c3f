"""What the reader makes of a text, and what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_cli.errors import RecipeError
from finetune_cli.recipe.load import Loaded, load
from finetune_cli.recipe.sections import Recipe
from tests.unit.recipe.two_methods import GOOD, Two

Read = Callable[..., Loaded]
Says = Callable[..., list[str]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Load this text as recipe.yaml in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(text: str | bytes, *overrides: str, root: type[Recipe] = Two) -> Loaded:
        path = Path("recipe.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load(path, overrides, root=root)

    return run


@pytest.fixture
def says(read: Read) -> Says:
    """The problems of this text, as people see them; [] where it is fine."""

    def run(text: str | bytes, *overrides: str, root: type[Recipe] = Two) -> list[str]:
        try:
            read(text, *overrides, root=root)
        except RecipeError as error:
            return [str(problem) for problem in error.problems]
        return []

    return run


@pytest.fixture
def good() -> str:
    return GOOD
