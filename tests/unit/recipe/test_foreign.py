"""Recipes of other tools: what they say is kept, what has no counterpart is a comment, and the result is valid."""

import pytest

from finetune_cli import starting
from finetune_cli.errors import RecipeError
from finetune_cli.recipe.foreign import convert
from finetune_cli.recipe.load import load

AXOLOTL_QLORA = """
base_model: NousResearch/Llama-3.2-1B
# a comment
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
  - path: mine.jsonl
    ds_type: json
    type: chat_template
    field_messages: dialogue
    split: train
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: true
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj]
wandb_project: llamas
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
loss_watchdog_threshold: 5.0
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
AXOLOTL_DPO = """
base_model: meta-llama/Llama-3.2-1B-Instruct
rl: dpo
rl_beta: 0.2
datasets: [{path: fozziethebeat/alpaca_messages_2k_dpo_test, type: chat_template.default, split: train}]
sequence_len: 1024
micro_batch_size: 1
num_epochs: 1
learning_rate: 5.0e-6
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
fp16: false
bf16: true
hub_model_id: me/out
"""
FACTORY_SFT = """
### model
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true
### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
### dataset
dataset: identity,alpaca_en_demo
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
### output
output_dir: saves/qwen3-4b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
FACTORY_DPO = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: dpo
finetuning_type: full
pref_beta: 0.3
pref_loss: hinge
dataset: dpo_en_demo
template: llama3
cutoff_len: 1024
output_dir: saves/dpo
per_device_train_batch_size: 1
learning_rate: 5.0e-7
bf16: true
deepspeed: examples/deepspeed/ds_z3_config.json
"""
TRL_SFT = """
model_name_or_path: Qwen/Qwen2.5-0.5B
torch_dtype: bfloat16
dataset_name: trl-lib/Capybara
dataset_train_split: train
dataset_test_split: test
eval_strategy: steps
eval_steps: 100
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
max_length: 1024
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
use_peft: true
lora_r: 32
lora_alpha: 16
output_dir: Qwen2.5-0.5B-SFT
push_to_hub: false
assistant_only_loss: true
hub_token: hf_abcdefghijklmnopqrstuvwxyz0123456789
"""
TRL_DPO = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5.0e-7
beta: 0.05
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.5]
precompute_ref_log_probs: true
max_prompt_length: 512
lora_r: 8
max_steps: -1
no_remove_unused_columns: true
output_dir: out
"""


@pytest.fixture
def converted(tmp_path):
    """(recipe, text) of another tool's recipe."""

    def convert_it(text, method=None):
        (tmp_path / "theirs.yaml").write_text(text)
        ours = convert(tmp_path / "theirs.yaml", method=method)
        (tmp_path / "recipe.yaml").write_text(ours)
        return load(tmp_path / "recipe.yaml").recipe, ours

    return convert_it


def comments(text):
    return {line.split(":")[0].strip("# ") for line in text.splitlines() if line.startswith("#   ") and line[4] != " "}


def test_axolotl_qlora(converted):
    recipe, text = converted(AXOLOTL_QLORA)
    assert recipe.method.name == "sft"
    assert recipe.method.packing
    assert recipe.model.name_or_path == "NousResearch/Llama-3.2-1B"
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (32, 16, 0.05)
    assert recipe.lora.target_modules == ["gate_proj", "down_proj", "up_proj"]
    assert recipe.quantization.load_in_4bit
    one, other = recipe.data.train
    assert one.path.endswith("teknium/GPT4-LLM-Cleaned")
    assert (other.path.endswith("mine.jsonl"), other.columns, other.split) == (True, {"messages": "dialogue"}, "train")
    assert (recipe.data.max_length, recipe.data.eval_split) == (2048, 0.1)
    train = recipe.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps, train.num_train_epochs) == (2, 4, 2)
    assert (train.learning_rate, train.optim, train.precision, train.warmup_steps) == (
        2e-4,
        "adamw_bnb_8bit",
        "auto",
        10,
    )
    assert (recipe.eval.eval_steps, recipe.save.save_steps) == (0.125, 0.5)
    assert (recipe.logging.project, recipe.logging.report_to) == ("llamas", ["wandb"])
    assert comments(text) >= {"loss_watchdog_threshold", "special_tokens", "flash_attention", "model_type"}
    assert "base_model" not in comments(text)


