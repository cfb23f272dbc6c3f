"""What each command does: the stages of a check, the plan, the start of the workers."""

import codecs
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli import log, show
from finetune_cli.checks import stages
from finetune_cli.checks.files import files
from finetune_cli.checks.rule import Seen
from finetune_cli.checks.spread import by_memory
from finetune_cli.errors import DataError, FinetuneError, MachineError, ModelError, Problem, RecipeError
from finetune_cli.plan import facts as model_facts
from finetune_cli.plan import launch, machine
from finetune_cli.plan.memory import remembered
from finetune_cli.plan.resolve import Plan, resolve
from finetune_cli.recipe.load import Loaded, load
from finetune_cli.use.memory_table import memory_table

if TYPE_CHECKING:
    from finetune_cli import runs
    from finetune_cli.engine.hub import Repository
    from finetune_cli.methods import Method
    from finetune_cli.recipe.fix import Fixed


def opened(recipe: Path, overrides: Sequence[str]) -> tuple[Loaded, model_facts.Facts]:
    """The recipe, its schema checked, and what is known of its model."""
    loaded = load(recipe, overrides)
    return loaded, model_facts.of(loaded.recipe.model)


def checked(recipe: Path, overrides: Sequence[str], note: stages.Note = stages.unheard) -> Seen:
    """Schema, lints and files, stage after stage. `note` hears the warnings. Raises the failing stage's error."""
    loaded, gone = load(recipe, overrides), None
    try:
        facts = model_facts.of(loaded.recipe.model)
    except ModelError as error:  # is told when its stage comes: after lints and files
        facts, gone = model_facts.Facts(kind="hub"), error
    world = launch.world() if launch.inside() else None
    plan = resolve(
        loaded.recipe,
        loaded.data,
        machine.look(),
        facts,
        recipe_path=recipe.absolute(),
        world=world,
        overrides=overrides,
    )
    seen = Seen(loaded, plan)
    seen = replace(seen, plan=by_memory(seen))
    stages.lints(seen, note)
    present(loaded)
    if gone is not None:
        raise ModelError(gone.message, gone.hint, problems=(loaded.problem("model.name_or_path", gone.message),))
    return seen


def present(loaded: Loaded, *, under: tuple[str, ...] = ("",)) -> None:
    """Raises DataError where a file that the recipe names is not there, at keys that begin with one of `under`."""
    missing = tuple(problem for problem in files(loaded) if problem.key.startswith(under))
    if missing:
        raise DataError("files are missing", "Paths are relative to the recipe.", problems=missing)


def planned(recipe: Path, overrides: Sequence[str]) -> tuple[Plan, Loaded, list[Problem]]:
    """The plan, the recipe it is of, and the warnings so far."""
    warnings: list[Problem] = []
    seen = checked(recipe, overrides, warnings.append)
    return remembered(seen.plan), seen.loaded, warnings


def validate(
    recipe: Path, overrides: Sequence[str], *, fast: bool, as_json: bool, fix: bool = False, calibrate: bool = False
) -> int:
    if fast and calibrate:
        raise RecipeError("--fast and --calibrate exclude each other", "Keep one of them.")
    failure: FinetuneError | None = None
    warnings: list[Problem] = []
    told: dict[str, Any] = {"rows": {}, "weights": {}, "run": {}}
    fixed = fix_file(recipe) if fix else None
    if fixed is not None and not as_json:
        show.fixed(recipe, fixed)
    try:
        seen = checked(recipe, overrides, warnings.append)
        if not fast:
            told = looked_into(seen, warnings.append, calibrate=calibrate)
    except FinetuneError as error:
        failure = error
    if as_json:
        result = {
            "ok": failure is None,
            "exit_code": failure.exit_code if failure else 0,
            "message": failure.message if failure else "",
            "hint": failure.hint if failure else "",
            "problems": [p.to_json() for p in (*(failure.named(str(recipe)) if failure else ()), *warnings)],
            **told,
            **({"fixed": fixed.to_json()} if fixed is not None else {}),
        }
        show.to_stdout(result)
        return failure.exit_code if failure else 0
    show.warnings(warnings)
    if failure is not None:
        raise failure
    show.validated(recipe, told, fast=fast, warnings=len(warnings))
    return 0


def fix_file(recipe: Path) -> "Fixed | None":
    """Put right what is certain; None where the file is no text, which `load` tells of."""
    from finetune_cli.recipe.fix import fix
    from finetune_cli.recipe.load import shown

    try:
        raw = recipe.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    windows = "\r\n" in text
    found = fix(text.replace("\r\n", "\n"), shown(recipe))
    if found.moves:
        after = found.text.replace("\n", "\r\n") if windows else found.text
        beside = recipe.with_name(recipe.name + ".writing")
        try:
            beside.write_bytes(after.encode("utf-8-sig" if raw.startswith(codecs.BOM_UTF8) else "utf-8"))
            shutil.copymode(recipe, beside)
            beside.replace(recipe)
        except OSError as error:
            raise MachineError(f"{recipe} cannot be written: {error.strerror}", "Check the permissions.") from error
    return found


def looked_into(seen: Seen, note: stages.Note, *, calibrate: bool = False) -> dict[str, Any]:
    """Tokenizer, configuration and rows, on the trainer's own path: the counts of every set, the sizes, and what the
    run takes; with `calibrate` its time too, by a few real steps."""
    from finetune_cli import log
    from finetune_cli.engine import calibrate as clock
    from finetune_cli.engine import preflight

    log.setup()
    log.quiet_libraries()
    found = preflight.examine(seen, note)
    takes: dict[str, Any] = dict(clock.length(seen.plan, found.sets.train.rows))
    if calibrate:
        takes |= clock.calibrate(remembered(seen.plan), found.words, found.sets)
    return {"rows": found.sets.summary()["sets"], "weights": preflight.sizes(found), "run": takes}


