"""The first step on pairs is equal to TRL 1.16's where ids and masks agree: DPO with every loss, ORPO, reward."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from tests.parity.stock import adapter_folder, assert_equal_gradients, causal_model, first_step, norm_of, sequences

EOS = "<|im_end|>"
PAIRS = [
    {"prompt": "What is two plus two?", "chosen": f" It is four.{EOS}", "rejected": f" Thank you.{EOS}"},
    {"prompt": "And three?", "chosen": f" five, as I said before.{EOS}", "rejected": f" It is a longer text.{EOS}"},
    {"prompt": "Here is a longer text with words that", "chosen": f" come.{EOS}", "rejected": f" again and{EOS}"},
    {"prompt": "user", "chosen": f" 日本 🙂 0123456789{EOS}", "rejected": f" model tool{EOS}"},
]
BETA = 0.3
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"loss_type": [kind]} for kind in (
        "sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
        "discopop", "sft", "sigmoid_norm",
    )},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.05},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "js": {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
    "alpha": {"loss_type": ["hinge"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ld_alpha": {"loss_type": ["sigmoid"], "ld_alpha": 0.4},
    "wpo": {"loss_type": ["sigmoid"], "use_weighting": True},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}  # fmt: skip
pytestmark = pytest.mark.slow


class Keep(TrainerCallback):
    """The gradients of the first step."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def arguments(tmp_path: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "trl"), "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4,
        "max_steps": 1, "logging_steps": 1, "max_grad_norm": 1e9, "report_to": [], "save_strategy": "no",
        "max_length": None, "gradient_checkpointing": False, "disable_tqdm": True, "learning_rate": 1e-6,
    }  # fmt: skip


def job_for(recipe_of: Any, job_of: Any, start: Any, method: dict[str, Any], **more: Any) -> Any:
    train = {"max_grad_norm": 0, "learning_rate": "auto", "per_device_train_batch_size": 4}
    path = recipe_of(rows=PAIRS, method=method, model={"name_or_path": str(start)}, train=train, **more)
    return job_of(path)[0]


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory):
    return adapter_folder(tiny_model_folder, tmp_path_factory.mktemp("adapter") / "sft")


@pytest.mark.parametrize("name", CASES)
def test_dpo(name, recipe_of, job_of, tiny_model_folder, adapter, tmp_path):
    from trl import DPOConfig, DPOTrainer

    knobs = CASES[name]
    method = {"name": "dpo", "beta": BETA, "ref_model": str(tiny_model_folder), **knobs}
    job = job_for(recipe_of, job_of, adapter, method, lora=None)
    numbers, norm, grads = first_step(job)
    keep = Keep()
    trainer = DPOTrainer(
        model=causal_model(tiny_model_folder, adapter),
        ref_model=causal_model(tiny_model_folder),
        args=DPOConfig(**arguments(tmp_path), beta=BETA, **knobs),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        callbacks=[keep],
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    found = [
        (ids[mask.bool()].tolist(), [bool(x) for x in kept[mask.bool()].tolist()])
        for ids, mask, kept in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True)
    ]
    mine = sequences(job.data.rows)
    assert found == mine[0::2] + mine[1::2]
    trainer.train()
    logged = trainer.state.log_history[0]
    same = ["loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/margins", "rewards/accuracies"]
    assert {k: numbers[k] for k in same} == pytest.approx({k: logged[k] for k in same}, rel=1e-4, abs=1e-4)
    assert abs(numbers["rewards/chosen"]) > 1e-3
    assert norm == pytest.approx(logged["grad_norm"], rel=1e-4)
    assert_equal_gradients(grads, keep.grads, 1e-4)


def test_orpo(recipe_of, job_of, tiny_model_folder, adapter, tmp_path):
    """TRL adds a token between prompt and answer or at the end where it may: compared is what it leaves alone."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    job = job_for(recipe_of, job_of, adapter, {"name": "orpo", "beta": BETA}, lora=None)
    numbers, norm, grads = first_step(job)
    keep = Keep()
    trainer = ORPOTrainer(
        model=causal_model(tiny_model_folder, adapter),
        args=ORPOConfig(**{**arguments(tmp_path), "max_length": 200}, beta=BETA),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        callbacks=[keep],
    )
    row = trainer.train_dataset[0]
    assert row["chosen_input_ids"] == sequences(job.data.rows)[0][0]
    trainer.train()
    logged = trainer.state.log_history[0]
    same = ["loss", "nll_loss", "log_odds_ratio", "log_odds_chosen", "logps/chosen", "rewards/margins"]
    assert {k: numbers[k] for k in same} == pytest.approx({k: logged[k] for k in same}, rel=1e-4, abs=1e-4)
    assert norm == pytest.approx(logged["grad_norm"], rel=1e-4)
    assert_equal_gradients(grads, keep.grads, 1e-4)


def test_reward(recipe_of, job_of, tiny_model_folder, tmp_path):
    """With a pad token that no row ends in: with pad = eos TRL reads the token before."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    lora = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
    method = {"name": "reward", "center_rewards_coefficient": 0.05}
    job = job_for(recipe_of, job_of, tiny_model_folder, method, lora=lora)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model_folder, num_labels=1, dtype=torch.float32)
    told = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(model, told)
    model.load_state_dict(job.accelerator.unwrap_model(job.policy).model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model.config.pad_token_id = tokenizer.pad_token_id
    numbers, norm, _ = first_step(job)
    keep = Keep()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**arguments(tmp_path), center_rewards_coefficient=0.05),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
        callbacks=[keep],
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    same = ["loss", "accuracy", "margin", "mean_reward"]
    assert {k: numbers[k] for k in same} == pytest.approx({k: logged[k] for k in same}, rel=1e-4, abs=1e-4)
    assert norm == pytest.approx(norm_of(keep.grads), rel=1e-4)
