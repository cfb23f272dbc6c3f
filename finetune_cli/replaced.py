"""A run that is to be replaced is put aside until its successor's rows are known to be good, and put back if not."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_cli.engine import manifest

RESULTS = ("metrics.jsonl", "report.json", "trainer_state.json")
"""Files that say that a run has begun."""
RUN_FILES = (*RESULTS, "plan.json", "recipe.yaml", "error.json", "traceback.txt", "report.html")
ASIDE = ".replaced"


def finished(folder: Path) -> bool:
    return (folder / "report.json").exists()


def used(folder: Path) -> list[str]:
    """What says that a run has begun in a folder."""
    named = [name for name in RESULTS if (folder / name).exists()]
    return named + [path.name for path in folder.glob("checkpoint-*")]


def put_aside(folder: Path) -> None:
    """Move away what a run wrote, and nothing else: what is left of an adapter would be loaded with the next result."""
    aside = folder / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for path in written(folder):
        path.rename(aside / path.name)


def written(folder: Path) -> list[Path]:
    """What a run wrote into its folder. The files of a checkpoint's model are those of the run's result too."""
    named = {Path(name).name for path in folder.glob("checkpoint-*/manifest.json") for name in _named(path)}
    named |= {manifest.BASE, "tensorboard", *RUN_FILES, *(["README.md"] if finished(folder) else [])}
    return [
        path for path in (*(folder / name for name in sorted(named)), *folder.glob("checkpoint-*")) if path.exists()
    ]


def _named(path: Path) -> list[str]:
    """The files of a checkpoint."""
    try:
        return [*json.loads(path.read_text(encoding="utf-8"))["files"]]
    except (ValueError, KeyError, TypeError):
        return []


def let_go(folder: Path) -> None:
    """The successor begins."""
    shutil.rmtree(folder / ASIDE, ignore_errors=True)


def put_back(folder: Path) -> None:
    """Make the folder what it was, where a successor did not come to begin."""
    aside = folder / ASIDE
    if not aside.is_dir():
        return
    if not used(folder):
        for path in written(folder):  # what the successor said of itself
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in aside.iterdir():
            path.rename(folder / path.name)
    let_go(folder)


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Whatever was put aside meanwhile and not let go is put back, however it ends."""
    try:
        yield
    finally:
        put_back(folder)
