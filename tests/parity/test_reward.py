"""The reward model's first step is equal to stock transformers', and what is saved gives the same scores there."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import finetune, said
from tests.parity.stock import (
    EDGES,
    assert_equal_gradients,
    first_step,
    gradients,
    norm_of,
    sequences,
    token_rows,
)

LORA = {"r": 4, "lora_alpha": 8}


def stock_classifier(job: Any, folder: Any, labels: int) -> Any:
    """Stock transformers (and peft) with the very weights that ours starts from."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    ours = job.accelerator.unwrap_model(job.policy).model
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, dtype=torch.float32, attn_implementation="eager"
    )
    if hasattr(ours, "peft_config"):
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **LORA))
    model.load_state_dict(ours.state_dict())
    return model.train()


def stock_scores(model: Any, rows: Any) -> torch.Tensor:
    """Of each sequence alone, at its last token. [R, K]"""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    states = [base.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1] for ids, _ in sequences(rows)]
    return base.score(torch.stack(states))


@pytest.mark.parametrize(
    ("size", "layout", "adapted"), [(6, "auto", True), (2, "auto", True), (4, "padded", True), (3, "auto", False)]
)
def test_first_step_equals_stock_transformers(size, layout, adapted, recipe_of, job_of, tiny_model_folder):
    margins = [0.0, 0.5, -1.0, 2.0, 0.25, 0.1]
    path = recipe_of(
        rows=[{**row, "margin": m} for row, m in zip(token_rows(EDGES), margins, strict=True)],
        lora={**LORA, "init_lora_weights": False} if adapted else None,
        method={"name": "reward", "center_rewards_coefficient": 0.05},
        model={"layout": layout},
        train={
            "per_device_train_batch_size": size, "global_batch_size": 6, "max_grad_norm": 0, "learning_rate": "auto",
            "gradient_checkpointing": size == 2,
        },
    )  # fmt: skip
    job, _ = job_of(path)
    assert (job.padded_because is None) == (layout == "auto")
    model = stock_classifier(job, tiny_model_folder, 1)
    numbers, norm, grads = first_step(job)
    rows = [unit[0] for unit in job.units]
    r = stock_scores(model, rows)[:, 0]
    w, x = r[0::2], r[1::2]
    loss = -F.logsigmoid(w - x - torch.tensor(margins)).mean() + 0.05 * ((w + x) ** 2).mean()
    loss.backward()
    wanted = {
        "loss": loss, "accuracy": (w > x).float().mean(), "margin": (w - x).mean(), "mean_reward": r.mean()
    }  # fmt: skip
    assert {k: numbers[k] for k in wanted} == pytest.approx(
        {k: v.item() for k, v in wanted.items()}, rel=1e-5, abs=1e-5
    )
    theirs = {n: g for n, g in gradients(model).items() if float(g.norm())}
    grads = {n: g for n, g in grads.items() if n in theirs}
    assert norm == pytest.approx(norm_of(theirs), rel=1e-5)
    assert_equal_gradients(grads, theirs, 1e-5)


def test_a_score_for_each_attribute(recipe_of, job_of, tiny_model_folder):
    """Rows say of each of two attributes which answer is better, or nothing."""
    labels = [[1, 1], [1, -1], [0, 1], [-1, 0], [1, 1], [-1, -1]]
    path = recipe_of(
        rows=[{**row, "label": given} for row, given in zip(token_rows(EDGES), labels, strict=True)],
        lora={**LORA, "init_lora_weights": False},
        method={"name": "reward", "num_labels": 2},
        train={
            "per_device_train_batch_size": 4,
            "global_batch_size": 6,
            "max_grad_norm": 0,
            "learning_rate": "auto",
        },
    )
    job, _ = job_of(path)
    model = stock_classifier(job, tiny_model_folder, 2)
    numbers, norm, _ = first_step(job)
    r = stock_scores(model, [unit[0] for unit in job.units])
    y = torch.tensor(labels)
    each = -F.logsigmoid(y * (r[0::2] - r[1::2])) * y.abs()
    loss = (each.sum(1) / y.abs().sum(1)).mean()
    loss.backward()
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert norm == pytest.approx(norm_of(gradients(model)), rel=1e-5)


PAIRS = {
    "messages": [
        {
            "prompt": said("What is two plus two?"),
            "chosen": said(f"It is four, as I said {i}.", first="assistant"),
            "rejected": said("Five.", first="assistant"),
        }
        for i in range(4)
    ],
    "texts": [
        {"prompt": f"And {i}?", "chosen": " It is four, as I said before.", "rejected": " Five."} for i in range(4)
    ],
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_what_is_saved_scores_alike_padded_left_right_or_not(kind, adapted, recipe_of, tiny_model_folder, tmp_path):
    """The tokenizer's pad token is its end of sequence, which every text ends in."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from finetune_cli.engine.reference import located
    from tests.helpers import model_folder

    folder = model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    path = recipe_of(
        rows=PAIRS[kind], method="reward", model={"name_or_path": str(folder)}, lora=LORA if adapted else None,
        train={"learning_rate": "auto"}, eval={"eval_strategy": "no"},
    )  # fmt: skip
    done = finetune("run", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert located(str(run)).adapter == (str(run) if adapted else None)
    tokenizer = AutoTokenizer.from_pretrained(run)
    if adapted:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(run))
        assert "score" in (model.peft_config["default"].modules_to_save or [])
    else:
        model = AutoModelForSequenceClassification.from_pretrained(run, dtype=torch.float32)
        assert model.config.pad_token_id == tokenizer.pad_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.eval()
    texts = [
        row["prompt"] + row[side] + tokenizer.eos_token
        if kind == "texts"
        else tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        for row in PAIRS[kind]
        for side in ("chosen", "rejected")
    ]
    scores = {}
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        scores[side] = model(**batch).logits[:, 0].tolist()
    alone = [model(**tokenizer(t, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item() for t in texts]
    ids = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
    trunk = (model.get_base_model() if adapted else model).model
    head = (model.get_base_model() if adapted else model).score
    at_the_end = [head(trunk(input_ids=torch.tensor([i])).last_hidden_state[0, -1]).item() for i in ids]
    assert scores["left"] == pytest.approx(at_the_end, abs=1e-5)
    assert scores["right"] == pytest.approx(at_the_end, abs=1e-5)
    assert alone == pytest.approx(at_the_end, abs=1e-5)
