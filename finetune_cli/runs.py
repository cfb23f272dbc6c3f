"""A run as its command sees it: folder claimed and locked, workers started, signals passed on. No torch here."""

import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from finetune_cli import log, replaced, show
from finetune_cli.engine import manifest
from finetune_cli.engine.lock import RunLock
from finetune_cli.engine.signals import CAUGHT, Stop, exit_code, held_back, killed_by
from finetune_cli.errors import KINDS, DataError, FinetuneError, MachineError, ModelError, RecipeError
from finetune_cli.plan import launch
from finetune_cli.plan.changes import Change, compare
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.load import Loaded

SAYS_WHAT_IT_IS = ("plan.json", "recipe.yaml", "report.json")
"""Of a run; what a refused `--resume` leaves as it was."""


@dataclass(frozen=True)
class Options:
    """What was asked for beside the recipe."""

    resume: bool = False
    anyway: bool = False
    """Go on although the recipe has changed."""
    overwrite: bool = False
    as_json: bool = False
    again: tuple[str, ...] = ()
    """The command, without these options."""


def run(plan: Plan, loaded: Loaded, options: Options) -> int:
    """Claim the folder, start, wait; the exit code."""
    log.setup()
    alone, keeps = not launch.inside(), launch.inside() or launch.first(plan)
    if options.resume and ended(plan):
        if alone or log.rank() == 0:
            show.err.print(f"{plan.run} is finished; nothing is left to resume")
        return 0
    if not keeps:
        return begin(plan, resumed(plan, options, mend=False) if options.resume else None, options, None)
    first = alone or log.rank() == 0
    with locked(plan.run) if first else nullcontext() as lock:
        if first and replaced.put_back(plan.run) and options.resume and ended(plan):  # of a command that was killed
            show.err.print(f"{plan.run} is finished; nothing is left to resume")
            return 0
        start = resumed(plan, options, mend=log.rank() == 0) if options.resume else None
        with put_back(plan.run, start) if first else nullcontext(), replaced.kept(plan.run) if first else nullcontext():
            if first:
                claim(plan, loaded, start=start, resume=options.resume, overwrite=options.overwrite)
            if not alone:
                from finetune_cli import worker

                stop = Stop()
                stop.listen()
                code = worker.run(plan, stop, resume=start, anyway=options.anyway, as_json=options.as_json)
                return told(plan, code, options) if first else code
            assert lock is not None
            return begin(plan, start, options, lock)


@contextmanager
def put_back(run: Path, start: Path | None) -> Iterator[None]:
    """Where going on from `start` is refused before anything is trained, the run says of itself what it said before."""
    kept = {name: (run / name).read_bytes() for name in SAYS_WHAT_IT_IS if start is not None and (run / name).exists()}
    try:
        yield
    except (RecipeError, DataError, ModelError):
        newest = manifest.newest_whole(run)
        if start is not None and newest is not None and newest.name == start.name:
            for name, content in kept.items():
                (run / name).write_bytes(content)
            if "report.json" in kept:
                (run / "error.json").unlink(missing_ok=True)
        raise


@contextmanager
def locked(run: Path) -> Iterator[RunLock]:
    """Raises RecipeError where another run is in the folder, MachineError where it cannot be written."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run)
    except OSError as error:
        raise MachineError(f"{run} cannot be written: {error.strerror}", "Name another output_dir.") from error
    try:
        yield lock
    finally:
        lock.release()


def ended(plan: Plan) -> bool:
    """Finished, and as long as it is asked to be. Raises RecipeError where another recipe's run is finished here."""
    if not replaced.finished(plan.run):
        return False
    try:
        before = Plan.model_validate_json((plan.run / "plan.json").read_text(encoding="utf-8"))
    except ValueError as error:
        hint = "Name another output_dir, or replace the run with --overwrite."
        raise RecipeError(f"{plan.run} is finished, and its plan.json is none of this version", hint) from error
    changes = compare(before.effective, plan.effective)
    if any(c.kind == "length" for c in changes):
        return False
    refuse([c for c in changes if c.kind in ("training", "impossible")], "this finished run", offer=False)
    return True


def resumed(plan: Plan, options: Options, *, mend: bool) -> Path | None:
    """The checkpoint to go on from, None where there is none yet; says what has changed since. One process mends what
    a run that was cut off left."""
    if mend:
        manifest.recover(plan.run)
    folder = manifest.newest_whole(plan.run)
    if folder is None:
        log.LOGGER.warning("no checkpoint yet: the run starts afresh")
        return None
    changes = compare(manifest.read(folder)["recipe"], plan.effective)
    for change in changes:
        if change.kind in ("rounding", "length"):
            meaning = (
                "the same training to rounding"
                if change.kind == "rounding"
                else "the schedule is that of the new length"
            )
            log.LOGGER.warning("%s: %s", change, meaning)
    refuse([c for c in changes if c.kind == "impossible"], folder.name, offer=False)
    training = [c for c in changes if c.kind == "training"]
    if not options.anyway:
        refuse(training, folder.name, offer=True)
    for change in training:
        log.LOGGER.warning("%s: %s", change, change.consequence)
    log.LOGGER.info("going on from %s", folder.name)
    return folder


