"""What a run says: metrics.jsonl, and whoever listens."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune_cli.engine.manifest import write_text
from finetune_cli.log import to_json

Sink = Callable[[dict[str, Any]], None]
WRITTEN = {"train", "eval", "health", "sample", "checkpoint"}
"""Events of metrics.jsonl; the others are for the screen."""


class Journal:
    """metrics.jsonl: one JSON object a line, flushed. A resumed run cuts it back to its checkpoint's step."""

    def __init__(self, path: Path, *, keep_through: int | None) -> None:
        self.path = path
        self.lines = _kept(path, keep_through)
        write_text(path, "".join(to_json(line) + "\n" for line in self.lines))
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] in WRITTEN:
            self.lines.append(event)
            self._file.write(to_json(event) + "\n")
            self._file.flush()
            if event["event"] == "checkpoint":  # a checkpoint never gets its name before its lines are on the disk
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _kept(path: Path, keep_through: int | None) -> list[dict[str, Any]]:
    if keep_through is None or not path.exists():
        return []
    lines = [value for line in path.read_bytes().split(b"\n") if (value := _whole(line)) is not None]
    return [line for line in lines if line["step"] <= keep_through]


def _whole(line: bytes) -> dict[str, Any] | None:
    """A line's event; None where the process died while it wrote it."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def fan_out(sinks: Sequence[Sink]) -> Sink:
    def emit(event: dict[str, Any]) -> None:
        for sink in sinks:
            sink(event)

    return emit