def test_axolotl_dpo(converted):
    recipe, _ = converted(AXOLOTL_DPO)
    assert (recipe.method.name, recipe.method.beta, recipe.train.precision) == ("dpo", 0.2, "bf16")
    assert recipe.lora.target_modules == "all-linear"
    assert recipe.save.hub_model_id == "me/out"
    assert recipe.save.push_to_hub


def test_llama_factory_sft(converted):
    recipe, text = converted(FACTORY_SFT)
    assert (recipe.lora.r, recipe.lora.lora_alpha) == (8, 16)  # its default alpha is twice the rank
    assert [source.path.rsplit("/", 1)[-1] for source in recipe.data.train] == ["identity.json", "alpaca_en_demo.json"]
    assert (recipe.train.learning_rate, recipe.train.warmup_ratio) == (1e-4, 0.1)
    assert (recipe.eval.eval_steps, recipe.save.save_steps, recipe.logging.report_to) == (500, 500, ["none"])
    assert recipe.model.trust_remote_code
    assert comments(text) >= {"dataset", "template", "max_samples", "plot_loss", "overwrite_output_dir", "ddp_timeout"}


def test_llama_factory_dpo_of_all_weights(converted):
    recipe, text = converted(FACTORY_DPO)
    assert (recipe.method.name, recipe.method.beta, recipe.method.loss_type) == ("dpo", 0.3, ["hinge"])
    assert recipe.lora is None
    assert "deepspeed" in comments(text)


def test_trl_sft(converted):
    recipe, text = converted(TRL_SFT)
    assert (recipe.method.name, recipe.method.packing, recipe.method.loss_on) == ("sft", True, "assistant")
    assert recipe.lora.r == 32
    assert recipe.data.train[0].split == "train"
    assert recipe.data.eval_sets[""].split == "test"
    assert recipe.model.dtype == "bfloat16"
    assert "hf_abcdef" not in text


def test_trl_dpo(converted):
    recipe, text = converted(TRL_DPO)
    method = recipe.method
    assert (method.name, method.beta, method.loss_type, method.loss_weights) == (
        "dpo",
        0.05,
        ["sigmoid", "sft"],
        [1.0, 0.5],
    )
    assert recipe.lora is None  # use_peft is not there
    assert recipe.train.max_steps is None
    assert comments(text) >= {"max_prompt_length", "no_remove_unused_columns", "lora_r"}


def test_the_method_may_be_told(converted):
    text = "model_name_or_path: a/b\ndataset_name: c/d\noutput_dir: out\n"
    assert converted(text)[0].method.name == "sft"
    assert converted(text, method="orpo")[0].method.name == "orpo"


def test_a_value_that_our_schema_refuses_becomes_a_comment(converted):
    recipe, text = converted(
        "base_model: a/b\nmicro_batch_size: lots\nlearning_rate: -1\nsequence_len: 100\nnum_epochs: 1\n"
    )
    assert recipe.data.max_length == 100
    assert '#   train.per_device_train_batch_size: "lots"' in text
    assert "train.learning_rate" in comments(text)


