"""`report.html`: a run, or several beside one another, as one page that needs nothing but a browser."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli.engine.manifest import write_text
from finetune_cli.errors import DataError, MachineError
from finetune_cli.use import curves, page
from finetune_cli.use.record import MISSING, Record, differing, labels, read

REPORT, COMPARISON = "report.html", "comparison.html"
MOST_ANSWERS = 12
"""Answers shown for each prompt, from the first to the last."""
MOST_EVENTS = 200
"""Health events in the table."""
MOST_LETTERS = 6000
"""Of one prompt or answer."""


@dataclass(frozen=True)
class Asked:
    """One prompt and what was answered to it over time."""

    set: str
    prompt: str
    reference: str | None
    answers: list[tuple[int, str, float | None]]
    """(step, answer, what it was worth where the method judges answers)"""
    left_out: int


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of one run into its folder, of several into the working directory, or where `output` says."""
    records = [read(folder) for folder in folders]
    if len({record.folder for record in records}) < len(records):
        raise DataError("a run is named twice", "Name each run once.")
    text = of_one(records[0]) if len(records) == 1 else of_many(records)
    path = output or (records[0].folder / REPORT if len(records) == 1 else Path(COMPARISON))
    try:
        write_text(path, text)
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror}", "Name another with --output.") from error
    return path


def of_one(record: Record) -> str:
    """The page of a run."""
    report = record.report or {}
    return _page(
        title=record.name,
        runs=[record],
        facts=facts(record),
        charts=curves.of_run(record),
        changes=[(key, value, record.last.get(key)) for key, value in _before(record)],
        asked=asked(record),
        rows=report.get("rows"),
        health=record.of("health")[-MOST_EVENTS:],
        unseen=max(0, len(record.of("health")) - MOST_EVENTS),
        warnings=report.get("warnings", []),
        error=record.error,
        settings=settings(record),
        written=record.recipe_text,
        versions=versions(record),
    )


def of_many(records: list[Record]) -> str:
    """The page of several runs beside one another."""
    names = labels(records)
    return _page(
        title=f"{len(records)} runs",
        runs=records,
        names=names,
        charts=curves.of_runs(records, names),
        differing=differing(records),
        numbers=final_numbers(records),
    )


def _page(**values: Any) -> str:
    absent: dict[str, Any] = {  # on the other kind of page
        "names": [], "facts": [], "changes": [], "asked": [], "rows": None, "health": [], "unseen": 0, "warnings": [],
        "error": None, "settings": [], "written": "", "versions": [], "differing": [], "numbers": [],
    }  # fmt: skip
    told = {"plain": plain, "short": curves.short, "frame": curves, "missing": MISSING}
    return page.render("report.html.jinja", style="report.css", script="report.js", **{**absent, **told, **values})


def facts(record: Record) -> list[tuple[str, str]]:
    """What was trained, and at what cost."""
    report, used = record.report or {}, record.effective
    told = [
        ("method", str(used["method.name"])),
        ("model", str(used["model.name_or_path"])),
        ("trained", _trained(record)),
        ("status", record.status),
    ]
    if report:
        told += [
            ("steps", f"{report['steps']:,} of {used['train.global_batch_size']} rows"),
            ("tokens", f"{report['tokens']['total']:,}, {report['tokens']['trained']:,} of them trained"),
            ("time", f"{duration(report['seconds'])} of training"),
            ("speed", f"{report['tokens_per_second'] or 0:,.0f} tokens/s on {report.get('device', '?')}"),
            ("peak memory", f"{report['peak_memory_gib']:.1f} GiB"),
            ("result", f"{report['result']['checkpoint']} ({report['result']['is']})"),
        ]
    return told


def _trained(record: Record) -> str:
    used, report = record.effective, record.report or {}
    if used.get("lora.r") is not None:
        what = f"LoRA, r {used['lora.r']}" + (" on quantised weights" if record.plan["recipe"]["quantization"] else "")
    else:
        what = "the adapter" if record.plan.get("facts", {}).get("kind") == "adapter" else "all weights"
    weights = report.get("weights")
    return f"{what}: {weights['trained']:,} of {weights['total']:,} weights" if weights else what


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _before(record: Record) -> list[tuple[str, Any]]:
    """Evaluations and the loss, as they were first."""
    return [(key, value) for key, value in record.first.items() if key.startswith("eval_") or key == "loss"]


def asked(record: Record) -> list[Asked]:
    """Sampled answers, prompt by prompt."""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for event in record.of("sample"):
        groups.setdefault((event.get("set", ""), event.get("row")), []).append(event)
    return [
        Asked(
            set=name,
            prompt=cut(str(events[-1]["prompt"])),
            reference=cut(str(events[-1]["reference"])) if events[-1].get("reference") is not None else None,
            answers=[(e["step"], cut(str(e["answer"])), e.get("reward")) for e in curves.spread(events, MOST_ANSWERS)],
            left_out=max(0, len(events) - MOST_ANSWERS),
        )
        for (name, _), events in groups.items()
    ]


def cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} ... ({len(text):,} letters)"


def settings(record: Record) -> list[tuple[str, str, str]]:
    """(key, value, origin) of the whole recipe as it was used."""
    origins = record.plan.get("origins", {})
    return [(key, plain(value), origins.get(key, "default")) for key, value in record.effective.items()]


def versions(record: Record) -> list[tuple[str, str]]:
    plan, report = record.plan, record.report or {}
    machine = plan.get("machine", {})
    memory = f", {machine['memory_gib']:.1f} GiB" if machine.get("memory_gib") else ""
    return [
        *plan.get("versions", {}).items(),
        *(("GPU", f"{gpu['name']}, {gpu['memory_gib']:.1f} GiB") for gpu in machine.get("gpus", [])),
        ("machine", f"{machine.get('cpus', '?')} CPUs{memory}"),
        ("fingerprint of the recipe", plan.get("fingerprint", MISSING)),
        ("fingerprint of the rows", report.get("data_fingerprint", MISSING)),
    ]


def final_numbers(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """(what, its value in each run): first to last for metrics, then the cost."""
    keys = dict.fromkeys(key for record in records for key in record.last if key not in curves.LEFT_OUT)
    table = [(key, [_span(record, key) for record in records]) for key in sorted(keys, key=_evals_first)]
    told = [dict(facts(record)) for record in records]
    costs = ("status", "trained", "steps", "tokens", "time", "speed", "peak memory", "result")
    return table + [(what, [one.get(what, MISSING) for one in told]) for what in costs]


def _evals_first(key: str) -> tuple[bool, str]:
    return not key.startswith("eval_"), key


def _span(record: Record, key: str) -> str:
    if key not in record.last:
        return MISSING
    before, last = record.first.get(key), _number(record.last[key])
    return f"{before:.4g} → {last}" if before is not None else last


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def plain(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}" if abs(value) < 1e15 else f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def summary(folders: Sequence[Path], path: Path) -> dict[str, Any]:
    """What `finetune report` says beside the page, for programs."""
    records = [read(folder) for folder in folders]
    names = labels(records)
    return {
        "page": str(path),
        "runs": [
            {"name": name, "folder": str(r.folder), "status": r.status, "first": r.first, "last": r.last}
            for name, r in zip(names, records, strict=True)
        ],
        "differing": {key: dict(zip(names, values, strict=True)) for key, values in differing(records)},
    }
