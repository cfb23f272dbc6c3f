"""The entry of a training process: reads plan.json, runs the job, and tells the screen through an event sink."""

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from finetune_cli import log
from finetune_cli.errors import KINDS, FinetuneError, Problem, TrainError
from finetune_cli.plan.resolve import Plan

INTERNAL = 1


class Interrupted(BaseException):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


def main(argv: list[str] | None = None) -> int:
    """`python -m finetune_cli.worker PLAN.json [--resume] [--json]`; the exit code is the run's."""
    argv = sys.argv[1:] if argv is None else argv
    plan = Plan.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
    return run(plan, resume="--resume" in argv, as_json="--json" in argv)


def run(plan: Plan, *, resume: bool, as_json: bool) -> int:
    log.setup()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    error_file = plan.run / "error.json"
    try:
        if log.rank() == 0:
            error_file.unlink(missing_ok=True)
        work(plan, resume=resume, as_json=as_json)
    except Interrupted as stop:
        return stop.exit_code
    except FinetuneError as error:
        _write_error(error_file, error, error.exit_code)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  the last line of defence: everything becomes error.json and an exit code
        code, known = _classify(error)
        _write_error(error_file, known, code)
        (plan.run / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return code
    return 0


def work(plan: Plan, *, resume: bool, as_json: bool) -> None:
    """Everything between plan and report."""
    from finetune_cli.data.rows import load_rows
    from finetune_cli.engine import events, finish, loop, prepare
    from finetune_cli.show import screen

    _quiet()
    show = screen(plan, as_json=as_json)
    words = prepare.bind(plan.recipe, plan.facts)
    sets = load_rows(plan.recipe, words.chat)  # before the processes meet: one builds the cache, the others wait
    if log.rank() == 0:
        show({"event": "rows", **sets.summary()})
    start = prepare.whole_checkpoint(plan.run) if resume else None
    job, progress = prepare.build(plan, words, sets, show, resume=start)
    lines: list[dict[str, Any]] = []
    if job.accelerator.is_main_process:
        trackers = events.Trackers(plan.recipe.logging, plan.run, {"fingerprint": plan.fingerprint})
        journal = events.Journal(plan.run / "metrics.jsonl", keep_through=progress.step if start else None)
        lines = journal.lines
        job.sink = events.fan_out([journal, trackers, show])
    progress = loop.train(job, progress)
    job.peaks = job.gather(job.memory_gib())
    if job.accelerator.is_main_process:
        report = finish.finish(job, progress, lines)
        journal.close()
        trackers.close()
        show({"event": "end", "report": report, "run": str(plan.run)})
    job.accelerator.wait_for_everyone()
    job.accelerator.end_training()


def _quiet() -> None:
    """Our screens alone: no bars and no banners of the libraries underneath."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch|accelerate")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bar()


def _interrupt(number: int, frame: Any) -> None:  # noqa: ARG001
    for each in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C comes twice: from the terminal, and passed on by the parent
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(number)


def _classify(error: Exception) -> tuple[int, FinetuneError]:
    """Out of memory is the training's; anything else is ours."""
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        hint = "Lower train.per_device_train_batch_size or data.max_length, or set train.gradient_checkpointing: true."
        return TrainError.exit_code, TrainError(f"out of memory: {str(error).splitlines()[0]}", hint)
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return INTERNAL, FinetuneError(f"internal error: {text}", "This is ours; traceback.txt is in the run folder.")


def _write_error(path: Path, error: FinetuneError, code: int) -> None:
    """The first process to fail is the one that is told of."""
    value = {**error.to_json(), "exit_code": code}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def read_error(path: Path) -> FinetuneError | None:
    """The error that a worker left; None where it left none."""
    if not path.exists():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    kind = KINDS.get(value["exit_code"], FinetuneError)
    return kind(value["message"], value["hint"], problems=tuple(Problem(**p) for p in value["problems"]))


if __name__ == "__main__":
    sys.exit(main())
