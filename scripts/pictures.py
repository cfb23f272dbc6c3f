"""The README's pictures: a wrong recipe, a preview and a finished run, as SVG from what the program really prints.

python scripts/pictures.py RUN, where RUN is the folder of a finished quickstart; its own plan, metrics and report are
shown again through the screen that showed them first.
"""

import io
import json
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from finetune_cli import show
from finetune_cli.commands import opened
from finetune_cli.data.preview import search
from finetune_cli.data.sheets import sheets
from finetune_cli.engine.prepare import bind
from finetune_cli.errors import FinetuneError
from finetune_cli.plan.resolve import Plan
from finetune_cli.use.preview_text import show as show_rows

HERE = Path(__file__).resolve().parent.parent
PICTURES = HERE / "docs" / "pictures"
WRONG = """\
method: sft
modell: Qwen/Qwen2.5-0.5B-Instruct
output_dir: runs/first
data:
  train: recipes/data/orders_sft.jsonl
  max_seq_length: 1024
train:
  learning_rat: 2e-4
  optim: adamw_tork
  micro_batch_size: 4
"""


def console() -> Console:
    colours = {"force_terminal": True, "color_system": "truecolor", "highlight": False}
    return Console(record=True, width=108, file=io.StringIO(), **colours)  # type: ignore[arg-type]


def save(picture: Console, name: str, title: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    text = picture.export_svg(title=title, unique_id=name)
    (PICTURES / f"{name}.svg").write_text(text, encoding="utf-8")


def error_screen() -> None:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(WRONG, encoding="utf-8")
        show.err = console()
        try:
            opened(recipe, [])
        except FinetuneError as failure:
            problems = [type(p)(**{**p.to_json(), "file": recipe.name}) for p in failure.problems]
            show.error(type(failure)("recipe.yaml is not a valid recipe", problems=tuple(problems)))
        save(show.err, "error", "finetune run recipe.yaml")


def preview_screen() -> None:
    loaded, facts = opened(HERE / "recipes" / "quickstart.yaml", [])
    picture, chat = console(), bind(loaded.recipe, facts).chat
    found = search(loaded.recipe, chat, most=2)
    pages = (sheet for one in found for sheet in sheets(one, loaded.recipe, chat, {}))
    show_rows(picture, pages, packed="", where=None)
    save(picture, "preview", "finetune preview-template recipes/quickstart.yaml -n 2")


def run_screen(run: Path) -> None:
    """The events of a finished run once more."""
    plan = Plan.model_validate_json((run / "plan.json").read_text(encoding="utf-8"))
    plan = plan.model_copy(update={"output_dir": str(HERE / plan.recipe.output_dir)})
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = max(line["step"] for line in lines)
    picture = console()
    picture.print(show.header(plan))
    screen = show.Screen(plan, picture, live=False)
    screen({"event": "rows", "sets": {"train": report["rows"]}})
    weights = report["weights"]
    screen({"event": "start", "total": report["steps"], "trained": weights["trained"], "weights": weights["total"],
            "device": report["device"]})  # fmt: skip
    screen({"event": "layout", "padded_because": report["layout"]["because"]})
    for step in sorted({line["step"] for line in lines}):
        for line in lines:
            if line["step"] == step:
                screen(line)
        screen({"event": "looked", "step": step, "final": step == last})
    screen({"event": "end", "report": report})
    save(picture, "run", "finetune run recipes/quickstart.yaml")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/pictures.py RUN (the folder of a finished quickstart)")
    run = Path(sys.argv[1]).resolve()
    os.chdir(HERE)  # paths are shown relative to the working directory
    error_screen()
    preview_screen()
    run_screen(run)