@pytest.mark.parametrize(
    "text", ["rl: kto\nbase_model: a/b\n", "stage: kto\ntemplate: x\n", "rl: grpo\nbase_model: x\n"]
)
def test_a_method_that_is_not_here(converted, text):
    with pytest.raises(RecipeError, match="is not here"):
        converted(text)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [\n", "", "a: 1\na: 2\n"])
def test_what_is_no_recipe(converted, text):
    with pytest.raises(RecipeError, match="cannot be read"):
        converted(text)


def test_a_value_cannot_leave_its_comment(converted):
    _, text = converted('base_model: a/b\nstrange: "x\\nseed: 1\\n"\n')
    assert "\nseed" not in text


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.yaml").write_text(AXOLOTL_DPO)
    assert starting.init(None, tmp_path / "ours.yaml", source=tmp_path / "theirs.yaml") == 0
    text = (tmp_path / "ours.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=file:")
    with pytest.raises(RecipeError, match="cannot be read"):
        starting.init(None, tmp_path / "other.yaml", source=tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="needs a method"):
        starting.init(None, tmp_path / "other.yaml")


def test_once_in_a_run_of_one_epoch_is_not_every_step(converted):
    ours, text = converted("base_model: a/b\nsequence_len: 9\nnum_epochs: 1\nsaves_per_epoch: 1\nevals_per_epoch: 1")
    assert "save_steps" not in text.partition("# Not taken over")[0]
    assert (ours.eval.eval_strategy, ours.save.save_steps) == ("epoch", 0.1)
    assert "saves_per_epoch: 1\n#       that is the end of the run" in text
    ours, _ = converted("base_model: a/b\nsequence_len: 9\nnum_epochs: 1\nsaves_per_epoch: 4")
    assert ours.save.save_steps == 0.25
    _, text = converted("base_model: a/b\nsequence_len: 9\nnum_epochs: 2\nsaves_per_epoch: 4\nmax_steps: 10")
    assert "saves_per_epoch: 4\n" in text.partition("# Not taken over")[2]


@pytest.mark.parametrize(
    ("said", "loss_on"),
    [
        ("completion_only_loss: true\nassistant_only_loss: false", None),
        ("assistant_only_loss: false", None),
        ("assistant_only_loss: true", "assistant"),
        ("completion_only_loss: false", "all"),
        ("completion_only_loss: false\nassistant_only_loss: false", "all"),
    ],
)
def test_trl_trains_on(converted, said, loss_on):
    ours, text = converted(f"model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\n{said}")
    assert ours.method.loss_on == loss_on
    assert ("left to method.loss_on" in text) == ("false" in said and loss_on is None)


def test_every_file_of_a_set_is_taken(converted):
    ours, _ = converted(
        "base_model: a/b\nsequence_len: 9\ndatasets: [{path: json, data_files: [a.jsonl, b.jsonl], type: alpaca}]"
    )
    assert [source.path.rpartition("/")[2] for source in ours.data.train] == ["a.jsonl", "b.jsonl"]
    _, text = converted("base_model: a/b\nsequence_len: 9\ndatasets: [{path: org/repo, data_files: a.jsonl}]")
    assert 'datasets: data_files: "a.jsonl"' in text


def test_evaluation_is_of_the_same_configuration(converted):
    ours, _ = converted(
        "model_name_or_path: a/b\ndataset_name: c/d\ndataset_config: main\nuse_peft: true\neval_strategy: steps\n"
        "dataset_test_split: test"
    )
    assert [(s.name, s.split) for s in ours.data.eval_sets.values()] == [("main", "test")]


def test_llamafactory_trains_adapters_where_it_does_not_say(converted):
    ours, _ = converted("model_name_or_path: a/b\nstage: sft\ndataset: one\ncutoff_len: 9\nlora_rank: 4")
    assert ours.lora.r == 4


def test_secrets_inside_of_values_are_left_out(converted):
    opaque = "q7w8e9r0t1y2u3i4o5p6a7"
    _, text = converted(
        f"model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\nmodel_init_kwargs: {{token: {opaque}, x: 1}}"
    )
    assert opaque not in text
    assert "(a secret, left out)" in text
    _, text = converted(f"base_model: a/b\nsequence_len: 9\ndatasets: [{{path: c/d, token: {opaque}}}]")
    assert opaque not in text
