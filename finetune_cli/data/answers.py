"""What the process of a chat template answers: the conversation in a form that the template takes, and its spans."""

from collections.abc import Callable, Mapping
from typing import Any

from finetune_cli.data.forms import forms, parsed, plain
from finetune_cli.data.spans import Mismatch, Raised, Script, Style
from finetune_cli.errors import DataError


def answer(style: Style, request: Mapping[str, Any]) -> dict[str, Any]:
    """What `request` wants of its messages: texts that train some `turns` or all; one turn's prompt; or what
    inference feeds after the last.

    {"result", "notes"}, or {"error": [message, hint]} where no form of the messages gives it.
    """
    uses: dict[str, Callable[[Script], Any]] = {
        "turns": lambda script: script.texts(request["turns"]),
        "all": Script.everything,
        "prompt": lambda script: script.best(*request["turns"])[1:4],
        "feeds": lambda script: script.upto(len(script.messages), {}, prompt=True),
    }
    try:
        result, notes = in_some_form(style, request, uses[request["want"]])
    except DataError as error:
        return {"error": [error.message, error.hint]}
    return {"result": result, "notes": notes}


def in_some_form(style: Style, request: Mapping[str, Any], use: Callable[[Script], Any]) -> Any:
    """(`use` of the conversation, notes) in the first form that the template renders whole; else the first refusal,
    of a form that it renders at all where there is one."""
    tools, kwargs = parsed(request.get("tools")) or None, request.get("kwargs") or {}
    refusals: list[DataError] = []
    for name, form in forms([plain(message) for message in request["messages"]]):
        script = Script(style, form, tools, kwargs, [("message_form", f"rendered with {name}")] if name else [])
        try:
            return use(script), script.notes
        except Mismatch:
            raise
        except DataError as error:
            refusals.append(error)
    raise min(refusals, key=lambda error: isinstance(error, Raised))
