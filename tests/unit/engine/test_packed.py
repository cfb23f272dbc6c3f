"""Frozen weights laid out for the processor's products: the same numbers, and only while the weight is the same."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune_cli.engine.generate import whole_states
from finetune_cli.engine.lora import drawing, hasten
from finetune_cli.engine.packed import able, fit, pack, pack_head, packed

pytestmark = pytest.mark.skipif(not able(), reason="this processor has no bfloat16 products of oneDNN")
ROOM = 2**20


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def models(**config):
    """(without copies, with them) of one adapted model whose B is not zero."""
    torch.manual_seed(0)
    wanted = LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False, **config)
    model = get_peft_model(Net().bfloat16(), wanted, autocast_adapter_dtype=True)
    quick = copy.deepcopy(model)
    hasten(model)
    hasten(quick, room=ROOM)
    return model, quick


def layers(model):
    return [model.base_model.model.first.base_layer, model.base_model.model.second.base_layer]


def run(model, x):
    own = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(own)
    y.float().square().sum().backward()
    return [y, own.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def all_equal(some, others):
    return all(torch.equal(x, y) for x, y in zip(some, others, strict=True))


@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 5, 32), (300, 32)])
def test_the_same_bits_forward_and_backward(shape):
    plain, quick = models()
    assert all(packed(layer, torch.bfloat16).backward is not None for layer in layers(quick))
    assert not any(packed(layer, torch.bfloat16) for layer in layers(plain))
    x = torch.randn(shape).bfloat16()
    assert all_equal(run(plain, x), run(quick, x))


def test_the_same_bits_while_drawing_and_without_the_adapter():
    plain, quick = models()
    x = torch.randn(8, 1, 32).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with drawing(plain), drawing(quick):
            assert torch.equal(plain(x), quick(x))
        with plain.disable_adapter(), quick.disable_adapter():
            assert torch.equal(plain(x), quick(x))


def test_a_policy_whose_adapter_does_nothing_is_its_reference_to_the_bit():
    _, quick = models()
    with torch.no_grad():
        for name, p in quick.named_parameters():
            if "lora_B" in name:
                p.zero_()
    x = torch.randn(70, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quick(x.requires_grad_())
        with torch.no_grad(), quick.disable_adapter():
            assert torch.equal(quick(x), y)


def test_a_weight_that_has_changed_is_used_as_it_is_now():
    plain, quick = models()
    x = torch.randn(5, 32).bfloat16()
    for model in (plain, quick):
        with torch.no_grad():
            layers(model)[0].weight.mul_(2)
        layers(model)[1].weight.data = layers(model)[1].weight.data.neg()
    assert not any(packed(layer, torch.bfloat16) for layer in layers(quick))
    assert all_equal(run(plain, x), run(quick, x))


def test_merging_forgets_the_copies():
    """peft adds to the weight past all that would tell of it."""
    plain, quick = models()
    x = torch.randn(5, 32).bfloat16()
    for step in ("merge_adapter", "unmerge_adapter"):
        for model in (plain, quick):
            getattr(model, step)()
        assert not any("packed" in layer.__dict__ for layer in layers(quick))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(plain(x), quick(x))
    pack(layers(quick), ROOM)
    assert all(packed(layer, torch.bfloat16) for layer in layers(quick))
    pack(layers(quick), 0.0)
    assert not any("packed" in layer.__dict__ for layer in layers(quick))


def test_a_copy_of_the_model_has_no_copies_and_computes_the_same():
    _, quick = models()
    other = copy.deepcopy(quick)
    assert not any(packed(layer, torch.bfloat16) for layer in layers(other))
    x = torch.randn(5, 32).bfloat16()
    assert all_equal(run(quick, x), run(other, x))


@pytest.mark.parametrize(("share", "copies"), [(2.0, 2), (1.9, 1), (1.0, 1), (0.9, 0)])
def test_as_many_copies_as_there_is_room_for(share, copies):
    net = Net().bfloat16().requires_grad_(False)
    size = sum(2 * layer.weight.numel() for layer in (net.first, net.second))
    pack([net.first, net.second], share * size)
    found = [packed(layer, torch.bfloat16) for layer in (net.first, net.second)]
    assert [0 if f is None else 1 + (f.backward is not None) for f in found] == [copies] * 2


def test_what_is_trained_wide_or_elsewhere_gets_none():
    assert fit(nn.Linear(4, 4).bfloat16().requires_grad_(False))
    assert not fit(nn.Linear(4, 4).bfloat16())
    assert not fit(nn.Linear(4, 4).requires_grad_(False))
    assert not fit(nn.Linear(4, 4, device="meta", dtype=torch.bfloat16).requires_grad_(False))
    _, quick = models(use_dora=True)
    assert not any(packed(layer, torch.bfloat16) for layer in layers(quick))


class Speaker(Net):
    """A net with a head of 90 tokens."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 90, bias=False)

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(("left", "copies"), [(2.0, 2), (1.9, 1), (0.9, 0)])
def test_the_head_gets_what_room_the_layers_leave(left, copies):
    net = Speaker().bfloat16().requires_grad_(False)
    pack_head(net, ROOM)
    assert "packed" not in net.head.__dict__  # nor have the layers any
    layers, size = [net.first, net.second], 2 * net.head.weight.numel()
    pack(layers, ROOM)
    pack_head(net, sum(packed(layer, torch.bfloat16).bytes for layer in layers) + left * size)
    found = packed(net.head, torch.bfloat16)
    assert (0 if found is None else 1 + (found.backward is not None)) == copies


def test_answers_are_drawn_with_the_heads_copy():
    net = Speaker().bfloat16().requires_grad_(False)
    pack([net.first, net.second], ROOM)
    x, before = torch.randn(3, 1, 32).bfloat16(), net.head.forward
    with torch.no_grad():
        wanted = net.head(x)
        with whole_states(net):
            assert net.head.forward == before  # it has none
        pack_head(net, ROOM)
        with whole_states(net):
            assert net.head.forward != before
            assert torch.equal(net.head(x), wanted)
        assert net.head.forward == before
        assert torch.equal(net.head(x), wanted)
