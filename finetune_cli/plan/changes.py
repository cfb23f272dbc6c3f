"""A recipe that changed since the checkpoint: key by key, what it means to go on.

A key is harmless (it has no part in the training), the same to rounding (the sums of a step are taken in another
order), the length of the run, or part of the training. Where rows come from is not compared by key: the rows are.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_cli.methods import registry

HARMLESS = (
    "output_dir", "ignore", "eval.", "generation.", "save.", "logging.", "health.", "launch.main_process_",
    "launch.machine_rank", "launch.num_machines", "model.trust_remote_code", "train.gradient_accumulation_steps",
)  # fmt: skip
BY_ROWS = (
    "data.train", "data.eval_sets", "data.eval_split", "data.max_length", "data.overlength",
    "data.max_dropped_fraction", "data.template_mismatch", "model.chat_template",
)  # fmt: skip
ROUNDING = (
    "train.per_device_train_batch_size", "train.gradient_checkpointing", "model.attn_implementation", "model.layout",
    "launch.strategy",
)  # fmt: skip
LENGTH = ("train.num_train_epochs", "train.max_steps", "method.total_episodes")
BEST = ("eval.metric", "eval.metric_rows", "data.eval_sets", "data.eval_split", "save.load_best_model_at_end")
"""Keys that make an evaluation another than the one before."""
IMPOSSIBLE = ("method.name", "lora", "model.new_tokens", "model.starting_adapter")
"""`lora` itself, that is: there are adapters on one side alone."""
CONSEQUENCES = {
    "train.optim": "the optimiser starts with an empty state",
    "seed": "the order of the rows and later draws are those of the new seed",
    "data.shuffle": "the order of the rows from here on is the new one",
    "launch.num_processes": "the rows of a step stay the same; processes draw their dropout and noise anew",
    "lora.": "not used: the adapter of the checkpoint goes on as it is",
    "model.name_or_path": "the trained weights of the checkpoint go on",
    "model.revision": "the trained weights of the checkpoint go on",
    "train.global_batch_size": "the run goes on at the same step number, in steps of the new size",
}
"""What going on anyway does; for other keys the new value holds from here on."""


@dataclass(frozen=True)
class Change:
    """One key that has another value than in the checkpoint."""

    key: str
    before: Any
    now: Any
    trains: bool = False
    """Whether it has a part in the training of this recipe, though of others it has none."""

    @property
    def kind(self) -> str:
        """harmless | rounding | length | training | impossible"""
        if self.trains:
            return "training"
        for kind, keys in (("harmless", (*HARMLESS, *BY_ROWS)), ("rounding", ROUNDING), ("length", LENGTH)):
            if _among(self.key, keys):
                return kind
        return "impossible" if self.key in IMPOSSIBLE else "training"

    @property
    def consequence(self) -> str:
        found = [text for key, text in CONSEQUENCES.items() if _among(self.key, (key,))]
        return found[0] if found else "the new value holds from here on"

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.before)} -> {json.dumps(self.now)}"


def _among(key: str, keys: tuple[str, ...]) -> bool:
    """A name that ends in a dot or an underscore stands for every key that begins so."""
    return any(key == k or key.startswith(k if k.endswith((".", "_")) else k + ".") for k in keys)


def leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists are leaves."""
    if not isinstance(value, Mapping) or not value:
        return [(prefix, value)]
    return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}.{key}".strip("."))]


def effective(recipe: Mapping[str, Any], resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> the value that the run uses, of a recipe and what its `auto`s became."""
    values = dict(leaves(recipe))
    used = {key: resolved.get(key.rpartition(".")[2], value) for key, value in values.items()}
    return json.loads(json.dumps(used))  # type: ignore[no-any-return]


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every key that differs. A section that one side has and the other has not is one change; a key that one side
    does not know at all is of another version of this program, and none."""
    differing = (key for key in now if key in before and before[key] != now[key])
    changes = [Change(key, before[key], now[key], trains(key, now)) for key in differing]
    for one, other in ((before, now), (now, before)):
        for key in (k for k in one if not one[k] and k not in other):
            section = {k: v for k, v in other.items() if k.startswith(key + ".")}
            if section:
                changes.append(Change(key, *((one[key], section) if one is before else (section, one[key]))))
    return changes


def trains(key: str, values: Mapping[str, Any]) -> bool:
    """How answers are drawn, where they are learned from; how long a row may be, where it is the size of a bin."""
    method = registry().get(str(values.get("method.name")))
    drawn = method is not None and method.online and key.startswith("generation.")
    return drawn or (key == "data.max_length" and values.get("method.packing") is True)


def fingerprint(values: Mapping[str, Any]) -> str:
    """Of what is trained and how; not of logging, saving, places of files, or how a step is split."""
    left_out = (*HARMLESS, *ROUNDING, "data.eval_sets")
    kept = {k: v for k, v in values.items() if trains(k, values) or not _among(k, left_out)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
