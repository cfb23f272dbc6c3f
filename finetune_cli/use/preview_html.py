"""Previewed rows as one page for a browser, with nothing outside it and everything that comes from a row escaped."""

import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup, escape

from finetune_cli.data.sheets import Sheet
from finetune_cli.data.visible import CONTROLS
from finetune_cli.errors import MachineError
from finetune_cli.use.page import render

OPEN = 10
"""Rows that are unfolded at first, of a page with more than twice as many."""
SPACES = re.compile(r"\n|\t| ")
MARKS = {"\n": Markup("<u class=n></u>\n"), "\t": Markup("<u class=a>\t</u>"), " ": Markup("<u> </u>")}


def write(path: Path, sheets: Sequence[Sheet], *, title: str, packed: str = "") -> None:
    """Write the page. Raises MachineError where it cannot be written."""
    try:
        path.write_text(page(sheets, title=title, packed=packed), encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror}", "Name another file with --html.") from error


def page(sheets: Sequence[Sheet], *, title: str, packed: str = "") -> str:
    return render(
        "preview.html.jinja",
        style="preview.css",
        script="preview.js",
        sheets=sheets,
        title=title,
        packed=packed,
        here={(sheet.row, sheet.part) for sheet in sheets},
        totals=totals(sheets),
        visible=visible,
        unfolded=len(sheets) if len(sheets) <= 2 * OPEN else OPEN,
    )


def totals(sheets: Sequence[Sheet]) -> dict[str, int]:
    return {
        "rows": len({sheet.row for sheet in sheets}),
        "tokens": sum(sheet.tokens for sheet in sheets),
        "trained": sum(sheet.trained for sheet in sheets),
        "odd": sum(bool(sheet.warnings or sheet.differences) for sheet in sheets),
        "dropped": sum(bool(sheet.dropped) for sheet in sheets),
        "split": sum(sheet.parts > 1 for sheet in sheets),
        "broken": sum(bool(sheet.error) for sheet in sheets),
    }


def visible(text: str) -> Markup:
    """The text of a token with white space that can be seen and is still copied as it is."""
    parts = (MARKS.get(part) or escape(part.translate(CONTROLS)) for part in re.split(f"({SPACES.pattern})", text))
    return Markup("").join(parts)
