"""Recipes of axolotl, LLaMA-Factory and TRL as ours, with a comment for each key that has no counterpart.

A key finds its place by a translation of its own, by the table of other tools' names, or by being the leaf name
that Hugging Face users know. What does not pass our schema becomes a comment with the schema's own message.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune_cli.errors import RecipeError
from finetune_cli.recipe import scalars, yaml
from finetune_cli.recipe.load import load
from finetune_cli.recipe.names import REMEDIES, RENAMED
from finetune_cli.recipe.secrets import is_secret, mask
from finetune_cli.recipe.sections import Recipe
from finetune_cli.recipe.shape import fields, leaves, methods
from finetune_cli.recipe.translations import AXOLOTL, FACTORY, NO_COUNTERPART, TRANSLATED, TRL, Draft

SIGNS = {
    AXOLOTL: ("base_model", "sequence_len", "micro_batch_size", "val_set_size", "sample_packing", "rl"),
    FACTORY: ("stage", "finetuning_type", "cutoff_len", "dataset_dir", "lora_target", "template", "val_size"),
    TRL: ("dataset_name", "use_peft", "max_length", "dataset_train_split", "lora_target_modules", "dataset_test_split"),
}
"""Keys that tell a tool; the one with most of them it is."""
STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo", "rm": "reward", "ppo": "ppo", "kto": "kto"}
SCALES = {"lora_alpha", "lora_dropout", "r"}


def convert(path: Path, *, method: str | None = None) -> str:
    """The text of our recipe. Raises RecipeError where the file is no YAML mapping or its method is none of ours."""
    text, found = yaml.decode(path.read_bytes(), str(path))
    tree, more = yaml.parse(text, str(path))
    given = tree.plain() if tree is not None else None
    if found or more or not isinstance(given, dict):
        raise RecipeError(f"{path} cannot be read", "It has to be one YAML mapping.", problems=(*found, *more))
    return written(draft(given, method=method), path.name)


def draft(given: Mapping[str, Any], *, method: str | None = None) -> Draft:
    tool = max(SIGNS, key=lambda name: sum(key in given for key in SIGNS[name]))
    made = Draft(tool, dict(given), method or method_of(tool, given))
    if made.method not in methods(Recipe):
        raise RecipeError(
            f"{made.method!r}, which this {tool} recipe asks for, is not here", f"Known: {', '.join(methods(Recipe))}."
        )
    if tool == FACTORY:
        made.given.setdefault("finetuning_type", "lora")  # its default
    for key, value in made.given.items():
        if value is not None and value != "":
            place(made, key, value)
    settle(made)
    return made


def method_of(tool: str, given: Mapping[str, Any]) -> str:
    """TRL's recipes do not say which trainer reads them: what only a preference method knows tells."""
    if tool == FACTORY:
        stage = str(given.get("stage", "sft"))
        return "orpo" if stage == "dpo" and given.get("pref_loss") == "orpo" else STAGES.get(stage, stage)
    if tool == AXOLOTL:
        return "reward" if given.get("reward_model") else str(given.get("rl") or "sft")
    if "center_rewards_coefficient" in given:
        return "reward"
    return "dpo" if {"beta", "loss_type", "precompute_ref_log_probs"} & set(given) else "sft"


def place(draft: Draft, key: str, value: Any) -> None:
    """A translation of its own, a method's knob, another name, our own leaf name, or a comment."""
    method = methods(Recipe)[draft.method]
    renamed = RENAMED.get(key, "")
    section, _, leaf = renamed.rpartition(".")
    known = leaf in fields(method) if section == "method" else bool(section) and "[]" not in section
    if key in TRANSLATED:
        TRANSLATED[key](draft, key, value)
    elif key in fields(method) and key != "name":
        draft.put(f"method.{key}", value)
    elif known:
        draft.put(renamed, value)
    elif key in REMEDIES:
        draft.note(key, REMEDIES[key])
    elif key in leaves(Recipe):
        draft.put(leaves(Recipe)[key], value)
    else:
        draft.note(key, NO_COUNTERPART)


