"""Preference pairs: the forms they come in, and one row of tokens in which what both sides begin with is there once.

The canonical pair is {prompt, chosen, rejected}: three strings, or three lists of messages. Where the columns give no
prompt it is what both sides begin with: whole messages of a conversation; of strings, what ends where an answer is
opened (`Assistant:`, `[/INST]`, ...), never words that two answers happen to share.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune_cli.data.forms import decoded
from finetune_cli.errors import DataError
from finetune_cli.types import Branch, Row

if TYPE_CHECKING:
    from finetune_cli.data.cells import Cells
    from finetune_cli.data.chat import Chat

SIDES = ("chosen", "rejected")
Side = tuple[list[int], list[bool]]
"""Ids of one whole render, and which of them are trained."""

OPENS_ANSWER = re.compile(
    r"(?:(?:^|\n)[ \t]*(?:#{1,4} ?)?(?:assistant|ai|bot|model|gpt|response|answer|output)[ \t]*:"
    r"|\[/INST\]|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
    r"|<start_of_turn>model\n|<\|assistant\|>\n?)",
    re.IGNORECASE,
)
"""Where the answer of a conversation written as one string begins."""


def canonical(cells: "Cells") -> dict[str, Any]:
    """A pair of {prompt?, chosen, rejected, margin?, label?} with any of the columns that may hold the prompt."""
    extra = {**numbers(cells, "margin"), **numbers(cells, "label")}
    if "input_ids_chosen" in cells.raw.values:
        return {"ids": {name: tokens(cells, name) for name in SIDES}, **extra}
    chosen, rejected = (side(cells, name) for name in SIDES)
    if isinstance(chosen, str) != isinstance(rejected, str):
        cells.fail("rejected", cells.get("rejected"), "the kind of chosen: both texts, or both messages")
    asked = prompt(cells, blank=isinstance(chosen, str))
    if asked is None:
        return {**without_prompt(cells, chosen, rejected), **extra}
    if isinstance(asked, str) and isinstance(chosen, str):
        unrendered(cells, "prompt")
        return {"prompt": asked, "chosen": chosen, "rejected": rejected, **extra}
    messages = with_system(cells, [{"role": "user", "content": asked}]) if isinstance(asked, str) else asked
    answers = {name: answer(cells, name, said, messages) for name, said in zip(SIDES, (chosen, rejected), strict=True)}
    return {"prompt": messages, **answers, **cells.extras(), **extra}


def unrendered(cells: "Cells", name: str) -> None:
    """Raises DataError where something that only a template can show stands beside text."""
    if beside := [key for key in ("system", "tools", "chat_template_kwargs") if cells.raw.values.get(key)]:
        cells.fail(name, cells.get(name), f"messages, because the row has {' and '.join(beside)}")


def side(cells: "Cells", name: str) -> Any:
    """A text, or a list of messages (a single message object is a list of one)."""
    return cells.messages(name) if isinstance(cells.get(name), list | dict) else cells.text(name)


def prompt(cells: "Cells", *, blank: bool) -> Any:
    """What is asked, from whichever column has it; None where only the answers can tell. A text may say nothing where
    it is `blank`, before answers that are text."""
    values = cells.raw.values
    if values.get("instruction"):
        said = "\n\n".join(filter(None, (cells.text("instruction"), cells.optional("input"))))
        return with_system(cells, [{"role": "user", "content": said}])
    column = next((name for name in ("prompt", "messages", "conversations") if values.get(name) is not None), None)
    if column is None:
        return None
    if isinstance(values[column], list | dict):
        return with_system(cells, cells.messages(column))
    return cells.text(column, blank=blank)


def with_system(cells: "Cells", messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    said = cells.optional("system")
    if said and messages[0]["role"] == "system":
        cells.fail("system", said, "nothing, because the prompt begins with a system message")
    return [{"role": "system", "content": said}, *messages] if said else messages


def answer(cells: "Cells", name: str, said: Any, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of one side after the prompt, which the side may repeat."""
    if isinstance(said, str):
        return [{"role": "assistant", "content": said}]
    for start in (asked, asked[asked[0]["role"] == "system" :]):  # the system message may be a column's
        if start and said[: len(start)] == start and len(said) > len(start):
            return list(said[len(start) :])
    if said[0]["role"] != "assistant":
        cells.fail(name, cells.get(name), "the answer, or the prompt's own messages and then the answer")
    return list(said)


