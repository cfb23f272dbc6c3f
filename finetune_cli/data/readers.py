"""Rows as they are in a file: json, jsonl, csv, parquet, a folder of `save_to_disk` or the hub, each with its line."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_cli.errors import DataError, Problem
from finetune_cli.recipe.sections import Source

MANY = 20
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
DECODER = json.JSONDecoder()
SOMETHING = re.compile(r"[^ \t\r\n]")


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file as it is there. `line` counts from 1, 0 where the file has no lines; `wrong` says why `values`
    is empty."""

    line: int
    values: dict[str, Any]
    wrong: Problem | None = None


def read(source: Source) -> list[Record]:
    """Every row, those that cannot be read too. Raises DataError where there are no rows to speak of."""
    path = Path(source.path).expanduser()
    reader = READERS.get(path.suffix.lower())
    if reader is None or path.is_dir():
        return [Record(0, without_nulls(row)) for row in open_dataset(source, path)]
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


def bad(file: str, line: int, message: str, *, column: int = 1) -> Record:
    """A row that cannot be read."""
    return Record(line, {}, Problem("", message, file=file, line=line, column=column, rule="malformed"))


def checked(file: str, line: int, row: Any, text: str) -> Record:
    """A row of JSON, if it is an object and all of its text can be written again."""
    if not isinstance(row, dict):
        return bad(file, line, f"is {described(row)}, expected an object")
    if SURROGATE.search(text):
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return bad(file, line, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return Record(line, row)


def read_json(path: Path, file: str) -> Iterator[Record]:
    """The rows of one JSON list, each under the number of its first line. What follows a mistake cannot be told apart:
    it is the last row."""
    text = path.read_text(encoding="utf-8-sig")
    at = blank(text, 0)
    if text[at : at + 1] != "[":
        raise no_list(text, file)
    line, counted, at = 1, 0, blank(text, at + 1)
    if text[at:].strip() == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = DECODER.raw_decode(text, at)
            yield checked(file, line, row, text[at:end])
            at = blank(text, end)
            if text[at : at + 1] == "]" and not text[at + 1 :].strip():
                return
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or the end of the list", text, at)
        except json.JSONDecodeError as error:
            yield bad(file, error.lineno, f"not valid JSON ({error.msg} at column {error.colno})", column=error.colno)
            return
        except (ValueError, RecursionError) as error:
            yield bad(file, line, f"not readable JSON ({error})")
            return
        at = blank(text, at + 1)


def blank(text: str, at: int) -> int:
    """The first place from `at` on that is no white space."""
    found = SOMETHING.search(text, at)
    return found.start() if found else len(text)


def no_list(text: str, file: str) -> DataError:
    try:
        found = f"{file} is {described(json.loads(text))}, expected a list of rows"
    except json.JSONDecodeError as error:
        found = f"{file}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})"
        if error.msg == "Extra data":
            return DataError(found, "It looks like one object a line: name it .jsonl.")
    return DataError(found, "Write [row, row, ...], or one row a line in a .jsonl file.")


def read_jsonl(path: Path, file: str) -> Iterator[Record]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not raw.strip():
                continue
            try:
                text = raw.decode().rstrip()
                row = json.loads(text)
            except UnicodeDecodeError as error:
                yield bad(file, number, f"not UTF-8 ({error.reason} at byte {error.start + 1} of the line)")
            except json.JSONDecodeError as error:
                said = f"not valid JSON ({error.msg} at column {error.colno})"
                yield bad(file, number, said, column=error.colno)
            except (ValueError, RecursionError) as error:
                yield bad(file, number, f"not readable JSON ({error})")
            else:
                yield checked(file, number, row, text)


def read_csv(path: Path, file: str) -> Iterator[Record]:
    """Each row under the number of its first line."""
    csv.field_size_limit(2**31 - 1)
    quote = 'quote cells that hold a comma or a line break: "a, b"'
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        header: list[str] = []
        line = 1
        try:
            for cells in reader:
                if cells and not header:
                    header = cells
                    if twice := [name for name in header if header.count(name) > 1]:
                        raise DataError(f"{file}:{line}: two columns are named {twice[0]!r}", "Rename one of them.")
                elif cells and len(cells) != len(header):
                    few = "fewer" if len(cells) < len(header) else "more"
                    yield bad(file, line, f"{few} cells than the header's {len(header)}; {quote}")
                elif cells:
                    yield Record(line, dict(zip(header, cells, strict=True)))
                line = reader.line_num + 1
        except csv.Error as error:
            yield bad(file, line, f"not valid CSV ({error}); {quote}")


def read_parquet(path: Path, file: str) -> Iterator[Record]:
    from pyarrow import ArrowInvalid, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise DataError(f"{file} is not a parquet file: {error}") from error
    yield from (Record(0, without_nulls(row)) for row in rows)


READERS: dict[str, Callable[[Path, str], Iterator[Record]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


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
