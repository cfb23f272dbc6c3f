"""What a run folder says, whatever version wrote it and however far the run came."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli.errors import DataError
from finetune_cli.plan.changes import effective

Event = dict[str, Any]
NOT_A_METRIC = ("event", "step", "epoch")


@dataclass(frozen=True)
class Record:
    """A run: its plan, its events, and its report where it has come to its end."""

    folder: Path
    plan: dict[str, Any]
    events: list[Event]
    report: dict[str, Any] | None
    error: dict[str, Any] | None
    recipe_text: str

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def effective(self) -> dict[str, Any]:
        """Dotted key -> the value that the run uses; of sets of rows what was said of them."""
        values = effective(self.plan["recipe"], self.plan["resolved"])
        sources = [_said(source) for source in values["data.train"]]
        return values | {"data.train": sources[0] if len(sources) == 1 else sources}

    @property
    def status(self) -> str:
        """finished | failed | not finished"""
        return "finished" if self.report is not None else "failed" if self.error is not None else "not finished"

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def first(self) -> dict[str, Any]:
        """Every metric where it was first logged."""
        return self.report["first"] if self.report is not None else numbers(reversed(self._measured()))

    @property
    def last(self) -> dict[str, Any]:
        """Every metric where it was last logged."""
        return self.report["last"] if self.report is not None else numbers(self._measured())

    def _measured(self) -> list[Event]:
        return self.of("train") + self.of("eval")


def numbers(events: Any) -> dict[str, Any]:
    """Metric -> value, of later events over earlier ones."""
    return {k: v for event in events for k, v in event.items() if k not in NOT_A_METRIC and isinstance(v, int | float)}


def read(folder: Path) -> Record:
    """Raises DataError where there is no run, or its plan cannot be read."""
    plan = _json(folder / "plan.json")
    if plan is None or not {"recipe", "resolved"} <= set(plan):
        raise DataError(f"{folder} is not the folder of a run: it has no plan.json", "Name a run's output_dir.")
    recipe = folder / "recipe.yaml"
    return Record(
        folder=folder.absolute(),
        plan=plan,
        events=events(folder / "metrics.jsonl"),
        report=_json(folder / "report.json"),
        error=_json(folder / "error.json"),
        recipe_text=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
    )


def events(path: Path) -> list[Event]:
    """The lines of metrics.jsonl; a line that is still being written is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "event" in value and "step" in value:
            found.append(value)
    return found


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}", "It is not what a run writes.") from error
    return value if isinstance(value, dict) else None


def _said(source: dict[str, Any]) -> Any:
    said = {key: value for key, value in source.items() if value is not None and (key, value) != ("weight", 1.0)}
    return said["path"] if set(said) == {"path"} else said


def labels(records: list[Record]) -> list[str]:
    """A name for each run, as short as tells it from the others."""
    for depth in range(1, max(len(record.folder.parts) for record in records) + 1):
        names = ["/".join(record.folder.parts[-depth:]) for record in records]
        if len(set(names)) == len(names):
            return names
    return [f"{record.name} ({n})" for n, record in enumerate(records, 1)]


def differing(records: list[Record]) -> list[tuple[str, list[Any]]]:
    """(key, value in each run) of everything that is not the same in all of them; MISSING where a run lacks it."""
    told = [_told(record) for record in records]
    keys = dict.fromkeys(key for one in told for key in one)
    found = [(key, [one.get(key, MISSING) for one in told]) for key in keys]
    return [(key, values) for key, values in found if any(value != values[0] for value in values)]


MISSING = "not there"


def _told(record: Record) -> Mapping[str, Any]:
    """The recipe's values, and what else a number may depend on."""
    plan, report = record.plan, record.report or {}
    gpus = [gpu["name"] for gpu in plan.get("machine", {}).get("gpus", [])]
    return {
        **{key: value for key, value in record.effective.items() if key not in ("output_dir", "logging.run_name")},
        "rows (fingerprint)": report.get("data_fingerprint", MISSING)[:12],
        "machine": ", ".join(gpus) or f"{plan.get('machine', {}).get('cpus', '?')} CPUs",
        **{f"version of {name}": value for name, value in plan.get("versions", {}).items()},
    }