def plan(recipe: Path, overrides: Sequence[str], *, as_json: bool) -> int:
    made, _, warnings = planned(recipe, overrides)
    show.warnings(warnings)
    if as_json:
        show.to_stdout(made.model_dump(mode="json"))
        return 0
    show.out.print(show.header(made))
    show.origins(made)
    show.out.print(memory_table(made))
    return 0


def run(recipe: Path, overrides: Sequence[str], options: "runs.Options") -> int:
    if options.resume and options.overwrite:
        raise RecipeError("--resume and --overwrite exclude each other", "Keep one of them.")
    from finetune_cli import runs

    made, loaded, warnings = planned(recipe, overrides)
    if not options.as_json and (not launch.inside() or log.rank() == 0):
        show.warnings(warnings)
        show.out.print(show.header(made))
    if made.recipe.save.push_to_hub and (not launch.inside() or log.rank() == 0):
        made = made.model_copy(update={"repository": asdict(repository(made, loaded))})
    again = ("finetune", "run", str(recipe), *(part for value in overrides for part in ("--set", value)))
    return runs.run(made, loaded, replace(options, again=(*again, *(["--json"] if options.as_json else []))))


def repository(made: Plan, loaded: Loaded) -> "Repository":
    """Where the run will be uploaded to. Raises MachineError, at the line to blame, where it would not be let in."""
    from finetune_cli.engine.hub import open_repository

    try:
        return open_repository(made.recipe.save, made.run)
    except MachineError as error:
        found = tuple(loaded.problem(p.key, p.message, rule=p.rule) for p in error.problems)
        raise MachineError(error.message, error.hint, problems=found) from error


def methods(name: str | None, *, as_json: bool = False) -> int:
    from finetune_cli.methods import registry

    known = registry()
    if as_json and (name is None or name in known):
        found = [as_data(known[key]) for key in ([name] if name else known)]
        show.to_stdout(found[0] if name else found)
        return 0
    if name is None:
        for key, method in known.items():
            show.out.print(f"{key:8} {method.summary}")
        return 0
    if name not in known:
        raise RecipeError(f"there is no method {name!r}", f"Known: {', '.join(known)}.")
    method = known[name]
    show.out.print(f"{name}: {method.summary}\nrows: {', '.join(method.shapes)}")
    for key, told in as_data(method)["keys"].items():
        default = "(required)" if told["required"] else f"= {json.dumps(told['default'])}"
        show.out.print(f"  {key} {default}\n      {told['about']}", markup=False)
    return 0


def as_data(method: "type[Method]") -> dict[str, Any]:
    """A method for programs: its keys with their defaults (null where there is none), and what they mean."""
    manual = method.manual()
    keys = {
        key: {
            "required": info.is_required(),
            "default": None if info.is_required() else info.get_default(call_default_factory=True),
            "about": " ".join(manual.get(key, "").split()),
        }
        for key, info in method.model_fields.items()
        if key != "name"
    }
    name = method.model_fields["name"].default
    return {"name": name, "summary": method.summary, "shapes": list(method.shapes), "keys": keys}


def explain(rule: str | None, *, as_json: bool = False) -> int:
    from finetune_cli.checks.rules import BY_ID

    if as_json and (rule is None or rule.upper() in BY_ID):
        known = [BY_ID[rule.upper()]] if rule else [*BY_ID.values()]
        told = [{"id": r.id, "title": r.title, "severity": r.severity, "why": r.why, "remedy": r.remedy} for r in known]
        show.to_stdout(told[0] if rule else told)
        return 0
    if rule is None:
        show.rules(BY_ID.values())
        return 0
    found = BY_ID.get(rule.upper())
    if found is None:
        raise RecipeError(f"there is no rule {rule!r}", f"Known: {', '.join(BY_ID)}.")
    show.rule(found)
    return 0


def schema() -> int:
    from finetune_cli.recipe.schema import recipe_schema

    show.to_stdout(recipe_schema())
    return 0


SCREEN, PAGE = 3, 200
"""Rows shown where no number is asked for."""


def preview(
    recipe: Path,
    overrides: Sequence[str],
    *,
    row: int | None,
    n: int | None,
    where: str | None,
    html: Path | None,
    as_json: bool,
) -> int:
    from finetune_cli import log
    from finetune_cli.data.preview import previews, search
    from finetune_cli.data.sheets import packing, sheets
    from finetune_cli.engine.prepare import bind
    from finetune_cli.use import preview_html, preview_text

    loaded, facts = opened(recipe, overrides)
    present(loaded, under=("data.train", "model.chat_template"))
    log.setup()
    chat, rows = bind(loaded.recipe, facts).chat, None if row is None else [row]
    if as_json:
        for item in previews(loaded.recipe, chat, rows=rows, where=where, most=n):
            show.to_stdout(item.to_json())
    if as_json and html is None:
        return 0
    bins, packed = packing(loaded.recipe, chat)
    most = n if n is not None else SCREEN if html is None else PAGE
    found = search(loaded.recipe, chat, rows=rows, where=where, most=most)
    pages = (sheet for one in found for sheet in sheets(one, loaded.recipe, chat, bins))
    if html is not None:
        told = list(pages)
        preview_html.write(html, told, title=recipe.name, packed=packed)
        show.err.print(f"wrote {html}: {len({sheet.row for sheet in told})} rows", markup=False)
        return 0
    preview_text.show(show.out, pages, packed=packed, where=where)
    return 0
