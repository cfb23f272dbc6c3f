"""The names of keys: unique over sections, and the table of other tools' names."""

import pytest

from finetune_cli.recipe.names import REMEDIES, RENAMED
from finetune_cli.recipe.sections import Recipe
from finetune_cli.recipe.shape import fields, item_leaves, leaves, methods, section_leaves

METHOD_KEYS = {
    "packing", "beta", "kl_coef", "loss_type", "label_smoothing", "ref_model", "precompute_ref_log_probs", "reward",
    "num_ppo_epochs", "num_mini_batches", "cliprange", "cliprange_value", "vf_coef", "neftune_noise_alpha",
}  # fmt: skip


def test_leaf_names_are_unique_over_all_sections() -> None:
    names = [leaf for _, leaf in section_leaves(Recipe)]
    assert sorted(names) == sorted(set(names))
    assert set(names) & set(fields(Recipe)) == {"train"}, "data.train and the section train: the section wins"


def test_the_table_is_long_and_its_targets_exist() -> None:
    assert len(RENAMED) + len(REMEDIES) >= 60
    assert not set(RENAMED) & set(REMEDIES)
    known = {*leaves(Recipe).values(), *fields(Recipe), *item_leaves(Recipe).values(), "data.train"}
    known |= {f"method.{key}" for key in METHOD_KEYS}
    assert set(RENAMED.values()) - known == set()


def test_no_alias_is_a_key_that_is_accepted() -> None:
    accepted = {*leaves(Recipe), *fields(Recipe), *leaves(Recipe).values()}
    accepted |= {key for spec in methods(Recipe).values() for key in fields(spec)}
    assert accepted & {*RENAMED, *REMEDIES} == set()


@pytest.mark.parametrize("alias", sorted({*RENAMED, *REMEDIES} - {"<<"}))
def test_every_alias_is_answered(says, good: str, alias: str) -> None:
    section, _, name = alias.rpartition(".")
    if section == "data.train":
        text = good.replace("data: train.jsonl", f"data: {{train: [{{path: train.jsonl, {name}: 1}}]}}")
    elif section:
        text = good.replace("model: org/m", "model: {name_or_path: org/m}").replace(
            "data: train.jsonl", "data: {train: train.jsonl}"
        )
        text += "lora: {}\n" if section == "lora" else ""
        needle = f"{section}: {{"
        text = text.replace(needle, f"{needle}{name}: 1, ").replace(", }", "}")
    else:
        text = f"{good}{name}: 1\n"
    (line,) = says(text)
    assert f"unknown key; {'here it is ' + RENAMED[alias] if alias in RENAMED else REMEDIES[alias]}" in line


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("max_seq_length", "data.max_length"), ("sequence_len", "data.max_length"), ("cutoff_len", "data.max_length"),
        ("micro_batch_size", "train.per_device_train_batch_size"), ("batch_size", "train.per_device_train_batch_size"),
        ("num_epochs", "train.num_train_epochs"), ("epochs", "train.num_train_epochs"), ("lr", "train.learning_rate"),
        ("optimizer", "train.optim"), ("bf16", "train.precision"), ("fp16", "train.precision"), ("lora_r", "lora.r"),
        ("lora_rank", "lora.r"), ("sample_packing", "method.packing"), ("neat_packing", "method.packing"),
        ("base_model", "model.name_or_path"), ("model_name_or_path", "model.name_or_path"),
        ("torch_dtype", "model.dtype"), ("dataset_text_field", "data.train[].columns"),
        ("response_template", "method.loss_on"), ("train_on_inputs", "method.loss_on"),
        ("completion_only_loss", "method.loss_on"), ("assistant_only_loss", "method.loss_on"),
        ("dpo_beta", "method.beta"), ("rl_beta", "method.beta"), ("orpo_alpha", "method.beta"),
        ("lambda", "method.beta"), ("kl_penalty", "method.kl_coef"), ("init_kl_coef", "method.kl_coef"),
    ],
)  # fmt: skip
def test_the_names_that_the_contract_lists(name: str, home: str) -> None:
    assert home in (RENAMED.get(name) or REMEDIES[name])
