"""Pages for a browser: one file each, nothing fetched from anywhere, every value escaped."""

import hashlib
from base64 import b64encode
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

HERE = Path(__file__).parent
STYLE = "page.css"
"""What all pages share."""


def environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def render(template: str, *, style: str, script: str, **values: Any) -> str:
    """A template of this folder with its style and its script, which are the names of files here.

    The page's own policy allows this script and no other: should an escape ever fail, a browser still runs nothing.
    """
    code = (HERE / script).read_text(encoding="utf-8")
    return (
        environment()
        .get_template(template)
        .render(
            style=Markup("".join((HERE / name).read_text(encoding="utf-8") for name in (STYLE, style))),
            script=Markup(code),
            allowed=b64encode(hashlib.sha256(code.encode()).digest()).decode(),
            **values,
        )
    )
