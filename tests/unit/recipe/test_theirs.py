"""Recipes in the shapes of the examples that axolotl, LLaMA-Factory and TRL publish: each becomes one of ours that can
be run, what it asks for is kept, and nothing of it is lost without a comment."""

from pathlib import Path
from typing import Any

import pytest

from finetune_cli import commands
from finetune_cli.errors import FinetuneError
from finetune_cli.plan.changes import leaves
from finetune_cli.plan.machine import Gpu, Machine
from finetune_cli.recipe import yaml
from finetune_cli.recipe.foreign import convert
from finetune_cli.recipe.load import load

FOLDER = Path(__file__).with_name("theirs")
THEIRS = sorted(FOLDER.glob("*.yaml"))
KEPT: dict[str, dict[str, Any]] = {
    "axolotl-qlora": {
        "method.packing": True, "lora.lora_alpha": 48, "quantization.load_in_4bit": True, "train.num_train_epochs": 2,
        "eval.eval_steps": 0.125, "save.save_steps": 0.25, "train.gradient_checkpointing": True,
        "logging.project": "support",
    },
    "axolotl-full": {"method.packing": True, "lora": None, "data.max_length": 8192, "train.optim": "paged_adamw_8bit"},
    "axolotl-dpo": {
        "method.name": "dpo", "method.beta": 0.05, "method.label_smoothing": 0.1, "quantization.load_in_8bit": True,
        "lora.target_modules": "all-linear",
    },
    "axolotl-orpo": {"method.name": "orpo", "method.beta": 0.2, "train.max_steps": 500, "lora": None},
    "axolotl-rm": {"method.name": "reward", "method.center_rewards_coefficient": 0.01, "data.eval_split": 0.0},
    "factory-qlora": {
        "method.packing": True, "quantization.load_in_4bit": True, "data.max_length": 4096, "seed": 7,
        "lora.target_modules": ["q_proj", "k_proj", "v_proj"],
    },
    "factory-full": {"method.loss_on": "last_assistant", "method.neftune_noise_alpha": 5, "lora": None},
    "factory-dpo": {
        "method.beta": 0.2, "method.loss_type": ["sigmoid", "sft"], "method.loss_weights": [1.0, 0.1], "lora": None,
        "method.ref_model": "acme/other", "model.name_or_path": "saves/sft", "data.eval_split": 0.1,
    },
    "factory-orpo": {"method.name": "orpo", "train.precision": "fp16", "lora.r": 8, "lora.lora_alpha": 16},
    "factory-rm": {"lora.modules_to_save": ["embed_tokens", "lm_head"], "lora.use_rslora": True},
    "factory-ppo": {"method.name": "ppo", "generation.max_new_tokens": 512, "generation.top_p": 1.0},
    "trl-sft": {
        "method.packing": True, "method.loss_on": "assistant", "quantization.load_in_4bit": True, "lora.r": 32,
        "eval.eval_strategy": "epoch", "save.hub_strategy": "every_save", "train.max_steps": None,
        "train.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    },
    "trl-mix": {"method.loss_on": "all", "data.max_length": 512},
    "trl-dpo": {"method.beta": 0.01, "method.sync_ref_model": True, "method.ref_model_sync_steps": 64, "lora": None},
    "trl-orpo": {"method.name": "orpo", "train.warmup_steps": 10, "train.optim": "paged_adamw_8bit"},
    "trl-rm": {"method.name": "reward", "lora.r": 16, "eval.eval_steps": 50},
}  # fmt: skip
ENVIRONMENT = ("FT112", "FT117")
"""Rules on what is installed here; a recipe that reports to wandb is right where wandb is, flash-attn likewise."""


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """The path of our recipe made of theirs."""
    monkeypatch.chdir(tmp_path)
    gpu = Gpu(name="a GPU", memory_gib=80, compute_capability=9.0)
    monkeypatch.setattr(
        "finetune_cli.plan.machine.look", lambda: Machine(cpus=8, memory_gib=64, gpus=[gpu], cpu_bf16=True)
    )

    def make(path: Path) -> Path:
        method = "orpo" if path.stem == "trl-orpo" else None  # TRL's recipes do not say it
        Path("recipe.yaml").write_text(convert(path, method=method))
        return Path("recipe.yaml")

    return make


def test_each_tool_has_four_and_each_kind_is_there():
    names = [path.stem.split("-") for path in THEIRS]
    for tool in ("axolotl", "factory", "trl"):
        assert sum(name[0] == tool for name in names) >= 4
    assert set(KEPT) == {path.stem for path in THEIRS}


@pytest.mark.parametrize("path", THEIRS, ids=lambda path: path.stem)
def test_it_validates_and_keeps_what_it_asks_for(path, ours):
    made = ours(path)
    wrong = []
    try:
        commands.checked(made, [])
    except FinetuneError as error:
        wrong = [str(p) for p in error.problems if p.rule not in ENVIRONMENT and "does not exist" not in p.message]
    assert wrong == []
    dump = load(made).recipe.model_dump()
    values = {**dict(leaves(dump)), **{key: None for key in ("lora", "quantization") if dump[key] is None}}
    for key, value in KEPT[path.stem].items():
        found = dump["train"]["lr_scheduler_kwargs"] if key.endswith("_kwargs") else values[key]
        assert found == value, key


@pytest.mark.parametrize("path", THEIRS, ids=lambda path: path.stem)
def test_what_has_no_counterpart_is_a_comment(path, ours):
    text = ours(path).read_text()
    given = yaml.parse(path.read_text(), path.name)[0].plain()
    for key in ("plugins", "max_samples", "loraplus_lr_ratio", "eos_token", "ppo_buffer_size", "top_k", "deepspeed"):
        assert (f"#   {key}: " in text) == (given.get(key) is not None)


def test_columns_of_axolotl_have_our_names(tmp_path):
    (tmp_path / "t.yaml").write_text(
        "base_model: a/b\nsequence_len: 8\ndatasets:\n"
        "  - {path: one, field_messages: talk, field_chosen: good, field_rejected: rejected, type: x}\n"
        "  - {path: two, type: {field_instruction: q, field_output: a, format: '{instruction}'}}\n"
        "  - {path: three, type: completion, field: body}\n"
        "  - {path: four, message_field_role: speaker, roles_to_train: [user]}\n"
    )
    text = convert(tmp_path / "t.yaml")
    (tmp_path / "o.yaml").write_text(text)
    one, two, three, four = load(tmp_path / "o.yaml").recipe.data.train
    assert one.columns == {"messages": "talk", "chosen": "good"}
    assert two.columns == {"instruction": "q", "output": "a"}
    assert three.columns == {"text": "body"}
    assert four.columns is None
    assert '#   datasets: message_field_role: "speaker"\n#       messages have role and content' in text
    assert '#   datasets: roles_to_train: ["user"]\n#       method.loss_on says which turns are trained' in text
