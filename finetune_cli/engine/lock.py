"""One run per folder: a lock that the kernel lets go of when its processes die. No torch here.

The lock is the kernel's (flock), shared by the command and the worker that it starts, so that it is free when both are
gone, however they went. Its file says who holds it. A file system shared by several machines may not carry the lock
from one to the other: there the time of the file tells whether a holder on another machine is alive.
"""

import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from finetune_cli.errors import RecipeError
from finetune_cli.log import LOGGER

NAME = "run.lock"
BEAT = 15.0
"""Seconds between signs of life."""
SILENT = 60.0
"""A holder on another machine that gave no sign for so many seconds is dead."""


class RunLock:
    """The right to write to a run folder."""

    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self.file = self._open()
        self._released = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()

    @property
    def descriptor(self) -> int:
        """For a child process to hold the lock too."""
        return self.file

    def _open(self) -> int:
        """Raises RecipeError where another run has the folder."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file)
                os.close(file)
                raise refusal(self.path.parent, holder, "is writing to") from None
            if self._is_current(file):  # not one that was removed between the two lines above
                break
            os.close(file)
        before = _holder(file)
        silent = now_of(self.path.parent) - os.fstat(file).st_mtime
        if before and before.get("host") != socket.gethostname() and silent < SILENT:
            os.close(file)
            hint = f"If it is dead, this folder is free in {SILENT - silent:.0f} seconds."
            raise refusal(self.path.parent, before, f"gave a sign of life {silent:.0f} seconds ago in", hint)
        if before:
            LOGGER.warning("the lock of a run that died (%s) is taken over", described(before))
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(mine).encode(), 0)
        return file

    def _is_current(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self.path.stat())
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            os.utime(self.file)

    def release(self) -> None:
        self._released.set()
        self._beating.join()  # it may be about to touch the file by a number that is soon another file's
        self.path.unlink(missing_ok=True)
        os.close(self.file)


def refusal(run: Path, holder: dict[str, Any], does: str, hint: str = "") -> RecipeError:
    return RecipeError(
        f"another run ({described(holder)}) {does} {run}",
        f"{hint} Wait until it has ended, or name another output_dir.".strip(),
    )


def described(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}" if holder else "just started"


def _holder(file: int) -> dict[str, Any]:
    """Who wrote the lock; empty where nobody did, or is about to."""
    try:
        value = json.loads(os.pread(file, 4096, 0) or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) and {"host", "pid", "since"} <= value.keys() else {}


def now_of(folder: Path) -> float:
    """The time by the clock of the file system, which may be another machine's."""
    probe = folder / f"{NAME}.{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
