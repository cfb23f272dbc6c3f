"""SFT's first step is equal to stock transformers' and to TRL's: loss, gradient norm and every gradient, fp32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_cli.engine.loop import Sums, optimiser_step
from tests.helpers import questions, said

EOS = "<|im_end|>"
PAIRS = [
    {"prompt": "What is two plus two?", "completion": f" It is four.{EOS}"},
    {"prompt": "And three?", "completion": f" Thank you, the answer is five, as I said before.{EOS}"},
    {"prompt": "Here is a longer text with words that come again and again", "completion": f", and again.{EOS}"},
    {"prompt": "user", "completion": f" 日本 🙂 0123456789{EOS}"},
]


def adapter(tiny_model_folder: Path, tmp_path: Path, targets: Any) -> Path:
    """An adapter whose B is not zero: with B = 0 the gradient of A is zero and proves nothing."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def trained_adapter(tiny_model_folder, tmp_path) -> Path:
    return adapter(tiny_model_folder, tmp_path, "all-linear")


def first_step(job: Any) -> tuple[float, float, dict[str, torch.Tensor]]:
    """(loss, gradient norm, gradients by stock name) of our first step."""
    grads: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        role = job.accelerator.unwrap_model(job.policy)
        grads.update({n: p.grad.clone() for n, p in role.model.named_parameters() if p.grad is not None})

    job.optimizer.optimizer.register_step_pre_hook(keep)
    job.policy.train()
    sums = Sums()
    norm, _, _ = optimiser_step(job, 0, measure=False, sums=sums)
    return sums.means(job)["loss"], norm, grads


def assert_equal_gradients(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], relative: float) -> None:
    assert mine.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert float(wanted.norm()) > 0, name
        assert float((mine[name] - wanted).norm() / wanted.norm()) < relative, name


def norm_of(grads: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([g.flatten() for g in grads.values()]).norm())


def stock_of(folder: Path, adapter: Path | None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model if adapter is None else PeftModel.from_pretrained(model, str(adapter), is_trainable=True)


CHAT = [
    *questions(3),
    {
        "messages": [
            {"role": "system", "content": "You add."},
            *said("What is two plus two?", "It is four.", "And three?", "Five."),
        ]
    },
]


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], None], ids=["lora", "lora-head", "full"])
def test_first_step_equals_stock_transformers(
    targets, checkpointing, layout, recipe_of, job_of, tiny_model_folder, tmp_path
):
    """Two batches of two rows by us; by stock transformers one right-padded batch of four, its own loss."""
    start = adapter(tiny_model_folder, tmp_path, targets) if targets else None
    path = recipe_of(
        rows=CHAT,
        lora=None,
        model={"name_or_path": str(start or tiny_model_folder), "layout": layout},
        train={"gradient_checkpointing": checkpointing, "max_grad_norm": 0, "learning_rate": "auto"},
    )
    job, _ = job_of(path)
    assert (job.padded_because is None) == (layout == "auto")
    layers = [module for module in job.policy.modules() if "gradient_checkpointing" in vars(module)]
    assert layers
    assert all(module.gradient_checkpointing == checkpointing for module in layers)
    loss, norm, grads = first_step(job)

    rows = [
        ([*row.prefix, *row.branches[0].ids], [False] * len(row.prefix) + row.branches[0].trained)
        for row in job.data.rows
    ]
    width = max(len(ids) for ids, _ in rows)
    ids_BT, label_BT, mask_BT = (torch.full((4, width), value) for value in (0, -100, 0))
    for b, (ids, trained) in enumerate(rows):
        ids_BT[b, : len(ids)], mask_BT[b, : len(ids)] = torch.tensor(ids), 1
        label_BT[b, : len(ids)] = torch.tensor([i if t else -100 for i, t in zip(ids, trained, strict=True)])
    assert int((label_BT != -100).sum()) == sum(row.targets for row in job.data.rows)

    model = stock_of(tiny_model_folder, start).train()
    wanted = model(input_ids=ids_BT, attention_mask=mask_BT, labels=label_BT).loss
    wanted.backward()
    theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert norm == pytest.approx(norm_of(theirs), rel=1e-5)
    assert_equal_gradients(grads, theirs, 1e-5)


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("targets", ["all-linear", None], ids=["lora", "full"])
def test_a_step_in_bfloat16_is_near_that_in_float32(targets, layout, recipe_of, job_of, tiny_model_folder, tmp_path):
    """Weights that are trained stay float32 and are multiplied in bfloat16; rounding is all that differs."""
    start = adapter(tiny_model_folder, tmp_path, targets) if targets else tiny_model_folder
    model, train = {"name_or_path": str(start), "layout": layout}, {"max_grad_norm": 0, "learning_rate": "auto"}
    steps = []
    for precision in ("fp32", "bf16"):
        path = recipe_of(rows=CHAT, lora=None, model=model, train={**train, "precision": precision})
        steps.append(first_step(job_of(path)[0]))
        AcceleratorState._reset_state(reset_partial_state=True)
    (loss, _, grads), (low_loss, _, low_grads) = steps
    assert {g.dtype for g in low_grads.values()} == {torch.float32}
    assert low_loss == pytest.approx(loss, rel=0.01)
    assert_equal_gradients(low_grads, grads, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_first_step_equals_trl(adapted, recipe_of, job_of, tiny_model_folder, trained_adapter, tmp_path):
    """TRL 1.16's SFTTrainer on the same text; first its collator's ids and masks, then its first step."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    path = recipe_of(
        rows=PAIRS,
        lora=None,
        model={"name_or_path": str(trained_adapter if adapted else tiny_model_folder)},
        train={"max_grad_norm": 0, "learning_rate": "auto"},
    )
    job, _ = job_of(path)
    loss, norm, grads = first_step(job)

    theirs: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            theirs.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = SFTTrainer(
        model=stock_of(tiny_model_folder, trained_adapter if adapted else None),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, per_device_train_batch_size=4, max_steps=1,
            logging_steps=1, max_grad_norm=1e9, report_to=[], save_strategy="no", max_length=None,
            gradient_checkpointing=False, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_folder),
        callbacks=[Keep()],
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    found = [
        (ids[mask.bool()].tolist(), (labels[mask.bool()] != -100).tolist())
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    assert found == [(row.branches[0].ids, row.branches[0].trained) for row in job.data.rows]
    trainer.train()
    logged = trainer.state.log_history[0]
    assert loss == pytest.approx(logged["loss"], rel=1e-4)
    assert norm == pytest.approx(logged["grad_norm"], rel=1e-4)
    assert_equal_gradients(grads, theirs, 1e-4)
