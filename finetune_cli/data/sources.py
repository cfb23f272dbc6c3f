"""Rows of a data source: read from where they are, their shape found from the columns, written in one canonical form.

The shapes: messages {messages, tools?, chat_template_kwargs?}, completion {prompt, completion} (two strings or two
lists of messages), text {text}, pairs (prompt?, chosen, rejected) and prompt. Every error names the file and the row.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from finetune_cli.errors import DataError, Problem
from finetune_cli.recipe.sections import Source

MANY = 20
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "observation": "tool", "function_call": "function_call",
}  # fmt: skip
"""Names of roles in files -> ours; `function_call` is an assistant's message that calls tools."""


class EmptyValue(DataError):
    """A value that has to say something is empty or null."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A row as it is in the file, its columns under our names. `source` counts over all sources of a set, from 0."""

    values: Mapping[str, Any]
    source: int
    file: str
    row: int
    line: int = 0

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}" if self.line else f"{self.file} row {self.row}"

    def problem(self, message: str, *, rule: str, field: str = "") -> Problem:
        key = field if self.line else " ".join(filter(None, (f"row {self.row}", field)))
        return Problem(key, message, file=self.file, line=self.line, column=int(self.line > 0), rule=rule)


@dataclass(frozen=True)
class Shape:
    """Columns that make a shape, columns that it also reads, and how a row of them becomes canonical."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[["Cells"], dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """The rows of one source, not yet looked at one by one. `unused`: columns that nothing reads."""

    file: str
    shape: Shape
    raws: list[Raw]
    unused: tuple[str, ...]
    roles: Mapping[str, str]
    weight: float = 1.0

    def canonical(self, raw: Raw) -> dict[str, Any]:
        """The row in its canonical form. Raises DataError for what is malformed, EmptyValue for what is empty."""
        return self.shape.build(Cells(raw, self.roles))


@dataclass(frozen=True)
class Cells:
    """The columns of one row, each read with its type checked."""

    raw: Raw
    roles: Mapping[str, str]

    def fail(self, field: str, value: Any, wanted: str, *, empty: bool = False, hint: str = "") -> NoReturn:
        said = f"is {described(value)}, expected {wanted}"
        problem = self.raw.problem(said, rule="empty" if empty else "malformed", field=field)
        raise (EmptyValue if empty else DataError)(f"{self.raw.place}: {field} {said}", hint, problems=(problem,))

    def get(self, field: str) -> Any:
        if field not in self.raw.values:
            self.missing(field)
        return self.raw.values[field]

    def missing(self, field: str) -> NoReturn:
        said = f"the row has no {field}, as other rows have; it has {', '.join(self.raw.values) or 'no columns'}"
        problem = self.raw.problem(said, rule="malformed")
        raise DataError(f"{self.raw.place}: {said}", "Keep rows of one shape in a file.", problems=(problem,))

    def text(self, field: str, *, blank: bool = False) -> str:
        value = self.get(field)
        if value is None or value == "":
            return "" if blank else self.fail(field, value, "text", empty=True)
        return value if isinstance(value, str) else self.fail(field, value, "text")

    def optional(self, field: str) -> str:
        return self.text(field, blank=True) if field in self.raw.values else ""

    def object_or_json(self, field: str, kind: type, wanted: str) -> Any:
        """An optional column that may also be JSON text; None where it says nothing."""
        value = self.raw.values.get(field)
        try:
            value = json.loads(value) if isinstance(value, str) and value.strip() else value
        except ValueError:
            self.fail(field, value, f"{wanted}, or JSON text of one")
        return (value if isinstance(value, kind) else self.fail(field, value, wanted)) if value else None

    def extras(self) -> dict[str, Any]:
        tools = self.object_or_json("tools", list, "a list of tools")
        kwargs = self.object_or_json("chat_template_kwargs", dict, "an object")
        for i, tool in enumerate(tools or ()):
            if not isinstance(tool, dict):
                self.fail(f"tools[{i}]", tool, "an object with name, description and parameters")
        bare = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()]
        return ({"tools": bare} if bare else {}) | ({"chat_template_kwargs": kwargs} if kwargs else {})

    def messages(self, field: str) -> list[dict[str, Any]]:
        value = self.get(field)
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list):
            self.fail(field, value, "a list of messages", empty=value is None)
        if not value:
            self.fail(field, value, "at least one message", empty=True)
        return [self.message(f"{field}[{i}]", message) for i, message in enumerate(value)]

    def conversation(self, field: str) -> dict[str, Any]:
        messages = self.messages(field)
        if system := self.optional("system"):
            if messages[0]["role"] == "system":
                self.fail("system", system, f"nothing, because {field} begins with a system message")
            messages = [{"role": "system", "content": system}, *messages]
        return {"messages": messages, **self.extras()}

    def message(self, field: str, value: Any) -> dict[str, Any]:
        named = ("role", "content") if isinstance(value, dict) and "role" in value else ("from", "value")
        if not isinstance(value, dict) or named[0] not in value:
            self.fail(field, value, "an object with role and content (or from and value)")
        role = self.role(f"{field}.{named[0]}", value[named[0]])
        said = {k: v for k, v in value.items() if k not in named and v is not None}
        if role == "function_call":
            calls = self.calls(f"{field}.{named[1]}", decoded(value.get(named[1])))
            return {"role": "assistant", "content": "", **said, "tool_calls": calls}
        if "tool_calls" in said:
            said["tool_calls"] = self.calls(f"{field}.tool_calls", said["tool_calls"])
        if not isinstance(said.get("trainable", True), bool) or ("trainable" in said and role != "assistant"):
            self.fail(f"{field}.trainable", said["trainable"], "true or false, on an assistant's message")
        if named[1] not in value and "tool_calls" not in said:
            self.fail(field, value, f"an object with {' and '.join(named)}")
        content = self.content(f"{field}.{named[1]}", value.get(named[1]), role, said)
        return {"role": role, "content": content, **said}

    def role(self, field: str, name: Any) -> str:
        if not isinstance(name, str) or name not in self.roles:
            hint = f"Map it with `roles: {{assistant: [{name}]}}` under the source." if isinstance(name, str) else ""
            self.fail(field, name, f"one of {', '.join(self.roles)}", hint=hint)
        return self.roles[name]

    def content(self, field: str, value: Any, role: str, said: Mapping[str, Any]) -> Any:
        if isinstance(value, list):
            for i, part in enumerate(value):
                if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                    self.fail(f"{field}[{i}]", part, "a part {type: text, text: ...}; images and sound are not read")
        elif value is not None and not isinstance(value, str):
            self.fail(field, value, "text")
        text = value if isinstance(value, str) else "".join(part["text"] for part in value or ())
        acts = role == "assistant" and any(said.get(key) for key in ("tool_calls", "reasoning_content", "thinking"))
        if not text.strip() and not acts and (value is None or role in ("user", "assistant")):
            self.fail(field, value, "text", empty=True)
        return "" if value is None else value

    def calls(self, field: str, value: Any) -> list[dict[str, Any]]:
        calls = [value] if isinstance(value, dict) else value
        wanted = "tool calls with a name and arguments (an object, or its JSON text)"
        if not isinstance(calls, list) or not calls:
            self.fail(field, value, wanted)
        return [self.call(f"{field}[{i}]", call, wanted) for i, call in enumerate(calls)]

    def call(self, field: str, call: Any, wanted: str) -> dict[str, Any]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            self.fail(field, call, wanted)
        arguments = decoded(function.get("arguments") or {})
        if not isinstance(arguments, dict):
            self.fail(f"{field}.arguments", arguments, wanted)
        outer = {k: v for k, v in call.items() if k != "function" and v is not None} if "function" in call else {}
        return {"type": "function", **outer, "function": {**function, "arguments": arguments}}

    def instruction(self) -> dict[str, Any]:
        """Alpaca's columns: the user says instruction and input, the assistant output."""
        turns = [("system", self.optional("system"))]
        for i, pair in enumerate(self.raw.values.get("history") or ()):
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
                self.fail(f"history[{i}]", pair, "a pair [question, answer]")
            turns += [("user", pair[0]), ("assistant", pair[1])]
        asked = "\n\n".join(filter(None, (self.text("instruction"), self.optional("input"))))
        turns += [("user", asked), ("assistant", self.text("output"))]
        return {"messages": [{"role": r, "content": t} for r, t in turns if r != "system" or t], **self.extras()}

    def completion(self) -> dict[str, Any]:
        prompt, answer = self.get("prompt"), self.get("completion")
        if not isinstance(prompt, list | dict) and not isinstance(answer, list | dict):
            return {"prompt": self.text("prompt"), "completion": self.text("completion")}
        if not (isinstance(prompt, list | dict) and isinstance(answer, list | dict)):
            self.fail("completion", answer, f"the kind of prompt, which is {described(prompt)}")
        return {"prompt": self.messages("prompt"), "completion": self.messages("completion"), **self.extras()}

    def plain(self) -> dict[str, Any]:
        """All columns as they are; for shapes that no method here takes yet."""
        return {**self.raw.values}


