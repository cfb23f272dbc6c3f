"""Tokenised rows on disk, under a name that is a hash of everything they depend on: tokenise once, by one process.

Entries are `<cache>/rows/<sha256>.safetensors`: flat ids, mask and offsets, with the report as JSON in the header.
"""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import finetune_cli
from finetune_cli.data.builtin import cache_root
from finetune_cli.data.chat import Chat
from finetune_cli.data.encode import Encoded, encode_set
from finetune_cli.data.readers import fingerprint
from finetune_cli.methods import Method
from finetune_cli.recipe.sections import Data, Source
from finetune_cli.types import Branch, Row

Arrays = dict[str, NDArray[Any]]
LOG = logging.getLogger("finetune_cli")
SETTINGS = ("max_length", "overlength", "max_dropped_fraction", "template_mismatch")
"""Keys of `data:` that decide what `encode_set` returns, or whether it raises."""


def encoded(method: Method, sources: Sequence[Source], chat: Chat, data: Data, *, seed: int) -> Encoded:
    """`encode_set`, from the cache where it has been computed before. Other processes that want it wait for one."""
    name = key_of(method, sources, chat, data, seed=seed)
    return cached(
        cache_root() / "rows" / f"{name}.safetensors", lambda: encode_set(method, sources, chat, data, seed=seed)
    )


def cached(path: Path, build: Callable[[], Encoded]) -> Encoded:
    """What `path` holds, or `build()`, which is then written there. A folder that cannot be written is no error; what
    is in it already is read all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(f"{path}.lock").acquire()
    except OSError as error:
        found = load(path)
        if found is None:
            LOG.warning("the row cache %s cannot be written (%s): the rows are tokenised anew", path.parent, error)
        return found or build()
    with held:
        found = load(path)
        if found is None:
            found = build()
            save(found, path)
        return found


def key_of(method: Method, sources: Sequence[Source], chat: Chat, data: Data, *, seed: int) -> str:
    """sha256 of all that ids, masks and order depend on."""
    parts = {
        "sources": [[source.model_dump(mode="json"), fingerprint(source)] for source in sources],
        "tokenizer": sha256(tokenizer_text(chat.tokenizer)),
        "template": [chat.template, chat.stops, chat.mismatch],
        "date": date.today().isoformat() if "strftime_now" in str(chat.template) else None,
        "method": [type(method).__module__, method.name, method.encoding()],
        "data": {key: getattr(data, key) for key in SETTINGS},
        "seed": seed,
        "code": code(type(method)),
        "versions": [version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    return sha256(json.dumps(parts, sort_keys=True))


def tokenizer_text(tokenizer: Any) -> str:
    own = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return f"{type(tokenizer).__name__} {own} {json.dumps(tokenizer.special_tokens_map, default=str)}"


def code(method: type[Method]) -> str:
    """sha256 of the source that makes the rows: ours, and the file of a method that another package brings."""
    root = Path(finetune_cli.__file__).parent
    files = {root / "types.py", Path(inspect.getfile(method))}
    files |= {file for folder in ("data", "methods") for file in (root / folder).rglob("*.py")}
    return sha256("".join(file.read_text(encoding="utf-8") for file in sorted(files)))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def save(found: Encoded, path: Path) -> None:
    """Write an entry whole or not at all."""
    arrays, names, extras = flat(found.rows)
    about = {"report": found.report, "names": names, "extras": extras, "sha256": digest(arrays)}
    temporary: Path | None = None
    try:
        with NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as file:
            temporary = Path(file.name)
        save_file(arrays, temporary, metadata={"about": json.dumps(about)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # the second where the disk is full
        LOG.warning("the row cache %s cannot be written (%s)", path, error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def load(path: Path) -> Encoded | None:
    """The entry; None where there is none, or, with a line in the log, where it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})["about"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        if digest(arrays) != about["sha256"]:
            raise ValueError("its contents are not those that were written")
        return Encoded(rows_of(arrays, about["names"], about["extras"]), about["report"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        LOG.warning("the cached rows %s are damaged (%s): they are tokenised anew", path, error)
        return None


def digest(arrays: Arrays) -> str:
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def flat(rows: Sequence[Row]) -> tuple[Arrays, list[str], list[str]]:
    """Rows as arrays; a row's segments are its prefix and then its branches. Also the names of branches and extras."""
    segments = [ids for row in rows for ids in (row.prefix, *(branch.ids for branch in row.branches))]
    masks = [mask for row in rows for mask in ([False] * len(row.prefix), *(b.trained for b in row.branches))]
    names = sorted({branch.name for row in rows for branch in row.branches})
    extras = sorted({name for row in rows for name in row.extra})
    numbers = [[row.source, row.part, row.truncated, row.prefix_trained, len(row.branches)] for row in rows]
    arrays = {
        "ids": np.array([i for ids in segments for i in ids], dtype=np.int32),
        "trained": np.array([t for mask in masks for t in mask], dtype=np.bool_),
        "offsets": np.array([0, *accumulate(map(len, segments))], dtype=np.int64),
        "rows": np.array(numbers, dtype=np.int64).reshape(-1, 5),
        "branches": np.array([names.index(b.name) for row in rows for b in row.branches], dtype=np.int32),
        "extra": np.array([[row.extra.get(name, np.nan) for name in extras] for row in rows], dtype=np.float64),
    }
    return arrays, names, extras


def rows_of(arrays: Arrays, names: list[str], extras: list[str]) -> list[Row]:
    ids, trained = arrays["ids"].tolist(), arrays["trained"].tolist()
    segments = iter([(ids[a:b], trained[a:b]) for a, b in pairwise(arrays["offsets"].tolist())])
    branch_names = iter(arrays["branches"].tolist())
    rows = []
    extra_of = arrays["extra"].tolist()
    for (source, part, cut, all_of_it, count), values in zip(arrays["rows"].tolist(), extra_of, strict=True):
        prefix, _ = next(segments)
        branches = tuple(Branch(*next(segments), name=names[next(branch_names)]) for _ in range(count))
        extra = {name: value for name, value in zip(extras, values, strict=True) if value == value}
        rows.append(Row(prefix, branches, source, part, bool(cut), extra, bool(all_of_it)))
    return rows
