"""The launchers of several machines keep in touch: one that fails, or falls silent, ends all of them. No torch.

A collective waits for half an hour for a machine whose cable is pulled, and a process that waits in one hears nothing
else. So the launchers speak beside the training: the first listens, the others call it, each says `beat` every few
seconds, and whoever fails says why, which the first passes on.
"""

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

BEAT, SILENT, COME = 2.0, 30.0, 600.0
"""Seconds between beats; after which a machine is taken for gone; that machines have to come at the start."""

LOST = "lost touch with another process of the run"
"""How a worker's error begins that is another one's failure."""


@dataclass
class Line:
    """A connection with one machine."""

    channel: socket.socket
    heard: float
    machine: int | None = None
    done: bool = False
    unread: bytes = b""

    def say(self, word: str) -> None:
        with suppress(OSError):  # what is not heard is told by silence
            self.channel.sendall(word.replace("\n", "\\n").encode() + b"\n")

    def words(self) -> tuple[list[str], bool]:
        """What has come, and whether the other side is still there."""
        try:
            while piece := self.channel.recv(65536):
                self.unread += piece
        except BlockingIOError:
            whole, _, self.unread = self.unread.rpartition(b"\n")
            return [word.decode() for word in whole.split(b"\n") if word], True
        except OSError:
            pass
        whole, _, self.unread = self.unread.rpartition(b"\n")
        return [word.decode() for word in whole.split(b"\n") if word], False


@dataclass
class Contact:
    """Of machine `rank` of `machines`; the first listens at `port`."""

    rank: int
    machines: int
    address: str
    port: int
    now: Callable[[], float] = time.monotonic
    silent: float = SILENT
    lines: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.began, self.beaten = self.now(), -BEAT
        self.door = socket.create_server(("", self.port), backlog=self.machines) if self.rank == 0 else None
        if self.door is not None:
            self.door.setblocking(False)

    def look(self) -> str | None:
        """Beat and listen; why the run cannot go on, if so. To be asked often."""
        now = self.now()
        self.meet(now)
        if now - self.beaten >= BEAT:
            self.beaten = now
            for line in self.lines:
                line.say("beat")
        for line in self.lines:
            said = self.hear(line, now)
            if said is not None:
                self.tell(said)
                return said
        if len(self.lines) < (self.machines - 1 if self.rank == 0 else 1) and now - self.began > COME:
            return f"not all of the {self.machines} machines have come within {COME / 60:.0f} minutes"
        return None

    def meet(self, now: float) -> None:
        """New connections: the first machine takes those that come, another one calls it."""
        if self.door is not None:
            try:
                while True:
                    self.add(self.door.accept()[0], now)
            except BlockingIOError:
                return
        if not self.lines:
            try:
                self.add(socket.create_connection((self.address, self.port), timeout=1.0), now, machine=0)
            except OSError:  # not there yet
                return
            self.lines[0].say(f"machine {self.rank}")

    def add(self, channel: socket.socket, now: float, machine: int | None = None) -> None:
        channel.setblocking(False)
        self.lines.append(Line(channel, now, machine))

    def hear(self, line: Line, now: float) -> str | None:
        words, there = line.words()
        line.heard = now if words else line.heard
        for word in words:
            kind, _, rest = word.partition(" ")
            if kind == "machine":
                line.machine = int(rest)
            line.done = line.done or kind == "done"
            if kind == "failed":
                return rest.replace("\\n", "\n")
        name = "a machine" if line.machine is None else f"machine {line.machine}"
        if line.done:
            return None
        if not there:
            return f"{name} is gone: its launcher has ended without a word"
        return None if now - line.heard <= self.silent else f"{name} has been silent for {self.silent:.0f} seconds"

    def tell(self, why: str) -> None:
        """To all: the run has failed."""
        for line in self.lines:
            line.say(f"failed {why}")

    def close(self) -> None:
        """This machine has ended well."""
        for line in self.lines:
            line.say("done")
            line.channel.close()
        if self.door is not None:
            self.door.close()
