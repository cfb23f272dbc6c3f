"""What a run says: metrics.jsonl, trackers, and whoever listens."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune_cli.engine.manifest import WRITING, write_text
from finetune_cli.errors import MachineError
from finetune_cli.log import to_json
from finetune_cli.recipe.sections import Logging

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


class Trackers:
    """TensorBoard and the others accelerate knows. Numbers of train and eval events, under their own names."""

    def __init__(self, logging: Logging, run: Path, config: dict[str, Any], *, keep_through: int | None = None) -> None:
        for file in (run / "tensorboard").rglob("events.out.tfevents.*"):
            cut_back(file, keep_through if keep_through is not None else -1)
        self.trackers = [_tracker(name, logging, run) for name in logging.report_to if name != "none"]
        for tracker in self.trackers if keep_through is None else []:
            tracker.store_init_configuration(config)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] in ("train", "eval"):
            numbers = {k: v for k, v in event.items() if isinstance(v, int | float) and k not in ("step",)}
            for tracker in self.trackers:
                tracker.log(numbers, step=event["step"])

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def cut_back(file: Path, keep_through: int) -> None:
    """Take the events of later steps out of a TensorBoard file, and what was half written at its end."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    kept = [raw for raw in RawEventFileLoader(str(file)).Load() if Event.FromString(raw).step <= keep_through]
    if not kept:
        file.unlink()
        return
    beside = file.with_name(WRITING)  # TensorBoard reads whatever has "tfevents" in its name
    with beside.open("wb") as stream:
        writer = RecordWriter(stream)
        for raw in kept:
            writer.write(raw)
    beside.replace(file)


def _tracker(name: str, logging: Logging, run: Path) -> Any:
    """Raises MachineError for a tracker that accelerate does not know or whose package is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise MachineError(f"logging.report_to {name!r} is not a tracker", f"Known: none, {known}.")
    kwargs = {"logging_dir": str(run / "tensorboard")} if name == "tensorboard" else {}
    try:
        if name == "tensorboard":
            tracker = LOGGER_TYPE_TO_CLASS[name](".", **kwargs)
        else:
            named = {"name": logging.run_name} if name == "wandb" and logging.run_name else {}
            tracker = LOGGER_TYPE_TO_CLASS[name](logging.project or "finetune", **named)
        tracker.start()
    except ImportError as error:
        raise MachineError(f"logging.report_to {name} needs a package: {error}", f"pip install {name}") from error
    return tracker


def fan_out(sinks: Sequence[Sink]) -> Sink:
    def emit(event: dict[str, Any]) -> None:
        for sink in sinks:
            sink(event)

    return emit
