"""Rows as they are in a file: json, jsonl, csv, parquet, a folder of `save_to_disk` or the hub, each with its line."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune_cli.errors import DataError, Problem
from finetune_cli.recipe.sections import Source

MANY = 20


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
