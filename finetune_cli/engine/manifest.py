"""Checkpoints as files: which there are, which are whole, how one is put in place and taken away. No torch here.

A folder is a checkpoint once it has its final name; what a dead process left under another name is put right by
`recover`. Its manifest holds the sha256 of every other file, and of itself.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_cli.log import LOGGER

MANIFEST = "manifest.json"
BASE = "base"
"""Folder of the base that a starting adapter was merged into."""
PREFIX = "checkpoint-"
WRITING, REPLACED, REMOVED = ".writing", ".replaced", ".removed"
"""Endings of folders that are no checkpoint yet, for a moment, and no more."""


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def found(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; folders still being written are not among them."""
    named = [p for p in run.glob(PREFIX + "*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(named, key=step_of)


def recover(run: Path) -> None:
    """Put right what a process left that died while it saved, replaced or removed a checkpoint."""
    for folder in run.glob(f"{PREFIX}*{REPLACED}"):
        name = folder.with_name(folder.name.removesuffix(REPLACED))
        if not name.exists():
            folder.rename(name)
    for ending in (WRITING, REPLACED, REMOVED):
        for folder in run.glob(f"{PREFIX}*{ending}"):
            shutil.rmtree(folder)


def seal(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest over the files of `folder`, and flush them all to the disk."""
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    value = {**about, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**value, "sha256": _digest(value)}, indent=1), encoding="utf-8")
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def place(beside: Path, folder: Path) -> None:
    """Give a sealed folder its name; what had that name is there until the new one is."""
    old = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """At once, as far as anyone can see: half a checkpoint is never left under its name."""
    gone = folder.with_name(folder.name + REMOVED)
    folder.rename(gone)
    shutil.rmtree(gone)


def prune(run: Path, *, keep: int | None, best: int | None, last: int) -> None:
    """Remove the oldest beyond `keep`; the best and the `last` that was written always stay. One with a higher number
    was damaged and passed over."""
    every = found(run)
    spare = [p for p in every if step_of(p) not in (best, last)]
    for folder in spare[: max(0, len(every) - keep)] if keep is not None else []:
        remove(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest. Raises ValueError where it is not what was written."""
    value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(value, dict) or value.pop("sha256", None) != _digest(value):
        raise ValueError("the manifest is not what was written")
    return value


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is the one that was written."""
    if not (folder / MANIFEST).exists():
        return "it has no manifest"
    try:
        files = read(folder)["files"]
    except (ValueError, KeyError):
        return "its manifest cannot be read"
    for name, digest in files.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def newest_whole(run: Path) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are named and passed over."""
    for folder in reversed(found(run)):
        problem = damage(folder)
        if problem is None:
            return folder
        LOGGER.warning("%s is passed over: %s", folder.name, problem)
    return None


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which then is flushed and takes its name; or goes, where that failed."""
    beside = path.with_name(path.name + WRITING)
    try:
        yield beside
        flush(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    with whole(path) as beside:
        beside.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
