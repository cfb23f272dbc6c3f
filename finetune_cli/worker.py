"""The entry of a training process: reads plan.json, runs the job, and tells the screen through an event sink."""

import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from finetune_cli import log, replaced
from finetune_cli.engine.contact import LOST
from finetune_cli.engine.manifest import write_text
from finetune_cli.engine.signals import Interrupted, Stop, exit_code
from finetune_cli.errors import KINDS, FinetuneError, MachineError, Problem, TrainError
from finetune_cli.plan.resolve import Plan

if TYPE_CHECKING:
    from finetune_cli.engine.hub import Pusher

INTERNAL = 1
HELD: list[Any] = []
"""What must not be taken down while Python runs. With several processes a job holds a process group: the main thread
would wait for gloo's thread to end with the interpreter locked, and that thread for the interpreter, to let go of its
last collective (torch 2.13)."""


def main(argv: list[str] | None = None) -> int:
    """`finetune_cli.worker PLAN.json [--resume=CHECKPOINT] [--anyway] [--json]`; the exit code is the run's."""
    argv = sys.argv[1:] if argv is None else argv
    stop = Stop()
    stop.listen()
    plan = Plan.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
    start = next((plan.run / a.partition("=")[2] for a in argv if a.startswith("--resume=")), None)
    return run(plan, stop, resume=start, anyway="--anyway" in argv, as_json="--json" in argv)


def run(plan: Plan, stop: Stop, *, resume: Path | None, anyway: bool, as_json: bool) -> int:
    """Go on from the checkpoint `resume`, or start; the exit code. Errors for people are left in error.json."""
    log.setup()
    error_file = plan.run / "error.json"
    try:
        if log.rank() == 0:
            error_file.unlink(missing_ok=True)
        work(plan, stop, resume=resume, anyway=anyway, as_json=as_json)
    except Interrupted as interrupted:
        return interrupted.exit_code
    except FinetuneError as error:
        _write_error(error_file, error, error.exit_code)
        return error.exit_code
    except Exception as error:  # noqa: BLE001  the last line of defence: everything becomes error.json and an exit code
        code, known = _classify(error)
        if stop.asked_together() and not isinstance(known, TrainError) and not disk_is_full(error):
            return exit_code(stop.number or signal.SIGTERM)
        _write_error(error_file, known, code)
        _write_traceback(plan.run / "traceback.txt")
        return code
    return 0


def work(plan: Plan, stop: Stop, *, resume: Path | None, anyway: bool, as_json: bool) -> None:
    """Everything between plan and report."""
    from finetune_cli.checks import stages
    from finetune_cli.checks.rule import Seen
    from finetune_cli.engine import events, finish, hub, loop, preflight, prepare, trackers
    from finetune_cli.recipe.load import load
    from finetune_cli.show import screen

    log.quiet_libraries()
    show = screen(plan, as_json=as_json)
    warned: list[Problem] = []
    seen = Seen(load(Path(plan.recipe_path), plan.overrides), plan)
    stages.lints(seen, warned.append)
    known = len(warned)  # the parent has told them
    found = preflight.examine(seen, warned.append)  # before the processes meet: one tokenises, the others wait
    words, sets = found.words, found.sets
    if log.rank() == 0:
        for problem in warned[0 if as_json else known :]:
            show({"event": "check", **problem.to_json()})
        show({"event": "rows", **sets.summary()})
    if resume is not None:
        prepare.compare_rows(sets.train.rows, resume, anyway=anyway)
    prepare.meet(plan, resume)
    job, progress = prepare.build(plan, words, sets, show, resume=resume, stop=stop)
    if job.world > 1:
        HELD.append(job)
    job.warnings = [f"{problem.rule} {problem.message}" for problem in warned]
    lines: list[dict[str, Any]] = []
    if job.accelerator.is_main_process:
        replaced.let_go(plan.run)
        through = progress.step if resume else None
        about = trackers.config_of(plan)
        told = trackers.Trackers(plan.recipe.logging, plan.run, about, keep_through=through)
        journal = events.Journal(plan.run / "metrics.jsonl", keep_through=through)
        lines = journal.lines
        job.sink = events.fan_out([journal, told, show])
        if plan.repository is not None:
            job.pusher = hub.Pusher(plan.recipe.save, plan.run, hub.Repository(**plan.repository))
    try:
        progress = loop.train(job, progress)
    except Interrupted as interrupted:
        if job.accelerator.is_main_process:
            show({"event": "interrupted", "step": interrupted.step, "checkpoint": interrupted.saved})
        raise
    job.peaks = job.gather(job.memory_gib())
    if job.accelerator.is_main_process:
        report = finish.finish(job, progress, lines)
        page_of(plan.run)
        uploaded(job.pusher, plan.run)
        journal.close()
        told.close()
        show({"event": "end", "report": report, "run": str(plan.run)})
    job.accelerator.wait_for_everyone()
    job.accelerator.end_training()