CHAT = ("system", "tools", "chat_template_kwargs")
SHAPES = (
    Shape("pairs", ("chosen", "rejected"), ("prompt", "messages", "conversations", "margin", *CHAT), Cells.plain),
    Shape("messages", ("messages",), CHAT, lambda c: c.conversation("messages")),
    Shape("messages", ("conversations",), CHAT, lambda c: c.conversation("conversations")),
    Shape("completion", ("prompt", "completion"), CHAT[1:], Cells.completion),
    Shape("messages", ("instruction", "output"), ("input", "history", *CHAT), Cells.instruction),
    Shape("text", ("text",), (), lambda c: {"text": c.text("text")}),
    Shape("prompt", ("prompt",), CHAT[1:], Cells.plain),
    Shape("prompt", ("query",), CHAT[1:], Cells.plain),
)  # fmt: skip
"""The first whose required columns are all there is the shape of a file."""


def shape_of(columns: Collection[str], accepts: Collection[str] = ()) -> str | None:
    """The name of the shape that these columns make; with `accepts`, among these shapes only."""
    found = find_shape(columns, accepts)
    return found.name if found else None


def find_shape(columns: Collection[str], accepts: Collection[str] = ()) -> Shape | None:
    fits = (shape for shape in SHAPES if set(shape.required) <= set(columns))
    return next((shape for shape in fits if not accepts or shape.name in accepts), None)


