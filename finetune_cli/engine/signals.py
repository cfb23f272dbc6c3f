"""Signals: the first asks the run to end after the step it is in, a second one ends it at once. No torch here.

Schedulers signal every process of a job, terminals a whole group, and parents and launchers pass on what they get, so
that one request arrives several times: what comes within TOGETHER seconds of the first is the same request.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from finetune_cli.log import LOGGER

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; a scheduler's request to end; Slurm's warning before the time is up (`--signal=USR1@60`)."""
TOGETHER = 1.0


def exit_code(number: int) -> int:
    """130 for Ctrl-C, 143 for what a scheduler sends: SIGTERM, and SIGUSR1 ends a run in the same way."""
    return 130 if number == signal.SIGINT else 143


def killed_by(code: int) -> signal.Signals | None:
    """The signal that an exit code tells of: negative as Python has it, above 128 as shells and launchers have it."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number) if number in set(signal.Signals) else None


class Interrupted(Exception):
    """A signal asked the run to end. `saved` is the checkpoint that it left, None before the first step."""

    def __init__(self, number: int, *, step: int = 0, saved: str | None = None) -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.step, self.saved = number, step, saved

    @property
    def exit_code(self) -> int:
        return exit_code(self.number)


class Stop:
    """Whether this process has been asked to end, and by what."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.patient = False
        """Whether someone looks at `number` between steps; before the first there is nothing to save."""
        self._heard = threading.Event()
        self._first = 0.0
        self._parent = os.getppid()

    def listen(self) -> None:
        """Take the signals from here on; those that came while they were blocked come now."""
        out, into = os.pipe()
        os.set_blocking(into, False)
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)
        for number in CAUGHT:
            signal.signal(number, _noted)
        # a thread of its own: the main one may be inside a long computation, or wait for a process that is gone
        threading.Thread(target=self._read, args=(out,), daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)

    def _read(self, out: int) -> None:
        while True:
            for number in os.read(out, 64):
                if number in CAUGHT:
                    self.hear(number, time.monotonic())

    def hear(self, number: int, now: float) -> None:
        """A signal arrived at `now` seconds."""
        if self.number is None:
            if not self.patient:  # before `number` is there for another thread to see, which would go on with it
                leave(number)
            self.number, self._first = number, now
            self._heard.set()
            name = signal.Signals(number).name
            LOGGER.warning("%s: the run is saved and ends after this step; a second one ends it at once", name)
        elif now - self._first > TOGETHER:
            leave(number)

    @property
    def wanted(self) -> bool:
        """Asked to end; or the command that started this process is gone, and nobody would end it later."""
        if self.number is None and self.patient and os.getppid() != self._parent:
            self.hear(signal.SIGTERM, time.monotonic())
        return self.number is not None

    def asked_together(self) -> bool:
        """Whether this process has been asked to end, or is within a moment: another process that was asked with it may
        have left already, which looks like a failure from here."""
        return self._heard.wait(TOGETHER if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0)


def end_early() -> None:
    """Until something is running, a signal ends this process quietly, with the exit code of a run that it ends."""
    for number in CAUGHT:
        signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise SystemExit(exit_code(number))


def leave(number: int) -> NoReturn:
    """End this process at once. Whatever is half written has another name than what is whole."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(exit_code(number))


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread has it; a handler in Python is what makes the interpreter write to it."""


@contextmanager
def held_back() -> Iterator[None]:
    """Signals wait meanwhile, for this process and for those it starts: these take them once they listen."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
