"""Scores against log_softmax in float64, chunk by chunk, for every kind of head."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune_cli.engine import score as module
from finetune_cli.engine.packed import Packed, able
from finetune_cli.engine.score import Head, score

N, D, V = 40, 12, 57


def head_of(kind: str, scale: float, softcap: float | None, bias: bool) -> Head:
    torch.manual_seed(0)
    layer = nn.Linear(D, V, bias=bias)
    layer.requires_grad_(kind == "trained")
    return Head(layer, scale, softcap)


def wanted(head: Head, h_ND, label_N):
    z = F.linear(h_ND, head.layer.weight.double(), None if head.bias is None else head.bias.double()) * head.scale
    if head.softcap:
        z = torch.tanh(z / head.softcap) * head.softcap
    every = torch.log_softmax(z, -1)
    entropy = -(every.exp() * every).sum(-1)
    return every.gather(1, label_N[:, None])[:, 0], (z.argmax(-1) == label_N).float(), entropy


@pytest.mark.parametrize("kind", ["frozen", "trained"])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.25, None, True), (0.5, 3.0, False)])
def test_scores_and_gradients(monkeypatch, kind, scale, softcap, bias):
    monkeypatch.setitem(module.CHUNK_LOGITS, "cpu", 16 * V)  # three chunks
    head = head_of(kind, scale, softcap, bias)
    label_N, weights = torch.randint(0, V, (N,)), torch.randn(N)
    h = torch.randn(N, D, requires_grad=True)
    h64 = h.detach().double().requires_grad_()
    logps, correct, entropy = score(head, h, label_N, measure=True)
    logps64, correct64, entropy64 = wanted(head, h64, label_N)
    torch.testing.assert_close(logps.double(), logps64, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), entropy64, rtol=1e-5, atol=1e-5)
    assert correct.tolist() == correct64.tolist()
    assert not entropy.requires_grad or entropy.grad_fn is None or kind == "trained"
    (logps * weights).sum().backward()
    (logps64 * weights).sum().backward()
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-4, atol=1e-6)
    if kind == "trained":
        assert head.layer.weight.grad is not None


def test_a_sure_token_keeps_its_small_gradient_in_bfloat16():
    """p = 0.9995 rounds to 1 in bfloat16; the gradient 1 - p must not be lost to it."""
    layer = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    layer.weight.data = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    layer.requires_grad_(False)
    h = torch.tensor([[7.625]], dtype=torch.bfloat16, requires_grad=True)  # exact in bfloat16
    logps, _, _ = score(Head(layer), h, torch.tensor([0]), measure=False)
    logps.sum().backward()
    rest = 1 / (1 + math.exp(7.625))
    assert h.grad.item() == pytest.approx(rest, rel=0.01)


def test_nothing_to_score_is_no_error():
    logps, _, _ = score(
        head_of("frozen", 1.0, None, False), torch.zeros(0, D), torch.zeros(0, dtype=torch.long), measure=False
    )
    assert logps.shape == (0,)
    assert float(logps.sum()) == 0.0


def test_a_head_with_adapters_is_not_taken_for_a_plain_one():
    class Adapted(nn.Linear):
        pass

    layer = Adapted(D, V)
    layer.requires_grad_(False)
    assert Head(layer).frozen_weight is None
    assert Head(head_of("frozen", 1.0, None, False).layer).frozen_weight is not None
    assert Head(head_of("trained", 1.0, None, False).layer).frozen_weight is None


@pytest.mark.skipif(not able(), reason="this processor has no bfloat16 products of oneDNN")
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, None, False), (0.5, 3.0, True)])
def test_copies_of_the_heads_weight_change_no_bit(monkeypatch, both, scale, softcap, bias):
    monkeypatch.setitem(module.CHUNK_LOGITS, "cpu", 16 * V)
    head = head_of("frozen", scale, softcap, bias)
    head.layer.bfloat16()
    label_N, h_ND = torch.randint(0, V, (N,)), torch.randn(N, D).bfloat16()
    found = []
    for copied in (False, True):
        if copied:
            head.layer.__dict__["packed"] = Packed(head.layer.weight, both=both)
        h = h_ND.clone().requires_grad_()
        scored = score(head, h, label_N, measure=True)
        scored[0].sum().backward()
        found.append([*scored, h.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    head.layer.weight.data = head.layer.weight.data * 2  # the copies are of another weight now
    assert not torch.equal(score(head, h_ND, label_N, measure=False)[0], found[0][0])
