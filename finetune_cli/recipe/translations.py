"""Keys of other tools whose values need more than another name, each with its translation."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune_cli.recipe.names import REMEDIES

AXOLOTL, FACTORY, TRL = "axolotl", "LLaMA-Factory", "TRL"
NO_COUNTERPART = "has no counterpart"


@dataclass
class Draft:
    """Our recipe as far as it is, and what did not find a place."""

    tool: str
    given: dict[str, Any]
    method: str
    out: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, Any, str]] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        """A dotted key of ours."""
        *sections, leaf = key.split(".")
        place = self.out
        for section in sections:
            place = place.setdefault(section, {})
        place[leaf] = value

    def note(self, key: str, why: str) -> None:
        self.notes.append((key, self.given.get(key), why))


def adapter(draft: Draft, key: str, value: Any) -> None:
    """adapter: lora | qlora, finetuning_type: lora | full, use_peft: true"""
    if value in ("lora", "qlora", True):
        draft.out.setdefault("lora", {})
        if value == "qlora":
            draft.put("quantization.load_in_4bit", True)
    elif value not in ("full", False):
        draft.note(key, REMEDIES[key])


def precision(draft: Draft, key: str, value: Any) -> None:
    if value in (True, "true"):
        draft.put("train.precision", key)
    elif value == "auto":
        draft.put("train.precision", "auto")


def bits(draft: Draft, key: str, value: Any) -> None:
    wide = {"quantization_bit": value, "load_in_4bit": 4, "load_in_8bit": 8}[key]
    if value:
        draft.put(f"quantization.load_in_{wide}bit", True)


def linear(draft: Draft, _: str, value: Any) -> None:
    if value:
        draft.put("lora.target_modules", "all-linear")


def targets(draft: Draft, _: str, value: Any) -> None:
    """A list, names with commas between them, or all."""
    if value in ("all", ["all"], "all-linear", ["all-linear"]):
        draft.put("lora.target_modules", "all-linear")
    else:
        draft.put("lora.target_modules", re.split(r"\s*,\s*", value) if isinstance(value, str) else value)


def datasets(draft: Draft, key: str, value: Any) -> None:
    """axolotl's list of sets, and TRL's."""
    named = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
    sets = [made for one in named for made in sources(draft, one)]
    if not sets:
        return draft.note(key, REMEDIES.get(key, "name files or hub ids in data.train"))
    draft.put("data.train" if key == "datasets" else "data.eval_sets", sets if key == "datasets" else sets[0])
    if key != "datasets" and len(sets) > 1:
        draft.note(key, "only the first is taken over; data.eval_sets takes names: {one: {path: ...}, other: ...}")
    return None


def sources(draft: Draft, one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One, or one for each of its files."""
    made, files = source(draft, one), one.get("data_files")
    if not files:
        return [made]
    if made.get("path") not in ("json", "csv", "parquet") or not isinstance(files, str | list):
        draft.notes.append(("datasets: data_files", files, "files of a hub repository cannot be chosen: name a split"))
        return [made]
    return [{**made, "path": file} for file in ([files] if isinstance(files, str) else files)]


def source(draft: Draft, one: Mapping[str, Any]) -> dict[str, Any]:
    made = {key: one[key] for key in ("path", "name", "split") if one.get(key) is not None}
    columns = dict(_columns(one))
    roles = dict(one.get("roles") or {})
    for key in (key for key in one if key not in TAKEN and key not in READ_ALIKE):
        why = "the shape of rows is found from their columns" if key == "type" else NO_COUNTERPART
        draft.notes.append((f"datasets: {key}", one[key], why))
    for key in (key for key in READ_ALIKE if one.get(key) not in (None, *READ_ALIKE[key])):
        about = "messages have role and content, or from and value"
        if key in ("roles_to_train", "train_on_eos"):
            about = "method.loss_on says which turns are trained; each with the token that ends it"
        draft.notes.append((f"datasets: {key}", one[key], about))
    return {**made, **({"columns": columns} if columns else {}), **({"roles": roles} if roles else {})}


COLUMNS = {
    "field_messages": "messages", "field_chosen": "chosen", "field_rejected": "rejected", "field_tools": "tools",
    "field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "system",
}  # fmt: skip
"""axolotl's names of columns, under a set or under its `type:`."""
READ_ALIKE: dict[str, tuple[Any, ...]] = {
    "message_property_mappings": ({"role": "role", "content": "content"}, {"role": "from", "content": "value"}),
    "message_field_role": ("role", "from"), "message_field_content": ("content", "value"),
    "roles_to_train": (["assistant"], ["gpt"]), "train_on_eos": ("turn",),
}  # fmt: skip
"""Settings of axolotl's sets, and the values of them that are so here without being said."""
TAKEN = {"path", "name", "split", "data_files", "roles", "field", "ds_type", *COLUMNS}