def load(source: Source, *, accepts: Collection[str] = (), first: int = 0) -> Table:
    """All rows of a source, not yet in canonical form. `accepts`: shapes the method takes; `first`: number of row 0."""
    file, records = shown(source.path), read(source)
    if not records:
        raise DataError(f"{file} has no rows")
    columns = dict.fromkeys(name for _, values in records for name in values)
    names = renamed(source, columns, file=file)
    shape = find_shape([names.get(column, column) for column in records[0][1]], accepts)
    shape = shape or find_shape([names.get(column, column) for column in columns], accepts)
    if shape is None:
        raise no_shape(file, columns, accepts)
    raws = [
        Raw({names.get(k, k): v for k, v in values.items()} if names else values, first + row, file, row, line)
        for row, (line, values) in enumerate(records)
    ]
    used = {*shape.required, *shape.optional}
    unused = tuple(column for column in columns if names.get(column, column) not in used)
    mapped = {name: role for role, given in (source.roles or {}).items() for name in given}
    if wrong := {*mapped.values()} - {*ROLES.values()}:
        raise DataError(f"roles: there is no role {sorted(wrong)[0]!r}", f"The roles: {', '.join({*ROLES.values()})}")
    return Table(file, shape, raws, unused, {**ROLES, **mapped}, source.weight)


