"""A finished run, as the commands that use it find it."""

from pathlib import Path

from pydantic import ValidationError

from finetune_cli.errors import RecipeError
from finetune_cli.plan.resolve import Plan


def plan_of(run: Path) -> Plan:
    """Raises RecipeError for what is no run folder, or a run that has not finished."""
    file = run / "plan.json"
    if not file.is_file():
        raise RecipeError(f"{run} is no run folder: it has no plan.json", "Name the output_dir of a run.")
    if not (run / "report.json").is_file():
        raise RecipeError(f"{run} is not finished", "Go on with `finetune run RECIPE --resume`.")
    try:
        return Plan.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise RecipeError(f"{file} is of another version of finetune", "Use the version that wrote it.") from error