def without_prompt(cells: "Cells", chosen: Any, rejected: Any) -> dict[str, Any]:
    """The prompt as the shared beginning. `found` says so, and is noted when the row is encoded."""
    if isinstance(chosen, str):
        unrendered(cells, "chosen")
        start, same = boundary(chosen, rejected)
        what = f"the first {start} characters" if start else "nothing: both are trained from their first word"
        found = f"no prompt column; the prompt is {what}" + ("" if same else ", although more words are shared")
        return {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:], "found": found}
    chosen, rejected = with_system(cells, chosen), with_system(cells, rejected)
    start = common(chosen, rejected, most=min(len(chosen), len(rejected)) - 1)
    found = f"no prompt column; the prompt is the {start} messages that chosen and rejected begin with"
    return {
        "prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:], "found": found,
        **cells.extras(),
    }  # fmt: skip


def boundary(chosen: str, rejected: str) -> tuple[int, bool]:
    """(where the last answer is opened in what two texts share, whether they part right there). It is opened as the
    first is: `Answer:` after `Assistant:` is the assistant's word."""
    shared = common(chosen, rejected, most=min(len(chosen), len(rejected)))
    opened = list(OPENS_ANSWER.finditer(chosen, 0, shared))
    kind = opened[0][0].strip().lower() if opened else ""
    start = max((found.end() for found in opened if found[0].strip().lower() == kind), default=0)
    return start, not chosen[start:shared].strip()


def common(one: Sequence[Any], other: Sequence[Any], *, most: int) -> int:
    """How many items two sequences begin with alike, at most `most`."""
    return next((i for i in range(most) if one[i] != other[i]), max(0, most))


def numbers(cells: "Cells", name: str) -> dict[str, float]:
    """`margin` or `label`: a number, or one for each attribute, as name, or name.0, name.1, ..."""
    value = decoded(cells.raw.values.get(name))  # a CSV's cells are text
    if value is None or value == "":
        return {}
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(_finite(x) for x in listed):
        cells.fail(name, value, "a number, or a list with one number for each attribute")
    if name == "label" and any(x not in (-1, 0, 1) for x in listed):
        cells.fail(name, value, "1 (chosen is better), -1 (rejected is better) or 0 (no preference)")
    if not isinstance(value, list):
        return {name: float(value)}
    return {f"{name}.{k}": float(x) for k, x in enumerate(listed)}


def _finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= sys.float_info.max


def tokens(cells: "Cells", name: str) -> tuple[list[int], list[bool] | None]:
    """Ids of one side as they are, and which are trained where `labels_<side>` says it (-100 is not)."""
    columns = {key: cells.raw.values.get(f"{key}_{name}") for key in ("input_ids", "labels")}
    for key, value in columns.items():
        whole = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
        if (key == "input_ids" or value is not None) and not whole:
            cells.fail(f"{key}_{name}", value, "a list of token ids", empty=value is None)
    ids, labels = columns["input_ids"], columns["labels"]
    assert ids is not None
    if not ids:
        cells.fail(f"input_ids_{name}", ids, "at least one token", empty=True)
    if labels is not None and any(t not in (-100, i) for t, i in zip(labels, ids, strict=False)):
        cells.fail(f"labels_{name}", labels, f"-100 or the token of input_ids_{name} at each place")
    if labels is not None and len(labels) != len(ids):
        cells.fail(f"labels_{name}", labels, f"{len(ids)} values, as many as input_ids_{name}")
    return ids, None if labels is None else [label != -100 for label in labels]


