"""Every command; the only place that turns an error into an exit code."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune_cli.errors import FinetuneError, MachineError

app = typer.Typer(
    name="finetune",
    help="Fine-tune language models from a recipe that is checked before anything is loaded.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value; repeatable.")]
Where = Literal["zero_loss", "overlength", "split"]
WINDOWS = os.name == "nt"
AsJson = Annotated[bool, typer.Option("--json", help="For programs: JSON on stdout.")]


@app.command()
def run(
    recipe: RecipeFile,
    set_: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    resume_anyway: Annotated[
        bool, typer.Option("--resume-anyway", help="The same under a recipe that has changed; says what that does.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is in the run folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the job."""
    from finetune_cli.engine import signals

    signals.end_early()
    from finetune_cli import commands, runs

    options = runs.Options(resume or resume_anyway, resume_anyway, overwrite, as_json)
    raise typer.Exit(commands.run(recipe, set_ or [], options))


@app.command()
def validate(
    recipe: RecipeFile,
    set_: Sets = None,
    fast: Annotated[bool, typer.Option("--fast", help="Stop before the tokenizer and the rows.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="First put keys right in the file itself.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Load the model and time a few steps.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check everything that needs no weights."""
    from finetune_cli import commands

    code = commands.validate(recipe, set_ or [], fast=fast, fix=fix, calibrate=calibrate, as_json=as_json)
    raise typer.Exit(code)


@app.command("preview-template")
def preview_template(
    recipe: RecipeFile,
    set_: Sets = None,
    row: Annotated[int | None, typer.Option(help="This row alone, counted from 0.", min=0)] = None,
    n: Annotated[
        int | None, typer.Option("-n", help="This many rows: 3, with --html 200, with --json all.", min=1)
    ] = None,
    where: Annotated[Where | None, typer.Option(help="Only rows that are so.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page for a browser.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what the model will see, token by token, and what is trained."""
    from finetune_cli import commands

    raise typer.Exit(commands.preview(recipe, set_ or [], row=row, n=n, where=where, html=html, as_json=as_json))


@app.command()
def plan(recipe: RecipeFile, set_: Sets = None, as_json: AsJson = False) -> None:
    """Show the resolved plan and where each value comes from."""
    from finetune_cli import commands

    raise typer.Exit(commands.plan(recipe, set_ or [], as_json=as_json))


@app.command()
def init(
    what: Annotated[
        str | None, typer.Argument(metavar="[METHOD]", help="sft, dpo, ..., or a recipe that `finetune recipes` lists.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write: recipe.yaml, or recipes/NAME.yaml.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="A recipe of axolotl, LLaMA-Factory or TRL to translate.")
    ] = None,
) -> None:
    """Write a recipe to start from, or another tool's as ours."""
    from finetune_cli import starting

    raise typer.Exit(starting.init(what, output, source=source))


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with finetune: method, hardware, measured time and memory."""
    from finetune_cli import starting

    raise typer.Exit(starting.recipes(as_json=as_json))


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method's keys.")] = None, as_json: AsJson = False
) -> None:
    """List the methods, or the keys of one."""
    from finetune_cli import commands

    raise typer.Exit(commands.methods(name, as_json=as_json))


@app.command()
def explain(
    rule: Annotated[str | None, typer.Argument(metavar="[FTnnn]", help="Show one rule.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the rules of `validate`, or say why there is one and what to do about it."""
    from finetune_cli import commands

    raise typer.Exit(commands.explain(rule, as_json=as_json))


Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]


@app.command()
def push(run: Run, as_json: AsJson = False) -> None:
    """Upload the result of a run to the model hub."""
    from finetune_cli import using

    raise typer.Exit(using.push(run, as_json=as_json))


class MergeDtype(StrEnum):
    """Number formats that a merged model is saved in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@app.command()
def merge(
    run: Run,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write; RUN/merged.")] = None,
    dtype: Annotated[MergeDtype, typer.Option(help="Number format of the weights.")] = MergeDtype.auto,
    as_json: AsJson = False,
) -> None:
    """Add an adapter into its base and save a model of its own."""
    from finetune_cli import using

    raise typer.Exit(using.merge(run, output, dtype=dtype.value, as_json=as_json))


@app.command()
def chat(
    run: Annotated[str, typer.Argument(help="A run, one of its checkpoints, or any model.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask this, print the answer, end.")] = None,
    before: Annotated[bool, typer.Option("--before", help="Beside it what the model answered before.")] = False,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Feed the text as it is, without the chat template.")] = False,
    temperature: Annotated[float | None, typer.Option(min=0, help="Not the recipe's; 0 is greedy.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Not the recipe's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to what was trained."""
    from finetune_cli import using

    talk = using.Talk(prompt, system, before, raw, temperature, max_new_tokens, as_json)
    raise typer.Exit(using.chat(run, talk))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: a block to paste, and the command that mends each thing that is wrong."""
    from finetune_cli import using

    raise typer.Exit(using.doctor(as_json=as_json))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are compared.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write: RUN/report.html, or comparison.html.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of a run, or of several beside one another."""
    from finetune_cli import using

    raise typer.Exit(using.report(runs, output, as_json=as_json))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    from finetune_cli import commands

    raise typer.Exit(commands.schema())


def main() -> None:
    """The `finetune` command. A process of several, which a launcher started, takes nothing down (`worker.leave`)."""
    try:
        run_app()
    except SystemExit as end:
        worker = sys.modules.get("finetune_cli.worker")
        if worker is not None and worker.HELD:
            worker.leave(int(end.code or 0))
        raise


def run_app() -> None:
    """Every error as one screen, or one line of JSON."""
    try:
        if WINDOWS:  # signals, locks and limits of processes are those of POSIX
            raise MachineError("finetune does not run on Windows itself", "Run it in WSL 2, which is Linux.")
        app()
    except FinetuneError as failure:
        _tell(failure)
        sys.exit(failure.exit_code)
    except Exception as bug:
        if os.environ.get("FINETUNE_TRACEBACK"):
            raise
        text = f"{type(bug).__name__}: {bug}"
        _tell(FinetuneError(text, "This is a bug of ours. FINETUNE_TRACEBACK=1 shows where; please report it."))
        sys.exit(FinetuneError.exit_code)


def _tell(failure: FinetuneError) -> None:
    from finetune_cli import show

    if "--json" in sys.argv:
        problems = [problem.to_json() for problem in failure.named()]
        show.to_stdout({"event": "error", **failure.to_json(), "problems": problems})
    else:
        show.error(failure)