def uploaded(pusher: "Pusher | None", run: Path) -> None:
    """The result, last: the run is over and whole, whatever becomes of it."""
    failed = pusher.finished() if pusher is not None else None
    if failed is not None:
        log.LOGGER.warning("the result is here and not on the hub (%s); `finetune push %s` uploads it", failed, run)


def page_of(run: Path) -> None:
    """report.html. The run is over and whole: where the page cannot be written, that is said and is no failure."""
    from finetune_cli.use import report

    try:
        report.write([run])
    except MachineError as error:
        log.LOGGER.warning("%s; `finetune report %s` writes it later", error.message, run)


def _classify(error: Exception) -> tuple[int, FinetuneError]:
    """Out of memory is the training's, out of disk the machine's; anything else is ours."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if disk_is_full(error):
        hint = "Make room, or lower save.save_total_limit; every earlier checkpoint is whole: go on with --resume."
        return MachineError.exit_code, MachineError(f"the disk is full: {said}", hint)
    if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
        hint = "Lower train.per_device_train_batch_size or data.max_length, or set train.gradient_checkpointing: true."
        return TrainError.exit_code, TrainError(f"out of memory: {said}", hint)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(name in repr(error) for name in TRANSPORT):
        hint = "Look for the one that failed first; every earlier checkpoint is whole: go on with --resume."
        return MachineError.exit_code, MachineError(f"{LOST}: {said}", hint)
    text = f"{type(error).__name__}: {said}"
    return INTERNAL, FinetuneError(f"internal error: {text}", "This is ours; traceback.txt is in the run folder.")


TRANSPORT = ("gloo/transport", "NCCL", "DistNetworkError", "DistStoreError")
"""What is in the errors of a collective whose other side is gone."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_SAID = ("No space left on device", "File too large", "Disk quota exceeded", "PytorchStreamWriter failed")
"""Of libraries that write files outside Python and tell of it in words of their own."""


def disk_is_full(error: BaseException | None) -> bool:
    """Whether this, or what caused it, is that nothing more can be written."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL) or any(said in str(error) for said in FULL_SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


def _write_error(path: Path, error: FinetuneError, code: int) -> None:
    """The first process to fail is the one that is told of."""
    value = {**error.to_json(), "exit_code": code}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_text(path, json.dumps(value, indent=1, ensure_ascii=False))
    except OSError as failed:
        log.LOGGER.error("%s\n%s cannot be written either: %s", error, path.name, failed.strerror)


def _write_traceback(path: Path) -> None:
    try:
        path.write_text(traceback.format_exc(), encoding="utf-8")
    except OSError as failed:
        log.LOGGER.error("%s cannot be written: %s", path.name, failed.strerror)


def read_error(path: Path) -> FinetuneError | None:
    """The error that a worker left; None where it left none."""
    if not path.exists():
        return None
    value = json.loads(path.read_text(encoding="utf-8"))
    kind = KINDS.get(value["exit_code"], FinetuneError)
    return kind(value["message"], value["hint"], problems=tuple(Problem(**p) for p in value["problems"]))


def leave(code: int) -> NoReturn:
    """End the process; with nothing taken down where something is held."""
    if HELD:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
