"""What a checkpoint holds: the weights as other tools load them, and the state of the training beside them."""

import hashlib
import json
import random
import shutil
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from finetune_cli.engine import manifest
from finetune_cli.types import Row


def save_model(model: Any, tokenizer: Any, folder: Path, weights: Mapping[str, Any] | None = None) -> None:
    """Weights and tokenizer as transformers and peft write them, so that plain `from_pretrained` loads them. `weights`
    are the model's, where it has them in pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    use_cache = model.config.use_cache
    model.config.use_cache = True
    try:
        # beside the policy's adapter there may be a critic's, which belongs to the training
        some = adapter_alone(model) if hasattr(model, "peft_config") else {}
        model.save_pretrained(folder, **some, **({"state_dict": weights} if weights is not None else {}))
    finally:
        model.config.use_cache = use_cache
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; the run writes its own


def adapter_alone(model: Any) -> dict[str, Any]:
    """Arguments of peft's `save_pretrained`. Where rows of new tokens are trained they are saved with the adapter; the
    whole embedding, which peft would add because it has grown, is not."""
    rows = model.peft_config["default"].trainable_token_indices
    return {"selected_adapters": ["default"], **({"save_embedding_layers": False} if rows else {})}


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


def beside(folder: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return folder.with_name(folder.name + manifest.WRITING)


def begin(folder: Path) -> None:
    """An empty place for a checkpoint; what a process that was killed left of it goes."""
    shutil.rmtree(beside(folder), ignore_errors=True)
    beside(folder).mkdir(parents=True)


def write(
    folder: Path,
    *,
    model: Any,
    tokenizer: Any,
    training: dict[str, Any],
    state: dict[str, Any],
    weights: Mapping[str, Any] | None = None,
    about: dict[str, Any] | None = None,
    announce: Callable[[], None] = lambda: None,
) -> None:
    """One whole checkpoint at `folder`, once it has begun. `training` is tensors (optimizer, schedule, rng), `state` is
    JSON, `about` goes into the manifest. `announce` is called when all of it is on the disk, before it gets its name.
    """
    new = beside(folder)
    try:
        save_model(model, tokenizer, new, weights)
        for name, value in training.items():
            save_state(value, new / f"{name}.pt")
        (new / "trainer_state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest.seal(new, {"step": state["global_step"], **(about or {})})
        announce()
        manifest.place(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # room for those that are whole
        raise


def save_state(value: Any, path: Path) -> None:
    """torch.save, except that a disk without room is the OSError that it is: PyTorch's own writer calls it a failure
    of its position."""
    with path.open("wb") as file:
        careful: Any = _Careful(file)
        try:
            torch.save(value, careful)
        except RuntimeError:
            if careful.failed is not None:
                raise careful.failed from None
            raise


class _Careful:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failed is not None:
            return len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        if self.failed is None:
            self.file.flush()


def load_training(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The parts of the training state that the checkpoint has, by name."""
    there = [name for name in names if (folder / f"{name}.pt").exists()]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu") for name in there}


def load_pieces(folder: Path) -> list[dict[str, Any]]:
    """What each process wrote of the optimiser's state, in order of rank; none where it is whole. Mapped: what is not
    asked for is not read."""
    count = len(list(folder.glob("optimizer_*.pt")))
    paths = [folder / f"optimizer_{rank}.pt" for rank in range(count)]
    return [torch.load(path, weights_only=True, map_location="cpu", mmap=True) for path in paths]


def state(folder: Path) -> dict[str, Any]:
    """The JSON state that was written with a checkpoint."""
    value: dict[str, Any] = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return value


def rows_sha256(rows: Sequence[Row]) -> str:
    """Of everything that is trained on, in its order: the same for the same rows under another path."""
    total = hashlib.sha256()
    for row in rows:
        total.update(array("q", [len(row.prefix), len(row.branches), *row.prefix]).tobytes())
        total.update(repr(sorted(row.extra.items())).encode())
        for branch in row.branches:
            total.update(array("q", [len(branch.ids), *branch.ids, *branch.trained]).tobytes())
    return total.hexdigest()
