"""DPO's losses with numbers worked out by hand, its reference, and what is refused."""

import math
from typing import Any, ClassVar

import pytest
import torch
from pydantic import ValidationError

from finetune_cli.data.batches import silent, tree
from finetune_cli.methods.base import Start
from finetune_cli.methods.dpo import Dpo, aot, discopop, divergence, ipo, robust, sigmoid, sppo_hard
from finetune_cli.types import Branch, Counts, Row, Scores

PAIR = Row([1, 2], (Branch([3, 4], [True, True], "chosen"), Branch([5], [True], "rejected")))
BATCH = tree([PAIR])
FULL = Start(trains="all weights", neutral=False, base=None, passes=1)
FRESH = Start(trains="fresh adapter", neutral=True, base="org/base", passes=1)
BROUGHT = Start(trains="adapter", neutral=False, base="org/base", passes=1)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def loss_of(method: Dpo, policy: Any, reference: Any, *, batch: Any = BATCH, counts: Any = None) -> Any:
    logps_N = t(*policy).requires_grad_()
    said = {"policy": Scores(logps_N, batch.owner_N), "reference": Scores(t(*reference), batch.owner_N)}
    loss = method.loss(batch, lambda role, _: said[role], counts or batch.counts)
    loss.total.backward()
    return loss, logps_N.grad.tolist()


def test_sigmoid_of_a_margin_of_two_times_beta():
    """lp_w - ref_w = (-1 - 2) - (-2 - 2) = 1, lp_l - ref_l = -3 - -2 = -1: u = 0.5 (1 - -1) = 1."""
    loss, grad = loss_of(Dpo(beta=0.5), [-1.0, -2.0, -3.0], [-2.0, -2.0, -2.0])
    assert loss.total.item() == pytest.approx(math.log(1 + math.exp(-1)))
    slope = 0.5 / (1 + math.e)  # beta sigmoid(-u)
    assert grad == pytest.approx([-slope, -slope, slope])  # chosen up, rejected down
    sums = {name: float(total) for name, (total, _) in loss.metrics.items()}
    assert sums["rewards/chosen"] == 0.5
    assert sums["rewards/margins"] == 1.0
    assert sums["rewards/accuracies"] == 1.0
    assert sums["logps/chosen"] == -3.0


def test_identical_policies_give_log_2():
    loss, _ = loss_of(Dpo(), [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0])
    assert loss.total.item() == pytest.approx(math.log(2))
    assert float(loss.metrics["rewards/accuracies"][0]) == 0  # equal is not better


def test_a_share_of_the_step_and_a_pair_that_only_keeps_step():
    loss, _ = loss_of(Dpo(), [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], counts=Counts(8, 99, {"chosen": 50}))
    assert loss.total.item() == pytest.approx(math.log(2) / 8)
    quiet = tree([silent(PAIR)])
    loss, _ = loss_of(Dpo(), [], [], batch=quiet, counts=Counts(8, 99, {"chosen": 50}))
    assert loss.total.item() == 0
    assert all(float(total) == 0 and count == 0 for total, count in loss.metrics.values())


def test_the_likelihood_is_a_mean_over_the_tokens_of_the_step():
    method = Dpo(loss_type=["sft"])
    loss, grad = loss_of(method, [-1.0, -2.0, -3.0], [0.0, 0.0, 0.0], counts=Counts(4, 99, {"chosen": 10}))
    assert loss.total.item() == pytest.approx(3 / 10)
    assert grad == pytest.approx([-0.1, -0.1, 0.0])


def test_known_log_probabilities_are_used_and_the_reference_is_not_asked():
    row = Row(PAIR.prefix, PAIR.branches, extra={"ref_chosen_logps": -4.0, "ref_rejected_logps": -2.0})
    batch = tree([row])

    def models(role: str, _: Any) -> Scores:
        assert role == "policy"
        return Scores(t(-1.0, -2.0, -3.0), batch.owner_N)

    assert Dpo(beta=0.5).loss(batch, models, batch.counts).total.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_ld_alpha_weighs_the_tokens_beyond_the_shorter_answer():
    scores = Scores(t(-1.0, -2.0, -3.0), BATCH.owner_N)
    assert Dpo(ld_alpha=0.25).sequence_logps(scores, BATCH).tolist() == [[-1.5, -3.0]]
    assert Dpo(ld_alpha=0.0).sequence_logps(scores, BATCH).tolist() == [[-1.0, -3.0]]
    assert Dpo().sequence_logps(scores, BATCH).tolist() == [[-3.0, -3.0]]