def renamed(source: Source, columns: Collection[str], *, file: str) -> dict[str, str]:
    """The file's column name -> ours."""
    ours = sorted({name for shape in SHAPES for name in (*shape.required, *shape.optional)})
    for name, theirs in (source.columns or {}).items():
        if name not in ours:
            near = get_close_matches(name, ours, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            raise DataError(f"columns: {name} is not a column we read", f"{meant}Ours: {', '.join(ours)}")
        if theirs not in columns:
            raise DataError(f"{file}: columns.{name}: there is no column {theirs!r}", f"It has: {', '.join(columns)}")
    taken = {theirs: name for name, theirs in (source.columns or {}).items()}
    # a column of the file that already has a name given to another one steps aside
    return taken | {name: f"{name} (unmapped)" for name in {*taken.values()} & ({*columns} - {*taken})}


def no_shape(file: str, columns: Collection[str], accepts: Collection[str]) -> DataError:
    other = find_shape(columns)
    why = f"are {other.name}, which the method does not take" if other else "make no shape of rows that we know"
    wanted = dict.fromkeys(" + ".join(s.required) for s in SHAPES if not accepts or s.name in accepts)
    hint = f"Wanted: {', or '.join(wanted)}. Map names with `data.train[0].columns: {{messages: NAME_IN_THE_FILE}}`."
    return DataError(f"{file}: the columns {', '.join(columns)} {why}", hint)


def read(source: Source) -> list[tuple[int, dict[str, Any]]]:
    """(line in the file, or 0; columns) of every row."""
    path = Path(source.path).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        return [(0, values) for values in from_datasets(source, path)]
    if source.split or source.name:
        raise DataError(f"{shown(source.path)}: `split` and `name` are for hub data sets and saved folders")
    try:
        return list(reader(path, shown(source.path)))
    except FileNotFoundError as error:
        raise DataError(f"there is no file {shown(source.path)}", f"Looked for {path.absolute()}.") from error
    except OSError as error:
        raise DataError(f"{shown(source.path)} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(source.path)} is not UTF-8: {error}", "Save it as UTF-8.") from error


def read_json(path: Path, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        lines = "It looks like one object a line: name it .jsonl." if error.msg == "Extra data" else "Mend the file."
        raise DataError(f"{file}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})", lines) from error
    if not isinstance(rows, list):
        hint = "Write [row, row, ...], or one row a line in a .jsonl file."
        raise DataError(f"{file} is {described(rows)}, expected a list of rows", hint)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{file} row {number} is {described(row)}, expected an object")
        yield 0, row


def read_jsonl(path: Path, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    problems: list[Problem] = []
    with path.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                said = f"not valid JSON ({error.msg} at column {error.colno})"
                problems.append(Problem("", said, file=file, line=number, column=error.colno, rule="malformed"))
                continue
            if not isinstance(row, dict):
                said = f"is {described(row)}, expected an object"
                problems.append(Problem("", said, file=file, line=number, column=1, rule="malformed"))
                continue
            yield number, row
    if problems:
        raise together([f"{file}:{p.line}: {p.message}" for p in problems], problems, "One JSON object a line.")


def read_csv(path: Path, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        hint = 'Quote cells that hold a comma or a line break: "a, b".'
        try:
            for row in reader:
                if None in row or None in row.values():
                    few, cells = "fewer" if None in row.values() else "more", len(reader.fieldnames or ())
                    raise DataError(f"{file}:{reader.line_num}: {few} cells than the header's {cells}", hint)
                yield reader.line_num, row
        except csv.Error as error:
            raise DataError(f"{file}:{reader.line_num}: not valid CSV ({error})", hint) from error


def read_parquet(path: Path, file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{file} is not a parquet file: {error}") from error
    yield from ((0, without_nulls(row)) for row in rows)


READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def from_datasets(source: Source, path: Path) -> list[dict[str, Any]]:
    return [without_nulls(row) for row in open_dataset(source, path)]


def open_dataset(source: Source, path: Path) -> Any:
    """A folder of `save_to_disk`, or a data set of the hub."""
    import datasets

    try:
        if not path.is_dir():
            return datasets.load_dataset(source.path, source.name, split=source.split or "train")
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises whatever the hub, the network or a loader raises
        hint = (
            f"A file ends in {', '.join(READERS)}; a folder is one of save_to_disk; else it is a hub id (owner/name)."
        )
        raise DataError(f"{source.path} cannot be loaded: {type(error).__name__}: {error}", hint) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if (split := source.split or "train") not in found:
        raise DataError(f"{source.path} has no split {split!r}", f"It has: {', '.join(found)}. Set `split:`.")
    return found[split]


def fingerprint(source: Source) -> str:
    """Changes when the rows of the source do: sha256 of its bytes; for the hub, the library's own fingerprint."""
    path = Path(source.path).expanduser()
    files = sorted(inner for inner in path.rglob("*") if inner.is_file()) if path.is_dir() else [path]
    if not path.exists() and path.suffix.lower() not in READERS:
        return f"hub {open_dataset(source, path)._fingerprint}"
    total = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                total.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    except OSError as error:
        raise DataError(f"{shown(source.path)} cannot be read: {error.strerror or error}") from error
    return total.hexdigest()


def together(lines: list[str], problems: list[Problem], hint: str) -> DataError:
    """One error for all problems of a stage; the first few are told."""
    more = [f"... and {len(lines) - MANY} more"] if len(lines) > MANY else []
    return DataError("\n".join(lines[:MANY] + more), hint, problems=tuple(problems))


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives every object the keys of all others, null where it had none: below the columns they go again."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(inner) for inner in value]
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        return value

    return {name: clean(value) for name, value in row.items()}


def decoded(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {value[:40] + '...' if len(value) > 40 else value!r}" if value.strip() else "empty text"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return json.dumps(value) if isinstance(value, bool | int | float) else f"a {type(value).__name__}"


def shown(path: str) -> str:
    """A path as people would write it from here."""
    here = os.path.relpath(path) if os.path.isabs(path) else path
    return path if here.startswith("..") else here
