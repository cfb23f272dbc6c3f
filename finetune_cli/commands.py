"""What each command does: the stages of a check, the plan, the start of the workers."""

import json
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from finetune_cli import show
from finetune_cli.checks.files import files
from finetune_cli.checks.lints import lints
from finetune_cli.errors import DataError, FinetuneError, MachineError, Problem, RecipeError
from finetune_cli.plan import facts as model_facts
from finetune_cli.plan import launch, machine
from finetune_cli.plan.resolve import Plan, resolve
from finetune_cli.recipe.load import Loaded, load


def checked(recipe: Path, overrides: Sequence[str]) -> tuple[Loaded, model_facts.Facts, list[Problem]]:
    """Schema, lints and files, stage after stage; (recipe, facts, warnings). Raises the failing stage's error."""
    loaded = load(recipe, overrides)
    facts = model_facts.look(loaded.recipe.model.name_or_path)
    found = list(lints(loaded, facts))
    errors = tuple(p for p in found if p.severity == "error")
    if errors:
        raise RecipeError(f"{loaded.name} cannot be run", problems=errors)
    missing = tuple(files(loaded))
    if missing:
        raise DataError("files are missing", "Paths are relative to the recipe.", problems=missing)
    accepted = set(loaded.recipe.ignore)
    return loaded, facts, [p for p in found if p.rule not in accepted]


def planned(recipe: Path, overrides: Sequence[str]) -> tuple[Plan, Loaded, list[Problem]]:
    loaded, facts, warnings = checked(recipe, overrides)
    world = launch.world() if launch.inside() else None
    plan = resolve(loaded.recipe, loaded.data, machine.look(), facts, recipe_path=recipe.absolute(), world=world)
    return plan, loaded, warnings


def validate(recipe: Path, overrides: Sequence[str], *, fast: bool, as_json: bool) -> int:
    failure: FinetuneError | None = None
    warnings: list[Problem] = []
    rows: dict[str, Any] = {}
    try:
        loaded, facts, warnings = checked(recipe, overrides)
        if not fast:
            rows = rows_of(loaded, facts)
    except FinetuneError as error:
        failure = error
    if as_json:
        problems = [*(failure.problems if failure else ()), *warnings]
        result = {
            "ok": failure is None,
            "exit_code": failure.exit_code if failure else 0,
            "message": failure.message if failure else "",
            "hint": failure.hint if failure else "",
            "problems": [p.to_json() for p in problems],
            "rows": rows,
        }
        show.to_stdout(result)
    elif failure is not None:
        raise failure
    else:
        for problem in warnings:
            show.err.print(show.problem_line(problem))
        for name, report in rows.items():
            show.out.print(f"{name}: {show.rows_line(report)}")
        stages = "schema, lints and files" if fast else "schema, lints, files, tokenizer and rows"
        show.out.print(f"{recipe}: fine ({stages})")
    return failure.exit_code if failure else 0


def rows_of(loaded: Loaded, facts: model_facts.Facts) -> dict[str, Any]:
    """Counts of every set, on the trainer's own path."""
    from finetune_cli import log
    from finetune_cli.data.rows import load_rows
    from finetune_cli.engine.prepare import bind

    log.setup()
    sets: dict[str, Any] = load_rows(loaded.recipe, bind(loaded.recipe, facts).chat).summary()["sets"]
    return sets


def plan(recipe: Path, overrides: Sequence[str], *, as_json: bool) -> int:
    made, _, warnings = planned(recipe, overrides)
    if as_json:
        show.to_stdout(made.model_dump(mode="json"))
        return 0
    for problem in warnings:
        show.err.print(show.problem_line(problem))
    show.out.print(show.header(made))
    show.origins(made)
    return 0


def run(recipe: Path, overrides: Sequence[str], *, resume: bool, overwrite: bool, as_json: bool) -> int:
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other", "Keep one of them.")
    made, loaded, warnings = planned(recipe, overrides)
    main_process = not launch.inside() or _rank() == 0
    if main_process:
        if not as_json:
            for problem in warnings:
                show.err.print(show.problem_line(problem))
            show.out.print(show.header(made))
        if finished(made.run) and resume:
            show.err.print(f"{made.run} is finished; nothing is left to resume")
            return 0
        claim(made, loaded, resume=resume, overwrite=overwrite)
        if resume and not list(made.run.glob("checkpoint-*")):
            show.err.print("no checkpoint yet: the run starts afresh")
    if launch.inside():
        from finetune_cli import worker

        return worker.run(made, resume=resume, as_json=as_json)
    return start(made, resume=resume, as_json=as_json)


def _rank() -> int:
    from finetune_cli import log

    return log.rank()


def finished(folder: Path) -> bool:
    return (folder / "report.json").exists()


RESULTS = ("metrics.jsonl", "report.json", "trainer_state.json")
"""Files that say that a run has begun."""
RUN_FILES = (*RESULTS, "plan.json", "recipe.yaml", "error.json", "traceback.txt")


