"""Rules on what the recipe names: rows, templates and metrics that must be there."""

from collections.abc import Iterator
from pathlib import Path

from finetune_cli.errors import Problem
from finetune_cli.recipe.load import Loaded
from finetune_cli.recipe.sections import Source

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def files(loaded: Loaded) -> Iterator[Problem]:
    """A problem for each path that is not there."""
    recipe = loaded.recipe
    for number, source in enumerate(recipe.data.train):
        yield from missing(loaded, f"data.train.{number}.path", source)
    for name, source in (recipe.data.eval_sets or {}).items():
        yield from missing(loaded, f"data.eval_sets.{name}.path" if name else "data.eval_sets.path", source)
    template = recipe.model.chat_template
    if template is not None and not Path(template).is_file():
        yield loaded.problem("model.chat_template", f"{template} does not exist")
    script = (recipe.eval.metric or "").rpartition(":")[0]
    if script.endswith(".py") and not Path(script).exists():
        yield loaded.problem("eval.metric", f"{script} does not exist")
    for key, path in recipe.method.scripts():
        if not Path(path).exists():
            yield loaded.problem(key, f"{path} does not exist")


def missing(loaded: Loaded, key: str, source: Source) -> Iterator[Problem]:
    path = Path(source.path)
    if path.is_absolute() and not path.exists():
        beside = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES) if path.parent.is_dir() else []
        hint = f"; that folder has {', '.join(beside[:5])}" if beside else ""
        yield loaded.problem(key, f"{path} does not exist{hint}")
    elif path.is_file() and path.suffix.lower() not in SUFFIXES:
        yield loaded.problem(key, f"{path.name} is of a kind that is not read; use {', '.join(SUFFIXES)}")