def test_wpo_multiplies_by_the_probability_of_both_answers_under_the_policy():
    """exp(mean(-1 - -0.5, -2 - -0.5) + (-3 - -1)) = exp(-1 - 2)"""
    scores = Scores(t(-1.0, -2.0, -3.0), BATCH.owner_N, log_agreement_N=t(-0.5, -0.5, -1.0))
    said = {"policy": scores, "reference": Scores(scores.logps_N, BATCH.owner_N)}
    loss = Dpo(use_weighting=True).loss(BATCH, lambda role, _: said[role], BATCH.counts)
    assert loss.total.item() == pytest.approx(math.log(2) * math.exp(-3))


def test_losses_by_hand():
    assert sigmoid(t(0.0), 0.3).item() == pytest.approx(math.log(2))  # eps moves nothing at u = 0
    assert robust(t(0.0), 0.25).item() == pytest.approx(math.log(2))  # (-0.75 + 0.25) log(1/2) / 0.5
    assert ipo(t(4.0), t(2.0), t(2.0), t(1.0), 0.5).item() == 1.0  # (2 - 2 - 1)^2
    assert sppo_hard(t(2.0), t(-1.0), 0.25).item() == 1.0  # (2 - 2)^2 + (-1 + 2)^2
    assert discopop(t(0.0), 0.05).item() == pytest.approx((math.log(2) + 1) / 2)
    assert divergence(t(0.0), "forward_kl", 0).item() == 0
    assert divergence(t(0.0), "js_divergence", 0).item() == pytest.approx(0)
    assert divergence(t(math.log(3)), "alpha_divergence", 3.0).item() == pytest.approx(4)  # (3^2 - 1) / 2
    assert divergence(t(2.0), "alpha_divergence", 1.0).item() == 2  # the limit is reverse KL


def test_aot_is_the_sorted_and_of_one_pair_the_plain_loss():
    assert aot(t(3.0, 1.0), t(0.0, 2.0), 1.0, 0.0).tolist() == sigmoid(t(1.0, 1.0), 0.0).tolist()
    assert aot(t(3.0), t(1.0), 1.0, 0.1).item() == sigmoid(t(2.0), 0.1).item()


class TestReference:
    path: ClassVar = "org/other"

    @pytest.mark.parametrize(
        ("knobs", "start", "kind", "precompute", "equal"),
        [
            ({}, FRESH, "adapter off", False, True),
            ({}, BROUGHT, "start", False, True),
            ({}, FULL, "start", True, True),
            ({"ref_model": "start"}, BROUGHT, "start", False, True),
            ({"ref_model": "org/base"}, BROUGHT, "adapter off", False, False),
            ({"ref_model": "org/base"}, FRESH, "adapter off", False, True),
            ({"ref_model": "org/other"}, FRESH, "model", True, False),
            ({"sync_ref_model": True}, FULL, "start", False, True),
            ({"precompute_ref_log_probs": True}, FRESH, "adapter off", True, True),
            ({"precompute_ref_log_probs": False}, FULL, "start", False, True),
        ],
    )
    def test_which(self, knobs, start, kind, precompute, equal):
        found = Dpo(**knobs).reference(start)
        assert (found.kind, found.precompute, found.starts_equal) == (kind, precompute, equal)

    def test_rows_that_are_seen_again_are_asked_of_once(self):
        again = Start(trains="fresh adapter", neutral=True, base="b", passes=3)
        assert Dpo().reference(again).precompute
        assert "3 times" in Dpo().reference(again).about


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"loss_type": ["exo_pair"]}, "label_smoothing"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}, "loss_weights"),
        ({"loss_type": ["nca_pair"], "f_divergence_type": "forward_kl"}, "nca_pair"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": True}, "precompute"),
        ({"sync_ref_model": True, "ref_model": "org/x"}, "ref_model"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
    ],
)
def test_refused(knobs, said):
    with pytest.raises(ValidationError, match=said):
        Dpo(**knobs)


@pytest.mark.parametrize("far", [-200.0, -89.0, 200.0])
def test_what_is_far_off_stays_a_number(far):
    """e^88 is the last of float32."""
    for made in (lambda a: divergence(a, "forward_kl", 1.0), lambda a: discopop(a, 0.05)):
        a = torch.tensor([far], requires_grad=True)
        value = made(a)
        value.sum().backward()
        assert value.isfinite().all()
        assert a.grad is not None
        assert a.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["aot", "aot_unpaired"])
def test_sorted_terms_belong_to_no_pair_that_could_be_weighed(kind):
    with pytest.raises(ValidationError, match="they belong to none"):
        Dpo(loss_type=[kind], use_weighting=True)