def claim(plan: Plan, loaded: Loaded, *, resume: bool, overwrite: bool) -> None:
    """Make the run folder, and write what will be run. Raises RecipeError where another run's results are in it."""
    folder = plan.run
    used = [name for name in RESULTS if (folder / name).exists()] + [p.name for p in folder.glob("checkpoint-*")]
    if used and not (resume or overwrite):
        raise RecipeError(
            f"{show.short(str(folder))} holds another run ({used[0]})",
            "Name another output_dir, go on with --resume, or replace it with --overwrite.",
        )
    if overwrite and not resume:
        clear(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.json").unlink(missing_ok=True)
        (folder / "plan.json").write_text(plan.model_dump_json(indent=1), encoding="utf-8")
        (folder / "recipe.yaml").write_text(loaded.dump(), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{folder} cannot be written: {error.strerror}", "Name another output_dir.") from error


def clear(folder: Path) -> None:
    """Remove what a run wrote, and nothing else: what is left of an adapter would be loaded with the next result."""
    result = [name for path in folder.glob("checkpoint-*/manifest.json") for name in _named(path)]
    result += ["README.md"] if finished(folder) else []
    for name in result:
        (folder / Path(name).name).unlink(missing_ok=True)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def _named(manifest: Path) -> list[str]:
    """The files of a checkpoint, of which those of the model are also the run's result."""
    try:
        return [*json.loads(manifest.read_text(encoding="utf-8"))["files"]]
    except (ValueError, KeyError, TypeError):
        return []


def start(plan: Plan, *, resume: bool, as_json: bool) -> int:
    """Start the worker(s), pass signals on, and tell what went wrong."""
    options = [*(["--resume"] if resume else []), *(["--json"] if as_json else [])]
    command = launch.argv(plan, plan.run / "plan.json", options)
    process = subprocess.Popen(command, env=launch.environment(plan))

    def forward(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return report_end(plan, code)


def report_end(plan: Plan, code: int) -> int:
    """The exit code of the run. A worker's error is told once, whatever its number of processes."""
    from finetune_cli.worker import read_error

    failure = read_error(plan.run / "error.json")
    if failure is not None:
        raise failure
    if code in (-signal.SIGINT, -signal.SIGTERM):  # stopped before it listened
        return 128 - code
    if code < 0:
        raise MachineError(
            f"the training process was killed by {signal.Signals(-code).name}",
            "SIGKILL is usually the system running out of memory: lower train.per_device_train_batch_size.",
        )
    return code


def init(method: str, output: Path) -> int:
    from finetune_cli.methods import registry
    from finetune_cli.shipped import recipes_folder

    template = recipes_folder() / "templates" / f"{method}.yaml"
    if method not in registry() or not template.exists():
        raise RecipeError(f"there is no method {method!r}", f"Known: {', '.join(registry())}.")
    if output.exists():
        raise RecipeError(f"{output} exists", "Name another file with --output.")
    text = template.read_text(encoding="utf-8").replace("$SCHEMA", schema_path())
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"{output} cannot be written: {error.strerror}", "Name another file with --output."
        ) from error
    show.out.print(f"wrote {output}; next:\n  finetune validate {output}\n  finetune run {output}")
    return 0


def schema_path() -> str:
    """Where an editor finds the schema, whatever folder the recipe is in."""
    from finetune_cli.shipped import schemas_folder

    return str((schemas_folder() / "recipe.schema.json").resolve().as_uri())


def recipes() -> int:
    from finetune_cli.shipped import recipes_folder

    for path in sorted(recipes_folder().glob("*.yaml")):
        lines = [line[2:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        about = next((line for line in lines if not line.startswith("yaml-language-server")), "")
        show.out.print(f"{show.short(str(path))}\n  {about}")
    return 0


def methods(name: str | None) -> int:
    from finetune_cli.methods import registry

    known = registry()
    if name is None:
        for key, method in known.items():
            show.out.print(f"{key:8} {method.summary}")
        return 0
    if name not in known:
        raise RecipeError(f"there is no method {name!r}", f"Known: {', '.join(known)}.")
    method = known[name]
    show.out.print(f"{name}: {method.summary}\nrows: {', '.join(method.shapes)}")
    for key, info in method.model_fields.items():
        if key != "name":
            about = " ".join((info.description or "").split())
            show.out.print(f"  {key} = {json.dumps(info.default)}\n      {about}", markup=False)
    return 0


def schema() -> int:
    from finetune_cli.recipe.schema import recipe_schema

    show.to_stdout(recipe_schema())
    return 0


def preview(recipe: Path, overrides: Sequence[str], *, row: int | None, n: int, as_json: bool) -> int:
    from finetune_cli import log
    from finetune_cli.data.preview import previews
    from finetune_cli.engine.prepare import bind

    loaded, facts, _ = checked(recipe, overrides)
    log.setup()
    chat = bind(loaded.recipe, facts).chat
    for item in previews(loaded.recipe, chat, rows=None if row is None else [row], most=None if as_json else n):
        show.to_stdout(item.to_json()) if as_json else show.out.print(show.preview(item))
    return 0
