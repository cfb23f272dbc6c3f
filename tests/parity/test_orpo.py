"""ORPO's first step is equal to stock transformers' and to TRL's: loss and its parts, gradient norm, every gradient."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from finetune_cli.methods.orpo import log1mexp
from tests.parity.stock import (
    EDGES,
    adapter_folder,
    assert_equal_gradients,
    causal_model,
    first_step,
    gradients,
    norm_of,
    sequences,
    token_logps,
    token_rows,
)

BETA = 0.4


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory):
    return adapter_folder(tiny_model_folder, tmp_path_factory.mktemp("adapter") / "sft")


def job_for(recipe_of, job_of, start: Any, *, size: int, layout: str = "auto", checkpointing: bool = False) -> Any:
    path = recipe_of(
        rows=token_rows(EDGES),
        lora=None,
        method={"name": "orpo", "beta": BETA},
        model={"name_or_path": str(start), "layout": layout},
        train={
            "per_device_train_batch_size": size, "global_batch_size": 6, "max_grad_norm": 0, "learning_rate": "auto",
            "gradient_checkpointing": checkpointing,
        },
    )  # fmt: skip
    return job_of(path)[0]


@pytest.mark.parametrize(
    ("size", "layout", "checkpointing"), [(6, "auto", False), (2, "auto", True), (4, "padded", False)]
)
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_first_step_equals_stock_transformers(
    adapted, size, layout, checkpointing, recipe_of, job_of, tiny_model_folder, adapter
):
    """All at once, 3 x 2 and 4 + 2 pairs; NLL over every token of prompt and chosen answer, of all 6 together."""
    start = adapter if adapted else tiny_model_folder
    job = job_for(recipe_of, job_of, start, size=size, layout=layout, checkpointing=checkpointing)
    assert (job.padded_because is None) == (layout == "auto")
    numbers, norm, grads = first_step(job)

    model = causal_model(tiny_model_folder, adapter if adapted else None).train()
    logps, trained, real = token_logps(model, sequences([unit[0] for unit in job.units]))
    mean = (logps * trained).sum(1) / trained.sum(1)
    w, x = mean[0::2], mean[1::2]
    odds = (w - x) - (torch.log(1 - torch.exp(w)) - torch.log(1 - torch.exp(x)))
    nll = -logps[0::2][real[0::2]].mean()
    loss = nll - BETA * F.logsigmoid(odds).mean()
    loss.backward()
    wanted = {
        "nll_loss": nll,
        "log_odds_ratio": F.logsigmoid(odds).mean(),
        "log_odds_chosen": odds.mean(),
        "logps/chosen": w.mean(),
        "logps/rejected": x.mean(),
        "rewards/chosen": BETA * w.mean(),
        "rewards/margins": BETA * (w - x).mean(),
        "rewards/accuracies": (w > x).float().mean(),
        "loss": loss,
    }
    assert {k: numbers[k] for k in wanted} == pytest.approx(
        {k: v.item() for k, v in wanted.items()}, rel=1e-5, abs=1e-5
    )
    theirs = gradients(model)
    assert norm == pytest.approx(norm_of(theirs), rel=1e-5)
    assert_equal_gradients(grads, theirs, 1e-5)


def test_log1mexp_is_exact_at_both_ends_and_has_finite_gradients():
    x = torch.tensor([-40.0, -1.0, -0.5, -1e-6, 0.0], requires_grad=True)
    y = log1mexp(x)
    wanted = [-math.exp(-40), math.log(-math.expm1(-1)), math.log(-math.expm1(-0.5)), math.log(-math.expm1(-1e-6))]
    assert y[:4].tolist() == pytest.approx(wanted, rel=1e-5)
    y.sum().backward()
    assert bool(x.grad.isfinite().all())
    assert x.grad[1].item() == pytest.approx(-math.exp(-1) / -math.expm1(-1), rel=1e-5)