def refuse(changes: list[Change], what: str, *, offer: bool) -> None:
    """Raises RecipeError where there are any."""
    if not changes:
        return
    lines = "".join(f"\n  {change}; {change.consequence}" if offer else f"\n  {change}" for change in changes)
    anyway = " --resume-anyway goes on as the lines above say." if offer else ""
    raise RecipeError(
        f"the recipe is not the one of {what}:{lines}",
        f"Put the recipe back, name another output_dir, or start anew with --overwrite.{anyway}",
    )


def claim(plan: Plan, loaded: Loaded, *, start: Path | None = None, resume: bool, overwrite: bool) -> None:
    """Make the run folder, and write what will be run, from the checkpoint `start` on. Raises RecipeError where another
    run's results are in it."""
    folder = plan.run
    used = replaced.used(folder)
    if used and not (resume or overwrite):
        raise RecipeError(
            f"{show.short(str(folder))} holds another run ({used[0]})",
            "Name another output_dir, go on with --resume, or replace it with --overwrite.",
        )
    try:
        if used and overwrite and not resume:
            replaced.put_aside(folder)
        if start is None:  # what a run left that ended before its first checkpoint may be of another adapter
            shutil.rmtree(folder / manifest.BASE, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("error.json", "report.json"):
            (folder / name).unlink(missing_ok=True)
        manifest.write_text(folder / "plan.json", plan.model_dump_json(indent=1))
        manifest.write_text(folder / "recipe.yaml", loaded.dump())
    except OSError as error:
        raise MachineError(f"{folder} cannot be written: {error.strerror}", "Name another output_dir.") from error


def beside(plan: Plan) -> Path:
    """The plan of a machine that does not keep the run folder, which may be its own or the first one's."""
    try:
        plan.run.mkdir(parents=True, exist_ok=True)
        file = plan.run / f"plan-machine-{launch.place(plan.recipe.launch).rank}.json"
        (plan.run / "error.json").unlink(missing_ok=True)
        manifest.write_text(file, plan.model_dump_json(indent=1))
    except OSError as error:
        raise MachineError(f"{plan.run} cannot be written: {error.strerror}", "Name another output_dir.") from error
    return file


def begin(plan: Plan, start: Path | None, options: Options, lock: RunLock | None) -> int:
    """Start the worker(s) of this machine, pass signals on, and tell how it ended. The machine that keeps the run
    folder has its lock."""
    command = [
        *([f"--resume={start.name}"] if start is not None else []),
        *(["--anyway"] if options.anyway else []),
        *(["--json"] if options.as_json else []),
    ]
    argv = launch.argv(plan, plan.run / "plan.json" if lock is not None else beside(plan), command)
    held = () if lock is None else (lock.descriptor,)
    asked: list[int] = []
    with held_back():
        process = subprocess.Popen(argv, env=launch.environment(plan), pass_fds=held)

        def forward(number: int, _: FrameType | None) -> None:
            asked.append(number)
            process.send_signal(number)

        previous = {number: signal.signal(number, forward) for number in CAUGHT}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return told(plan, code, options)


def told(plan: Plan, code: int, options: Options) -> int:
    """The exit code of a run, once it is said how it ended. Raises the error that a worker left."""
    code = report_end(plan, code)
    if code in (130, 143):
        tell_how_to_go_on(plan, code, options)
    return code


def tell_how_to_go_on(plan: Plan, code: int, options: Options) -> None:
    """Before the rows were known to be good the run that was to be replaced is there again."""
    again = shlex.join([*options.again, "--overwrite" if replaced.waits(plan.run) else "--resume"])
    if options.as_json:
        show.to_stdout({"event": "interrupted", "exit_code": code, "run": str(plan.run), "resume": again})
    else:
        show.err.print(f"interrupted; go on with:\n  {again}", markup=False)


def report_end(plan: Plan, code: int) -> int:
    """The exit code of the run. A worker's error is told once, whatever its number of processes."""
    from finetune_cli.worker import read_error

    failure = read_error(plan.run / "error.json")
    if failure is not None:
        raise failure
    if -code in CAUGHT:  # stopped before it listened
        return exit_code(-code)
    killed = killed_by(code)
    if killed is not None and code not in (130, 143):
        raise MachineError(
            f"the training process was killed by {killed.name}",
            "SIGKILL is usually the system running out of memory: lower train.per_device_train_batch_size.",
        )
    if code not in (0, 130, 143, *KINDS):  # those that left one of ours said on stderr what could not be written
        raise FinetuneError(f"the training process ended with exit code {code} and left no word")
    return code
