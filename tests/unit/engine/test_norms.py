"""Frozen norms as one node: the same numbers, the same gradients, and stock where they are not the same thing."""

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from finetune_cli.engine import norms


class ShiftedRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return super().forward(x) + 0.25


def pair(kind, dtype=torch.float32, *, frozen=True):
    """A norm as it is, and its copy that was hastened."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        norm = kind(12, eps=1e-3).to(dtype)
        nn.init.normal_(norm.weight)
        made.append(norm.requires_grad_(not frozen))
    norms.hasten(made[1])
    return made


def through(norm, x):
    x = x.detach().requires_grad_()
    y = norm(x)
    return y.detach(), torch.autograd.grad((y.float() * torch.linspace(-1, 2, 12)).sum(), x)[0]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Gemma3RMSNorm])
def test_the_same_numbers_and_gradients(kind):
    stock, fast = pair(kind)
    assert type(fast) is not type(stock)
    assert isinstance(fast, kind)
    x = torch.randn(2, 5, 12) * 3 + 1
    (y, dx), (y_fast, dx_fast) = through(stock, x), through(fast, x)
    assert torch.equal(y, y_fast)
    torch.testing.assert_close(dx_fast, dx, rtol=1e-5, atol=1e-6)
    assert "NormedBackward" in type(fast(x.requires_grad_()).grad_fn).__name__


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_bfloat16_is_as_near_to_the_truth(kind):
    stock, fast = pair(kind, torch.bfloat16)
    x = (torch.randn(64, 12) * 3 + 1).bfloat16()
    exact = through(_wide(stock), x.float())
    (y, dx), (y_fast, dx_fast) = through(stock, x), through(fast, x)
    assert torch.equal(y, y_fast)
    off, off_fast = ((d.float() - exact[1]).norm() for d in (dx, dx_fast))
    assert off_fast < 1.1 * off


def _wide(norm):
    kept = type(norm)(12, eps=1e-3)
    kept.load_state_dict({name: value.float() for name, value in norm.state_dict().items()})
    return kept.requires_grad_(False)


def test_another_formula_is_left_alone():
    stock, fast = pair(ShiftedRMSNorm)
    assert type(fast) is type(stock)


def test_a_norm_that_learns_is_left_alone():
    stock, fast = pair(LlamaRMSNorm, frozen=False)
    assert type(fast) is type(stock)


def test_a_norm_that_learns_later_gets_its_gradient():
    _, fast = pair(LlamaRMSNorm)
    fast.weight.requires_grad_(True)
    fast(torch.randn(3, 12, requires_grad=True)).sum().backward()
    assert fast.weight.grad is not None


def test_another_format_than_the_weights_is_computed_as_before():
    stock, fast = pair(LlamaRMSNorm)
    x = torch.randn(3, 12).bfloat16().requires_grad_()
    assert fast(x).dtype == stock(x).dtype == torch.float32


def test_a_norm_with_a_gate_is_left_alone():
    class GatedRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(4), requires_grad=False), 1e-6

        def forward(self, x, gate):
            return x * gate

    norm = GatedRMSNorm()
    norms.hasten(torch.nn.Sequential(norm))
    assert type(norm) is GatedRMSNorm