def _columns(one: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Our column -> its name in the file, where that is another; messages may be called conversations."""
    shape = one.get("type")
    for key, name in {**one, **(shape if isinstance(shape, dict) else {})}.items():
        ours = COLUMNS.get(key)
        if ours is not None and isinstance(name, str) and name not in (ours, "conversations"):
            yield ours, name
    if shape == "completion" and one.get("field", "text") != "text":
        yield "text", one["field"]


def named_sets(draft: Draft, key: str, value: Any) -> None:
    """LLaMA-Factory's names, which its dataset_info.json turns into files; TRL's hub id."""
    train = key in ("dataset", "dataset_name")
    if draft.tool == TRL:
        parts = {"name": draft.given.get("dataset_config"), "split": draft.given.get("dataset_train_split")}
        return draft.put("data.train", [{"path": value, **{k: v for k, v in parts.items() if v}}])
    names = value if isinstance(value, list) else re.split(r"\s*,\s*", str(value))
    draft.note(key, "LLaMA-Factory finds these in dataset_info.json: write their files or hub ids as paths")
    sets = [{"path": f"{draft.given.get('dataset_dir') or 'data'}/{name}.json"} for name in names]
    return draft.put("data.train" if train else "data.eval_sets", sets if train else sets[0])


def test_split(draft: Draft, key: str, value: Any) -> None:
    if draft.given.get("eval_strategy", "no") == "no":
        return draft.note(key, "nothing is evaluated without eval_strategy; here rows in data.eval_sets are")
    parts = {"path": draft.given.get("dataset_name"), "name": draft.given.get("dataset_config"), "split": value}
    return draft.put("data.eval_sets", {key: part for key, part in parts.items() if part})


def held_out(draft: Draft, key: str, value: Any) -> None:
    if isinstance(value, int | float) and value >= 1:
        return draft.note(key, "here it is a share of the rows: data.eval_split: 0.05")
    return draft.put("data.eval_split", float(value)) if value else None


def per_epoch(draft: Draft, key: str, value: Any) -> None:
    """So many an epoch, as a share of the run."""
    epochs = draft.given.get("num_epochs", draft.given.get("num_train_epochs"))
    if key == "evals_per_epoch" and value == 1:
        return draft.put("eval.eval_strategy", "epoch")
    known = all(isinstance(number, int | float) and number > 0 for number in (epochs, value))
    if not known or (draft.given.get("max_steps") or 0) > 0:
        return draft.note(key, REMEDIES[key])
    if value * epochs <= 1:
        return draft.note(key, "that is the end of the run at the earliest, where it is saved and evaluated anyway")
    return draft.put(KINDS[key], round(1 / (value * epochs), 4))


KINDS = {"evals_per_epoch": "eval.eval_steps", "saves_per_epoch": "save.save_steps"}


def inputs(draft: Draft, key: str, value: Any) -> None:
    """train_on_inputs, train_on_prompt: prompts are trained too; mask_history: the last answer alone."""
    if value and draft.method == "sft":
        draft.put("method.loss_on", "last_assistant" if key == "mask_history" else "all")


def tokens_of_answers(draft: Draft, key: str, value: Any) -> None:
    """completion_only_loss, assistant_only_loss"""
    if draft.method != "sft":
        return
    if draft.given.get("assistant_only_loss"):
        draft.put("method.loss_on", "assistant")
    elif draft.given.get("completion_only_loss") is False:
        draft.put("method.loss_on", "all")
    elif not value:
        draft.note(key, "left to method.loss_on: assistant for messages (all trains every token), completion for pairs")


def kernel(draft: Draft, key: str, value: Any) -> None:
    if value not in (False, "disabled"):
        draft.note(key, "model.attn_implementation: auto takes flash-attn where it is installed")


def tracker(draft: Draft, key: str, value: Any) -> None:
    draft.put("logging.report_to", ["wandb"])
    draft.put("logging.project" if key == "wandb_project" else "logging.run_name", value)


def hub(draft: Draft, _: str, value: Any) -> None:
    draft.put("save.hub_model_id", value)
    if draft.tool == AXOLOTL:
        draft.put("save.push_to_hub", True)


def template(draft: Draft, key: str, value: Any) -> None:
    if value not in ("tokenizer_default", "default"):
        draft.note(key, "the tokenizer's own template is used; model.chat_template names a file of another")


def only_positive(draft: Draft, key: str, value: Any) -> None:
    if isinstance(value, int | float) and value > 0:
        draft.put(f"train.{key}", value)


def loss(draft: Draft, key: str, value: Any) -> None:
    """pref_loss, loss_type; pref_ftx is the weight of the chosen answers' likelihood beside it."""
    if draft.method == "dpo":
        beside = draft.given.get("pref_ftx")
        kind = draft.given.get("pref_loss", draft.given.get("loss_type", "sigmoid"))
        draft.put("method.loss_type", [kind, "sft"] if beside else kind)
        if beside:
            draft.put("method.loss_weights", [1.0, beside])
    elif draft.method != "orpo" and value:
        draft.note(key, NO_COUNTERPART)


def drawn(draft: Draft, key: str, value: Any) -> None:
    if draft.method == "ppo" and value != 1:
        return draft.note(key, "answers that are learned from are drawn from the whole distribution")
    return draft.put("generation.top_p", value)


def brought(draft: Draft, key: str, value: Any) -> None:
    """An adapter that the run goes on with: it brings its base, rank and layers."""
    base = draft.given.get("model_name_or_path", draft.given.get("base_model"))
    draft.put("model.name_or_path", value)
    draft.note(key, f"this adapter goes on, with the rank and layers it has, on the base that it names ({base} there)")


def listed(draft: Draft, _: str, value: Any) -> None:
    """Names, also with commas between them."""
    draft.put("lora.modules_to_save", re.split(r"\s*,\s*", value) if isinstance(value, str) else value)


def checkpointing(draft: Draft, key: str, value: Any) -> None:
    """Also `unsloth` and `offload`, which keep what is recomputed elsewhere."""
    draft.put("train.gradient_checkpointing", bool(value))
    if isinstance(value, str):
        draft.note(key, "activations are recomputed, not moved elsewhere")


def rewarded(draft: Draft, _: str, value: Any) -> None:
    """LLaMA-Factory's reward model for ppo; axolotl's `true` says which method it is."""
    if draft.method == "ppo":
        draft.put("method.reward", value)


def only_if_asked(draft: Draft, key: str, value: Any) -> None:
    """What is off needs no word."""
    if value and draft.method == "sft":
        draft.put("method.packing", True)
    elif value:
        draft.note(key, "rows are packed in sft alone; here none are padded")


def silent(_draft: Draft, _key: str, _value: Any) -> None:
    """What was read elsewhere, or says what is always so here."""


Translation = Callable[[Draft, str, Any], Any]
TRANSLATED: dict[str, Translation] = {
    **dict.fromkeys(("adapter", "finetuning_type", "use_peft"), adapter),
    **dict.fromkeys(("bf16", "fp16"), precision),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), bits),
    "lora_target_linear": linear,
    **dict.fromkeys(("lora_target", "lora_target_modules"), targets),
    **dict.fromkeys(("datasets", "test_datasets"), datasets),
    **dict.fromkeys(("dataset", "eval_dataset", "dataset_name"), named_sets),
    "dataset_test_split": test_split,
    **dict.fromkeys(("val_set_size", "val_size"), held_out),
    **dict.fromkeys(KINDS, per_epoch),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "mask_history"), inputs),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), tokens_of_answers),
    **dict.fromkeys(("flash_attention", "flash_attn"), kernel),
    **dict.fromkeys(("wandb_project", "wandb_name", "wandb_run_name"), tracker),
    "hub_model_id": hub,
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), brought),
    **dict.fromkeys(("additional_target", "lora_modules_to_save"), listed),
    "gradient_checkpointing": checkpointing,
    "top_p": drawn,
    "reward_model": rewarded,
    **dict.fromkeys(("sample_packing", "packing", "neat_packing"), only_if_asked),
    **dict.fromkeys(("template", "chat_template"), template),
    **dict.fromkeys(("max_steps", "warmup_steps", "num_train_epochs"), only_positive),
    **dict.fromkeys(("pref_loss", "loss_type", "pref_ftx"), loss),
    **dict.fromkeys(
        ("stage", "rl", "dataset_config", "dataset_train_split", "dataset_dir", "do_train", "do_eval"), silent
    ),
}
