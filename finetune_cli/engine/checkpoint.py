"""Checkpoints: written beside and renamed; a manifest makes one whole."""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_cli.errors import TrainError

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights and tokenizer as transformers and peft write them, so that plain `from_pretrained` loads them."""
    folder.mkdir(parents=True, exist_ok=True)
    use_cache = model.config.use_cache
    model.config.use_cache = True
    model.save_pretrained(folder)
    model.config.use_cache = use_cache
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; the run writes its own


def rng_state() -> dict[str, Any]:
    """The state of every generator of this process."""
    _, keys, *rest = np.random.get_state()
    numpy = {"numpy": np.asarray(keys).tolist(), "numpy_rest": rest}
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), **numpy}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(("MT19937", np.array(state["numpy"], dtype=np.uint32), *state["numpy_rest"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write(folder: Path, *, model: Any, tokenizer: Any, training: dict[str, Any], state: dict[str, Any]) -> None:
    """One whole checkpoint at `folder`. `training` is tensors (optimizer, schedule, rng), `state` is JSON."""
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    save_model(model, tokenizer, beside)
    for name, value in training.items():
        torch.save(value, beside / f"{name}.pt")
    (beside / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    files = {p.name: _sha256(p) for p in sorted(beside.iterdir())}
    (beside / MANIFEST).write_text(json.dumps({"step": state["global_step"], "files": files}, indent=1))
    for path in beside.iterdir():
        _flush(path)
    if folder.exists():
        shutil.rmtree(folder)
    beside.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def found(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; folders still being written are not among them."""
    named = [p for p in run.glob(PREFIX + "*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(named, key=step_of)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is the one that was written."""
    manifest = folder / MANIFEST
    if not manifest.exists():
        return "it has no manifest"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return "its manifest cannot be read"
    for name, digest in files.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if _sha256(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def load_training(folder: Path, names: list[str]) -> dict[str, Any]:
    """Raises TrainError where a part is missing (another number of processes, say)."""
    missing = [name for name in names if not (folder / f"{name}.pt").exists()]
    if missing:
        raise TrainError(
            f"{folder.name} has no {', '.join(missing)}", "Resume with the number of processes it was written with."
        )
    return {name: torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu") for name in names}


def state(folder: Path) -> dict[str, Any]:
    """The JSON state that was written with a checkpoint."""
    value: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return value


def prune(run: Path, *, keep: int | None, best: int | None) -> None:
    """Remove the oldest beyond `keep`; the best and the last always stay."""
    every = found(run)
    spare = [p for p in every[:-1] if step_of(p) != best]
    for folder in spare[: max(0, len(every) - keep)] if keep is not None else []:
        shutil.rmtree(folder)
