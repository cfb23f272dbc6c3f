"""A run that is to be replaced is put aside until its successor's rows are read and its model loaded, and put back if
that fails.

Which of three folders is there says how far it is, whenever a command is killed: `.replaced.moving` is on its way in
one direction or the other, and comes back; `.replaced` waits for the successor to begin, and comes back;
`.replaced.gone` has been let go. One becomes another by a rename.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_cli.engine import manifest

RESULTS = ("metrics.jsonl", "report.json", "trainer_state.json")
"""Files that say that a run has begun."""
RUN_FILES = (*RESULTS, "plan.json", "recipe.yaml", "error.json", "traceback.txt", "report.html")
MOVING, ASIDE, GONE = ".replaced.moving", ".replaced", ".replaced.gone"


def finished(folder: Path) -> bool:
    return (folder / "report.json").exists()


def used(folder: Path) -> list[str]:
    """What says that a run has begun in a folder."""
    named = [name for name in RESULTS if (folder / name).exists()]
    return named + [path.name for path in folder.glob("checkpoint-*")]


def waits(folder: Path) -> bool:
    """Whether a run is aside whose successor has not begun."""
    return (folder / ASIDE).is_dir()


def put_aside(folder: Path) -> None:
    """Move away what a run wrote, and nothing else: what is left of an adapter would be loaded with the next result.
    Raises OSError, and is then undone."""
    moving = folder / MOVING
    moving.mkdir()
    try:
        for path in written(folder):
            path.rename(moving / path.name)
        moving.rename(folder / ASIDE)
    except OSError:
        put_back(folder)
        raise


def written(folder: Path) -> list[Path]:
    """What a run wrote into its folder. The files of a checkpoint's model are those of the run's result too."""
    named = {Path(name).name for path in folder.glob("checkpoint-*/manifest.json") for name in _named(path)}
    named |= {manifest.BASE, "tensorboard", *RUN_FILES, *(["README.md"] if finished(folder) else [])}
    paths = [folder / name for name in sorted(named)]
    return [path for path in (*paths, *folder.glob("checkpoint-*")) if path.exists()]


def _named(path: Path) -> list[str]:
    """The files of a checkpoint."""
    try:
        return [*json.loads(path.read_text(encoding="utf-8"))["files"]]
    except (ValueError, KeyError, TypeError):
        return []


def let_go(folder: Path) -> None:
    """The successor begins."""
    if waits(folder):
        (folder / ASIDE).rename(folder / GONE)
    shutil.rmtree(folder / GONE, ignore_errors=True)


def put_back(folder: Path) -> bool:
    """Make the folder what it was, where a successor did not come to begin; whether there was anything to do."""
    let = folder / GONE
    if let.is_dir():
        shutil.rmtree(let, ignore_errors=True)
    if waits(folder):
        for path in written(folder):  # what the successor said of itself
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / ASIDE).rename(folder / MOVING)
    moving = folder / MOVING
    if not moving.is_dir():
        return False
    for path in moving.iterdir():
        path.rename(folder / path.name)
    moving.rmdir()
    return True


@contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Whatever was put aside meanwhile and not let go is put back, however it ends."""
    try:
        yield
    finally:
        put_back(folder)
