"""DPO's first step is equal to stock transformers' for every loss, and to TRL's: loss, log-probabilities, margins,
gradient norm and every gradient, fp32, from an adapter whose B is not zero."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

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

BETA = 0.3
CASES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid smoothed": {"loss_type": "sigmoid", "label_smoothing": 0.1},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.05},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.25},  # the default 0.05 multiplies the rounding of u by 20
    "sft": {},
    "sigmoid_norm": {},
    "forward_kl": {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    "js_divergence": {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
    "alpha_divergence": {"loss_type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ld_alpha": {"loss_type": "sigmoid", "ld_alpha": 0.4},
    "wpo": {"loss_type": "sigmoid", "use_weighting": True},
    "three": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
}


def by_the_formulas(model: Any, reference: Any, found: Any, knobs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Loss and log-probabilities from all logits, as LOSSES in the papers, written out one by one."""
    logps, mask, _ = token_logps(model, found)
    with torch.no_grad():
        ref_logps, _, _ = token_logps(reference, found)
    n = mask.sum(1)
    shorter = torch.minimum(n[0::2], n[1::2]).repeat_interleave(2)
    weight = torch.where(mask.cumsum(1) <= shorter[:, None], 1.0, knobs.get("ld_alpha", 1.0)) * mask
    lp, ref = (logps * weight).sum(1), (ref_logps * weight).sum(1)
    lp_w, lp_l, ref_w, ref_l, n_w, n_l = lp[0::2], lp[1::2], ref[0::2], ref[1::2], n[0::2], n[1::2]
    a_w, a_l = lp_w - ref_w, lp_l - ref_l
    alpha = knobs.get("f_alpha_divergence_coef", 0.5)
    s = {
        "reverse_kl": lambda r: r,
        "forward_kl": lambda r: 1 - torch.exp(-r),
        "js_divergence": lambda r: math.log(2) + F.logsigmoid(r),
        "alpha_divergence": lambda r: (torch.exp((alpha - 1) * r) - 1) / (alpha - 1),
    }[knobs.get("f_divergence_type", "reverse_kl")]
    s_w, s_l, eps = s(a_w), s(a_l), knobs.get("label_smoothing", 0.0)
    u, r_w, r_l = BETA * (s_w - s_l), BETA * a_w, BETA * a_l
    ls, sg = F.logsigmoid, torch.sigmoid
    m = sg(u / knobs.get("discopop_tau", 0.05))
    paired = torch.sort(lp_w - lp_l).values - torch.sort(ref_w - ref_l).values
    unpaired = torch.sort(a_w).values - torch.sort(a_l).values
    chosen = logps[0::2][mask[0::2]]
    each: dict[str, Any] = {
        "sigmoid": lambda: -(1 - eps) * ls(u) - eps * ls(-u),
        "hinge": lambda: torch.relu(1 - u),
        "ipo": lambda: (s_w / n_w - s_l / n_l - 1 / (2 * BETA)) ** 2,
        "exo_pair": lambda: sg(u) * (ls(u) - math.log(1 - eps)) + sg(-u) * (ls(-u) - math.log(eps)),
        "nca_pair": lambda: -ls(r_w) - 0.5 * ls(-r_w) - 0.5 * ls(-r_l),
        "robust": lambda: (-(1 - eps) * ls(u) + eps * ls(-u)) / (1 - 2 * eps),
        "bco_pair": lambda: -ls(r_w) - ls(-r_l),
        "sppo_hard": lambda: (a_w - 0.5 / BETA) ** 2 + (a_l + 0.5 / BETA) ** 2,
        "aot": lambda: -(1 - eps) * ls(BETA * paired) - eps * ls(-BETA * paired),
        "aot_unpaired": lambda: -(1 - eps) * ls(BETA * unpaired) - eps * ls(-BETA * unpaired),
        "apo_zero": lambda: 1 - sg(r_w) + sg(r_l),
        "apo_down": lambda: sg(r_w) + 1 - sg(r_w - r_l),
        "discopop": lambda: -ls(u) * (1 - m) + torch.exp(-u) * m,
        "sft": lambda: -chosen.mean().expand(len(n_w)),
        "sigmoid_norm": lambda: -ls(BETA * (s_w / n_w - s_l / n_l)),
    }
    weights = torch.ones(len(n_w))
    if knobs.get("use_weighting"):
        agreement = log_agreements(model, found)
        mean = [float((logps[i] * mask[i]).sum() - agreement[i]) / int(n[i]) for i in range(len(n))]
        weights = torch.tensor([math.exp(a + b) for a, b in zip(mean[0::2], mean[1::2], strict=True)])
    kinds = knobs["loss_type"] if isinstance(knobs["loss_type"], list) else [knobs["loss_type"]]
    shares = knobs.get("loss_weights", [1.0] * len(kinds))
    loss = sum(share * (each[kind]() * weights).mean() for kind, share in zip(kinds, shares, strict=True))
    numbers = {
        "logps/chosen": float(lp_w.mean()),
        "logps/rejected": float(lp_l.mean()),
        "rewards/chosen": float(r_w.mean()),
        "rewards/rejected": float(r_l.mean()),
        "rewards/margins": float((r_w - r_l).mean()),
        "rewards/accuracies": float((r_w > r_l).float().mean()),
    }
    assert isinstance(loss, Tensor)
    return loss, numbers


