"""The end of a run: the result in the run folder, its report and its model card."""

import shutil
from pathlib import Path
from typing import Any

from finetune_cli.engine import memory
from finetune_cli.engine.card import card
from finetune_cli.engine.health import counted
from finetune_cli.engine.job import Job
from finetune_cli.engine.loop import Progress
from finetune_cli.engine.lora import sizes
from finetune_cli.engine.manifest import MANIFEST, PREFIX, flush, whole, write_text
from finetune_cli.log import to_json
from finetune_cli.plan.footprint import Estimate
from finetune_cli.plan.memory import estimate

NOT_THE_RESULT = (MANIFEST, "trainer_state.json")


def finish(job: Job, progress: Progress, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Copy the best (or last) checkpoint's model into the run folder and write report.json. First process only."""
    step, run = chosen(job, progress), job.plan.run
    folder = run / f"{PREFIX}{step}"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name not in NOT_THE_RESULT and path.suffix != ".pt":
            target = run / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            copy(path, target)
    report = make_report(job, progress, step) | {"health": counted(lines)}
    report["result_metrics"] = measured(lines, step)
    state = {"global_step": progress.step, "epoch": progress.step / job.schedule.steps_per_epoch, "log_history": lines}
    write_json(run / "trainer_state.json", state)
    write_text(run / "README.md", card(job.plan, report, adapted=(run / "adapter_config.json").exists()))
    flush(run)
    write_json(run / "report.json", report)  # last: it says that all the others are there
    return report


def measured(lines: list[dict[str, Any]], step: int) -> dict[str, float]:
    """What the evaluation after a step found; a resumed run may have done it twice."""
    found = [line for line in lines if line["event"] == "eval" and line["step"] == step]
    return {name: value for line in found for name, value in line.items() if name.startswith("eval_")}


def copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    with whole(target) as beside:
        shutil.copy2(source, beside)


def chosen(job: Job, progress: Progress) -> int:
    """The step whose weights are the result."""
    best = progress.best[1] if progress.best is not None else None
    return best if best is not None and job.plan.resolved.load_best_model_at_end else progress.step


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value, indent=1))


def make_report(job: Job, progress: Progress, step: int) -> dict[str, Any]:
    plan = job.plan
    return {
        "status": "finished",
        "method": plan.recipe.method.name,
        "model": plan.recipe.model.name_or_path,
        "rows": job.data.report,
        "tokens": {"total": progress.num_tokens, "trained": progress.trained_tokens},
        "warnings": job.warnings,
        "steps": progress.step,
        "seconds": progress.seconds,
        "tokens_per_second": progress.num_tokens / progress.seconds if progress.seconds else None,
        "peak_memory_gib": sum(job.peaks),
        "estimated_memory_gib": estimated_gib(job),
        "first": progress.first,
        "last": progress.last,
        "result": {"checkpoint": f"{PREFIX}{step}", "step": step, "is": why(job, step, progress)},
        "versions": plan.versions,
        "device": str(job.device),
        "per_device_train_batch_size": job.schedule.per_device_batch_size,
        "weights": dict(zip(("trained", "total"), sizes(job.policy), strict=True)),
        "reference": job.reference_report,
        "layout": {"padded": job.padded_because is not None, "because": job.padded_because},
        "fingerprint": plan.fingerprint,
        "data_fingerprint": job.data_fingerprint,
    }


def estimated(job: Job) -> Estimate | None:
    """What one process was expected to need for its largest forward; None where the configuration says too little."""
    found = memory.setup_of(job, max(job.own_batches(), key=lambda rows: sum(row.length for row in rows)))
    return estimate(found) if found is not None else None


def estimated_gib(job: Job) -> float | None:
    """Of the quantity that `peak_memory_gib` is: on a CPU the resident set, libraries included; of all processes."""
    found = estimated(job)
    if found is None:
        return None
    return job.world * (found.gib + (memory.LIBRARIES_GIB if job.device.type == "cpu" else 0.0))


def why(job: Job, step: int, progress: Progress) -> str:
    if progress.best is not None and step == progress.best[1] and job.plan.resolved.load_best_model_at_end:
        return "best"
    return "last"
