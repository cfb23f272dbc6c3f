"""What people start with: a method's recipe, a whole one, another tool's as ours; and the list of what comes along."""

from pathlib import Path

from finetune_cli import show
from finetune_cli.errors import MachineError, RecipeError
from finetune_cli.methods import registry
from finetune_cli.shipped import recipes_folder
from finetune_cli.use import zoo

DEFAULT = Path("recipe.yaml")


def init(what: str | None, output: Path | None, *, source: Path | None = None) -> int:
    """A recipe to start from: a method's template, one of those that come along, or another tool's as ours."""
    if source is None and what is not None and what in (one.name for one in zoo.entries()):
        return _tell(zoo.copy(what, _free(output or Path("recipes") / f"{what}.yaml")))
    output = _free(output or DEFAULT)
    text = translated(source, method=what) if source is not None else template_of(what)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"{output} cannot be written: {error.strerror}", "Name another file with --output."
        ) from error
    return _tell([output])


def _free(output: Path) -> Path:
    if output.exists():
        raise RecipeError(f"{output} exists", "Name another file with --output.")
    return output


def _tell(written: list[Path]) -> int:
    recipe, *others = written
    also = f", {', '.join(map(str, others))}" if others else ""
    show.out.print(f"wrote {recipe}{also}; next:\n  finetune validate {recipe}\n  finetune run {recipe}", markup=False)
    return 0


def translated(source: Path, *, method: str | None) -> str:
    """Another tool's recipe as ours."""
    from finetune_cli.recipe.foreign import convert

    try:
        return f"# yaml-language-server: $schema={zoo.schema_path()}\n{convert(source, method=method)}"
    except OSError as error:
        raise RecipeError(f"{source} cannot be read: {error.strerror}", "Name another tool's recipe.") from error


def template_of(method: str | None) -> str:
    """The recipe of a method, for rows of one's own."""
    known = f"Methods: {', '.join(registry())}. `finetune recipes` lists whole recipes."
    if method is None:
        raise RecipeError("init needs a method or the name of a recipe, or --from a recipe", known)
    template = recipes_folder() / "templates" / f"{method}.yaml"
    if method not in registry() or not template.exists():
        raise RecipeError(f"there is no method or recipe {method!r}", known)
    return template.read_text(encoding="utf-8").replace("$SCHEMA", zoo.schema_path())


def recipes(*, as_json: bool) -> int:
    """What comes along, with what it was measured to take."""
    found = zoo.entries()
    if as_json:
        show.to_stdout([one.to_json() for one in found])
    else:
        show.recipes((one.cells, one.about) for one in found)
    return 0
