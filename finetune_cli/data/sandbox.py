"""The process in which chat templates run, as its parent sees it: started when needed, restarted, ended, never left.

What runs in it is `data/render.py`. Where a conversation makes it end (it took its time of CPU, or all memory), that
conversation is refused with the reason and the next one has a new process; a third time refuses all that follow.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from finetune_cli.errors import MachineError

STRIKES = 3
SECONDS, SECONDS_A_MESSAGE = 2.0, 0.05
"""CPU time that all renders of one conversation may take. Most take a thousandth of it."""
MEMORY = 2 * 2**30
"""Bytes that the process may have."""
TOO_LARGE = 77
"""Its exit status where it saw by itself that it has more."""
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")
MAIN = "from finetune_cli.data.render import serve; serve()"
HINT = "Set model.chat_template to another template, or change the row."

Reply = dict[str, Any]


class Sandbox:
    """A process for one template. Any thread may ask; they wait for one another. Ends with this object or before.

    `settings` is what `render.serve` reads first: template, names, stops, specials, mismatch.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        bounds = {"seconds": SECONDS, "seconds_a_message": SECONDS_A_MESSAGE, "memory": MEMORY}
        self.settings = {**bounds, **settings}
        self.strikes = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._end: weakref.finalize[Any, Any] | None = None

    def answers(self, requests: Sequence[Mapping[str, Any]]) -> list[Reply]:
        """A reply to each. Raises MachineError where the process does not even start."""
        with self._lock:
            if not requests or self.strikes >= STRIKES:
                return [refusal(f"it has failed {STRIKES} times and is not tried again")] * len(requests)
            replies = self._exchange(requests)
            if replies is not None:
                return replies
            self._ended()
            return [self._answer(request) for request in requests]  # one at a time, to know which it was

    def _answer(self, request: Mapping[str, Any]) -> Reply:
        if self.strikes >= STRIKES:
            return refusal(f"it has failed {STRIKES} times and is not tried again")
        replies = self._exchange([request])
        if replies is not None:
            return replies[0]
        self.strikes += 1
        return refusal(self._ended())

    def _exchange(self, requests: Sequence[Mapping[str, Any]]) -> list[Reply] | None:
        """None where the process ended instead of answering."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        told = json.dumps(requests, default=lambda value: f"<{type(value).__name__}>")
        try:
            process.stdin.write(told.encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        line = process.stdout.readline()
        return list(json.loads(line)) if line.endswith(b"\n") else None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._owner != os.getpid():  # a forked child has no business with its parent's
            self._owner = os.getpid()
            self._process = self._start()
            self._end = weakref.finalize(self, stop, self._process, self._owner)
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(folder for folder in sys.path if folder)
        env = {name: value for name, value in os.environ.items() if not SECRET.search(name)} | {"PYTHONPATH": path}
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", MAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
            )
        except OSError as error:
            raise MachineError(f"the process that renders chat templates does not start: {error}") from error
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # its end is told where its replies are missed
            process.stdin.write(json.dumps(self.settings).encode() + b"\n")
        return process

    def _ended(self) -> str:
        """Why the process ended."""
        assert self._process is not None
        status = self._process.wait()
        self.close()
        if status == -signal.SIGPROF:
            return f"it takes more than {self.settings['seconds']:g} s of CPU time"
        if status == TOO_LARGE:
            return f"it takes more than {self.settings['memory'] / 2**30:g} GiB of memory"
        ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"its process {ended}" + (" (is the machine out of memory?)" if status == -signal.SIGKILL else "")

    def close(self) -> None:
        """End the process. Asking again starts another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None


def refusal(why: str) -> Reply:
    return {"error": [f"the chat template cannot be rendered: {why}", HINT]}


def stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if owner != os.getpid():
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
    process.wait()
