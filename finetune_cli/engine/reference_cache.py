"""The reference's log-probabilities on disk, under a name that is a hash of everything they depend on.

Entries are `<cache>/reference/<key>.npz`, the key being of the weights, the model's configuration, the number format
and what the method says; in them each row is under the hash of its ids.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch

from finetune_cli.data.builtin import cache_root
from finetune_cli.log import LOGGER
from finetune_cli.types import Row

Key = bytes
Values = dict[Key, tuple[float, ...]]


def weights_key(model: Any, *, adapter: bool, settings: dict[str, Any]) -> str:
    """sha256 of the weights (without what is trained where the adapter is off), the model's configuration, and
    `settings`."""
    skipped = {name for name, p in model.named_parameters() if p.requires_grad} if not adapter else set()
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    total.update(json.dumps(configuration(model, adapter=adapter), sort_keys=True, default=str).encode())
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        if name not in skipped:
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def configuration(model: Any, *, adapter: bool) -> dict[str, Any]:
    """What of the configurations changes numbers: neither paths nor versions."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    mine = {k: v for k, v in base.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    adapters = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()} if adapter else {}
    kept = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "peft_type")
    return {"model": mine, "adapter": {n: {k: c.get(k) for k in kept} for n, c in adapters.items()}}


def row_key(row: Row) -> Key:
    """Of a row's ids and of which are trained."""
    total = hashlib.sha256(np.array([len(row.prefix), *row.prefix], np.int64).tobytes())
    for branch in row.branches:
        total.update(np.array([len(branch.ids), *branch.ids], np.int64).tobytes())
        total.update(np.array(branch.trained, np.bool_).tobytes())
    return total.digest()


@dataclass
class Store:
    """Values of rows on disk: `<cache>/reference/<key>.npz`. A folder that cannot be written is no error."""

    path: Path
    values: Values = field(default_factory=dict)

    @classmethod
    def open(cls, key: str) -> "Store":
        store = cls(cache_root() / "reference" / f"{key}.npz")
        store.values = store._read()
        return store

    def _read(self) -> Values:
        if not self.path.exists():
            return {}
        try:
            with np.load(self.path, allow_pickle=False) as held:
                keys, numbers = held["keys"], held["values"]
                if hashlib.sha256(keys.tobytes() + numbers.tobytes()).digest() != held["sha256"].tobytes():
                    raise ValueError("its contents are not those that were written")
        except Exception as error:  # noqa: BLE001  a damaged archive raises whatever zipfile and numpy raise
            LOGGER.warning("the reference log-probabilities %s are damaged (%s): computed anew", self.path, error)
            return {}
        return {k.tobytes(): tuple(v) for k, v in zip(keys, numbers.tolist(), strict=True)}

    def add(self, found: Values) -> None:
        """Written whole or not at all; what another run has written meanwhile is kept."""
        self.values = {**self._read(), **self.values, **found}
        keys = np.frombuffer(b"".join(self.values), np.uint8).reshape(-1, 32)
        numbers = np.array(list(self.values.values()), np.float32)
        digest = np.frombuffer(hashlib.sha256(keys.tobytes() + numbers.tobytes()).digest(), np.uint8)
        temporary = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=self.path.parent, prefix=".writing-", delete=False) as file:
                temporary = file.name
                np.savez(file, keys=keys, values=numbers, sha256=digest)
            os.replace(temporary, self.path)
        except OSError as error:
            LOGGER.warning("the reference log-probabilities %s cannot be written (%s)", self.path, error)
            Path(temporary).unlink(missing_ok=True)
