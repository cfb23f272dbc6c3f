"""Where the files that come with finetune are: inside the installed package, or at the root of a source checkout."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def recipes_folder() -> Path:
    """Runnable recipes, their data under `data/`, and what `finetune init` writes under `templates/`."""
    return _folder("recipes")


def schemas_folder() -> Path:
    """JSON Schemas of the recipe and of the plan."""
    return _folder("schemas")


def _folder(name: str) -> Path:
    shipped = PACKAGE / "_shipped" / name
    return shipped if shipped.is_dir() else PACKAGE.parent / name