@torch.no_grad()
def log_agreements(model: Any, found: Any) -> list[float]:
    """Sum over the trained tokens of each sequence, alone, of log sum_v p_v^2."""
    sums = []
    for ids, trained in found:
        p = model(input_ids=torch.tensor([ids])).logits[0, :-1].softmax(-1)
        sums.append(float((p**2).sum(-1).log()[torch.tensor(trained[1:])].sum()))
    return sums


@pytest.fixture(scope="module")
def adapter(tiny_model_folder, tmp_path_factory):
    return adapter_folder(tiny_model_folder, tmp_path_factory.mktemp("adapter") / "sft")


def recipe_for(recipe_of, start: Any, knobs: dict[str, Any], *, rows: Any = None, size: int = 6, **more: Any) -> Any:
    train = {"per_device_train_batch_size": size, "global_batch_size": 6, "max_grad_norm": 0, "learning_rate": "auto"}
    more["train"] = {**train, **more.pop("train", {})}
    more["model"] = {"name_or_path": str(start), **more.pop("model", {})}
    return recipe_of(
        rows=token_rows(EDGES) if rows is None else rows, lora=more.pop("lora", None),
        method={"name": "dpo", "beta": BETA, **knobs}, **more,
    )  # fmt: skip


def compare(job: Any, model: Any, reference: Any, knobs: dict[str, Any]) -> None:
    numbers, norm, grads = first_step(job)
    loss, wanted = by_the_formulas(model, reference, sequences([u[0] for u in job.units]), knobs)
    loss.backward()
    theirs = gradients(model)
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {k: numbers[k] for k in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert abs(wanted["rewards/chosen"]) > 1e-2
    assert norm == pytest.approx(norm_of(theirs), rel=1e-5)
    assert_equal_gradients(grads, theirs, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_loss_equals_its_formula_on_stock_transformers(name, recipe_of, job_of, tiny_model_folder, adapter):
    """Policy: the starting adapter. Reference: its base, which is the same weights with the adapter off."""
    knobs = {"loss_type": name, **CASES[name]}
    told = {**knobs, "ref_model": str(tiny_model_folder)}
    job, _ = job_of(recipe_for(recipe_of, adapter, told))
    assert job.padded_because is None
    assert job.reference_report["kind"] == "adapter off"
    compare(job, causal_model(tiny_model_folder, adapter).train(), causal_model(tiny_model_folder), knobs)


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("precomputed", [False, True], ids=["live", "precomputed"])
def test_layouts_checkpointing_and_references_are_equal(
    layout, checkpointing, precomputed, recipe_of, job_of, tiny_model_folder, adapter
):
    knobs = {"loss_type": "sigmoid"}
    told = {**knobs, "ref_model": str(tiny_model_folder), "precompute_ref_log_probs": precomputed}
    path = recipe_for(
        recipe_of, adapter, told, size=2, model={"layout": layout}, train={"gradient_checkpointing": checkpointing}
    )
    job, _ = job_of(path)
    assert (job.padded_because is None) == (layout == "auto")
    assert (job.reference is None) == precomputed
    compare(job, causal_model(tiny_model_folder, adapter).train(), causal_model(tiny_model_folder), knobs)


@pytest.mark.parametrize("precomputed", [False, True], ids=["live", "precomputed"])
def test_another_model_as_reference(precomputed, recipe_of, job_of, tiny_model_folder, adapter, tmp_path):
    """Full fine-tuning against another adapter on the same base."""
    other = adapter_folder(tiny_model_folder, tmp_path / "other", seed=11)
    knobs = {"loss_type": "sigmoid"}
    told = {**knobs, "ref_model": str(other), "precompute_ref_log_probs": precomputed}
    job, _ = job_of(recipe_for(recipe_of, tiny_model_folder, told, size=3))
    assert job.reference_report["kind"] == "model"
    compare(job, causal_model(tiny_model_folder).train(), causal_model(tiny_model_folder, other), knobs)