def encode(chat: "Chat", row: Mapping[str, Any]) -> Iterator[Row]:
    """The row of tokens of a canonical pair. Ids are the tokenizer's own for each side's whole render; shared is what
    both truly begin with, up to the first trained token. Raises DataError for a side that has no truthful render."""
    if row.get("found"):
        chat.note("implicit_prompt", row["found"])
    extra = {k: v for k, v in row.items() if k.partition(".")[0] in ("margin", "label")}
    if "ids" in row:
        return iter([joined(given(chat, row["ids"]), extra)])
    settings: dict[str, list[str]] = {name: [] for name in SIDES}
    asked = {name: side_rows(noting(chat, settings[name]), row, name) for name in SIDES}  # both, before either is read
    return one_row(chat, row, asked, settings, extra)


def noting(chat: "Chat", settings: list[str]) -> "Chat":
    """The same, which also tells what template settings a side took that the row does not have."""

    def note(name: str, message: str) -> None:
        chat.note(name, message)
        if name == "template_kwargs":
            settings.append(message)

    return chat.noting(note)


def one_row(
    chat: "Chat",
    row: Mapping[str, Any],
    asked: Mapping[str, Iterator[Row]],
    settings: Mapping[str, list[str]],
    extra: Mapping[str, float],
) -> Iterator[Row]:
    sides = [rendered(name, list(rows)) for name, rows in asked.items()]
    if settings["chosen"] != settings["rejected"]:  # answers to two prompts are no pair
        sides = alike(chat, row)
    yield joined(sides, extra)


def alike(chat: "Chat", row: Mapping[str, Any]) -> list[Side]:
    """Both sides under one setting of thinking, the first under which both have a truthful render."""
    refused: list[DataError] = []
    for thinking in (True, False):
        given = {**row.get("chat_template_kwargs", {}), "enable_thinking": thinking}
        one = {**row, "chat_template_kwargs": given}
        try:
            found = [rendered(name, list(side_rows(chat, one, name))) for name in SIDES]
        except DataError as error:
            refused.append(error)
            continue
        said = f"chosen and rejected think differently: trained with enable_thinking: {json.dumps(thinking)}"
        chat.note("template_kwargs", f"{said}; use it at inference")
        return found
    raise refused[0]


def side_rows(chat: "Chat", row: Mapping[str, Any], name: str) -> Iterator[Row]:
    asked, said = row["prompt"], row[name]
    if isinstance(asked, str):
        return chat.closed(asked + said, len(asked))
    return chat.rows(row, [*asked, *said], loss_on="assistant", first=len(asked))


def rendered(name: str, parts: list[Row]) -> Side:
    if len(parts) > 1:
        raise DataError(
            f"the chat template renders the answers of {name} in {len(parts)} pieces, each with its own history",
            "Keep one answer on each side, and put the turns before it into the prompt.",
        )
    return parts[0].branches[0].ids, parts[0].branches[0].trained


def given(chat: "Chat", ids: Mapping[str, tuple[list[int], list[bool] | None]]) -> list[Side]:
    """Tokenised sides. Without labels the answers begin after the last control token that both begin with."""
    size = max(chat.tokenizer.get_vocab().values()) + 1
    if wrong := [i for side_ids, _ in ids.values() for i in side_ids if not 0 <= i < size]:
        raise DataError(f"there is no token {wrong[0]}: the tokenizer has ids below {size}", "Tokenise the rows anew.")
    (one, _), (other, _) = ids["chosen"], ids["rejected"]
    controls = {*chat.tokenizer.all_special_ids, *chat.tokenizer.added_tokens_decoder}
    shared = common(one, other, most=min(len(one), len(other)) - 1)
    start = max((i + 1 for i in range(shared) if one[i] in controls), default=0)
    if any(trained is None for _, trained in ids.values()):
        chat.note("implicit_prompt", f"no labels; the prompt is the first {start} tokens")
    return [
        (side_ids, [i >= start for i in range(len(side_ids))] if trained is None else trained)
        for side_ids, trained in (ids[name] for name in SIDES)
    ]


def joined(sides: Sequence[Side], extra: Mapping[str, float]) -> Row:
    (one, _), (other, _) = sides
    untrained = [next((i for i, t in enumerate(trained) if t), len(trained) - 1) for _, trained in sides]
    start = common(one, other, most=min(untrained))
    branches = tuple(Branch(ids[start:], mask[start:], name) for name, (ids, mask) in zip(SIDES, sides, strict=True))
    return Row(one[:start], branches, extra=extra)
