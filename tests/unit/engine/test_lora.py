"""Adapters as we compute them against peft's own layers: equal, and out of the way where they are not plain."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from finetune_cli.engine.lora import FEW, Fast, drawing, hasten


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.second = nn.Linear(10, 5, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def pair(**config):
    """(peft's, ours) with the same weights; B is not zero."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=3, lora_alpha=5, target_modules=["first", "second"], **config))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    fast = copy.deepcopy(model)
    hasten(fast)
    return model, fast


def both(models, x, *, half=False):
    """(output, gradients by name) of each."""
    results = []
    for model in models:
        own = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y = model(own)
        y.float().square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((y, {**grads, "x": own.grad}))
    return results


def assert_same(results, *, relative):
    (y, grads), (fast_y, fast_grads) = results
    assert y.dtype == fast_y.dtype
    torch.testing.assert_close(fast_y, y, rtol=relative, atol=relative)
    assert grads.keys() == fast_grads.keys()
    for name, wanted in grads.items():
        assert fast_grads[name].dtype == wanted.dtype, name
        assert float((fast_grads[name] - wanted).norm() / wanted.norm()) < relative, name


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_equal_in_float32(shape):
    models = pair()
    assert isinstance(models[1].base_model.model.first, Fast)
    assert_same(both(models, torch.randn(shape)), relative=1e-5)


def test_equal_under_autocast_as_far_as_bfloat16_goes():
    models = pair()
    for model in models:
        for name, p in model.named_parameters():
            p.data = p.data if "lora" in name else p.data.bfloat16()
    assert_same(both(models, torch.randn(7, 6).bfloat16(), half=True), relative=2e-2)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_what_is_not_plain_is_peft_s(config):
    models = pair(**config)
    results = []
    for model in models:
        torch.manual_seed(1)
        results += both([model], torch.ones(4, 6))
    assert_same(results, relative=1e-6)


def test_dropout_is_only_in_the_way_while_training():
    _, fast = pair(lora_dropout=0.5)
    layer = fast.base_model.model.first
    assert layer._plain({}) is None
    fast.eval()
    assert layer._plain({}) == "default"


def test_disabled_merged_and_two_adapters():
    model, fast = pair()
    x = torch.randn(4, 6)
    with model.disable_adapter(), fast.disable_adapter():
        assert torch.equal(model(x), fast(x))
        assert not torch.equal(fast(x), pair()[0](x))
    for each in (model, fast):
        each.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    other = {n: p.data for n, p in model.named_parameters() if "other" in n}
    for name, p in fast.named_parameters():
        p.data = other.get(name, p.data)
    for each in (model, fast):
        each.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(fast(x), model(x))
    for each in (model, fast):
        each.merge_adapter()
    torch.testing.assert_close(fast(x), model(x))


def test_a_trained_base_layer_is_left_alone():
    model, _ = pair()
    model.base_model.model.first.base_layer.weight.requires_grad_()
    hasten(model)
    assert type(model.base_model.model.first) is LoraLinear
    assert isinstance(model.base_model.model.second, Fast)


def test_while_answers_are_drawn_it_is_the_same_without_a_graph():
    model, fast = pair()
    x = torch.randn(4, 1, 6)
    with drawing(fast), torch.no_grad():
        assert "forward" in vars(fast.base_model.model.first)
        torch.testing.assert_close(fast(x), model(x))
    assert "forward" not in vars(fast.base_model.model.first)
    assert_same(both((model, fast), x), relative=1e-5)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_drawn_in_bfloat16_it_is_as_near_to_the_truth(rows):
    _, fast = pair()
    exact = copy.deepcopy(fast).double()
    half = fast.bfloat16()
    x = torch.randn(rows, 6).bfloat16()
    for each in (exact, half):  # the same numbers on both sides
        each.load_state_dict(half.state_dict())
    with torch.no_grad(), drawing(half):
        torch.testing.assert_close(half(x).double(), exact(x.double()), rtol=0.03, atol=0.03)


def test_a_model_may_add_to_what_a_layer_gives_in_place():
    class InPlace(Net):
        def forward(self, x):
            h = self.first(x)
            h += 1
            return self.second(h)

    torch.manual_seed(0)
    model = get_peft_model(InPlace(), LoraConfig(r=3, target_modules=["first", "second"]))
    fast = copy.deepcopy(model)
    hasten(fast)
    assert any(isinstance(module, Fast) for module in fast.modules())
    x = torch.randn(2, 3, 6)
    (out, grads), (mine, own) = both((model, fast), x)
    torch.testing.assert_close(mine, out)
    torch.testing.assert_close(own, grads)