def settle(draft: Draft) -> None:
    """Complete the draft, and turn what our schema refuses into comments."""
    if any(draft.given.get(key) for key in ("adapter_name_or_path", "lora_model_dir")):
        draft.out.pop("lora", None)
    elif "lora" not in draft.out or _full(draft):
        for key in [key for key in draft.given if RENAMED.get(key, "").startswith("lora.") or key in SCALES]:
            draft.note(key, "all weights are trained: there is no `lora:`")
        draft.out.pop("lora", None)
    elif draft.tool == FACTORY and "lora_alpha" not in draft.out["lora"]:
        draft.put("lora.lora_alpha", 2 * draft.out["lora"].setdefault("r", 8))  # its defaults
    knobs = draft.out.pop("method", {})
    draft.out["method"] = {"name": draft.method, **knobs} if knobs else draft.method
    draft.out.setdefault("output_dir", "runs/first")
    draft.out.setdefault("model", {}).setdefault("name_or_path", "NAME")
    draft.out.setdefault("data", {}).setdefault("train", [{"path": "train.jsonl"}])
    for _ in range(100):
        refused = problems(draft)
        if not refused:
            return
        for key, message in refused:
            if not take_out(draft, key, message):
                raise RecipeError(
                    f"{key or 'the recipe'}: {message}", "Write this part by hand: `finetune init METHOD`."
                )


def _full(draft: Draft) -> bool:
    """Whether an adapter is named nowhere, though some of its settings are."""
    asked = {draft.given.get(key) for key in ("adapter", "finetuning_type", "use_peft")}
    return not asked & {"lora", "qlora", True}


def problems(draft: Draft) -> list[tuple[str, str]]:
    """(our key, message) of all that the schema refuses."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(scalars.dump(draft.out), encoding="utf-8")
        try:
            load(path)
        except RecipeError as error:
            return [(problem.key, problem.message) for problem in error.problems]
    return []


def take_out(draft: Draft, key: str, message: str) -> bool:
    """Remove the innermost part of a key that is there, and note it; whether there was one."""
    steps = re.findall(r"[^.\[\]]+", key)
    if steps[:1] == ["method"] and isinstance(draft.out["method"], str):
        return False
    place: Any = draft.out
    for step in steps[:-1]:
        place = place.get(step) if isinstance(place, dict) else place[int(step)] if step.isdigit() else None
    if not isinstance(place, dict) or not steps or steps[-1] not in place:
        return False
    draft.notes.append((key, place.pop(steps[-1]), message))
    return True


ORDER = ("method", "output_dir", "seed", "model", "lora", "quantization", "data", "train")


def written(draft: Draft, name: str) -> str:
    """The recipe as text: ours first, then what did not find a place."""
    head = f"# From {name}, a recipe of {draft.tool}. `finetune validate` says what is still to do.\n"
    if draft.tool == TRL and isinstance(draft.out["method"], str):
        head += "# TRL's recipes do not say which trainer reads them; `finetune init METHOD --from` does.\n"
    keys = sorted(draft.out, key=lambda key: ORDER.index(key) if key in ORDER else len(ORDER))
    parts = [scalars.dump({key: draft.out[key]}) for key in keys if draft.out[key] != {} or key == "lora"]
    lines = [f"#   {key}: {_flat(key, value)}\n#       {one_line(why)}" for key, value, why in draft.notes]
    rest = ["# Not taken over:\n" + "\n".join(lines) + "\n"] if lines else []
    return head + "".join([*parts, *rest])


def _flat(key: str, value: Any) -> str:
    """A value in one line of a comment; never a secret."""
    return one_line(mask(json.dumps(without_secrets(key, value), ensure_ascii=False, default=str)))[:200]


def without_secrets(key: str, value: Any) -> Any:
    """The same with a word in place of each secret, however deep it lies."""
    if isinstance(value, Mapping):
        return {name: without_secrets(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(key, inner) for inner in value]
    return "(a secret, left out)" if is_secret(key.rpartition(" ")[2], value) else value


def one_line(text: str) -> str:
    return " ".join(text.split())
