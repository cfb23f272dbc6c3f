"""Attention written out, against PyTorch's own with the same mask in float64: rules, shapes, blocks, both ways back."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from finetune_cli.data.batches import Segment, Segments
from finetune_cli.engine import written
from finetune_cli.engine.parts import Alone, Rule, causal_mask, lengths, parts
from finetune_cli.engine.written import WrittenOut
from finetune_cli.plan import arrangement

SPANS = [Segment(0, 9), Segment(9, 14, 0, 9), Segment(14, 15, 0, 9), Segment(15, 33)]


def wanted(q, k, v, scaling, rule):
    """[H, T, D] -> [T, H, D], segment by segment. Of four dimensions, else bfloat16 does not meet the fused kernel."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    outs = []
    for start, stop, back_start, back_stop in SPANS:
        seen = [*range(back_start, back_stop), *range(start, stop)]
        mask = causal_mask(stop - start, len(seen), rule, device=q.device)
        outs.append(
            F.scaled_dot_product_attention(
                q[None, :, start:stop], k[None, :, seen], v[None, :, seen], mask, scale=scaling
            )
        )
    return torch.cat(outs, 2)[0].transpose(0, 1)


def inputs(dtype, heads=4, kv_heads=2, size=8):
    torch.manual_seed(0)
    tokens = SPANS[-1].stop
    laid_out = [torch.randn(tokens, h, size, dtype=dtype) for h in (heads, kv_heads, kv_heads)]
    return [x.transpose(0, 1).requires_grad_() for x in laid_out], torch.randn(tokens, heads, size, dtype=dtype)


@pytest.mark.parametrize("kept", [0, 512], ids=["recomputed", "kept"])
@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("rule", [Rule(0, False), Rule(3, False), Rule(3, True)], ids=["causal", "window", "chunks"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("short", [0, 14, 256], ids=["alone", "some", "together"])
def test_equal_to_the_plain_formula(monkeypatch, rule, block, kept, kv_heads, short):
    monkeypatch.setattr(arrangement, "BLOCK", block)
    monkeypatch.setattr(arrangement, "SEEN", short)
    monkeypatch.setattr(written, "KEPT", kept)
    (q, k, v), weights = inputs(torch.float64, kv_heads=kv_heads)
    out = WrittenOut.apply(q, k, v, 0.3, rule, Segments(SPANS))
    again = wanted(q, k, v, 0.3, rule)
    torch.testing.assert_close(out, again, rtol=1e-10, atol=1e-12)
    mine, theirs = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (out, again))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=30))
def test_every_span_is_in_one_part_and_parts_are_bounded_and_filled(spans):
    found = list(arrangement.arranged(spans))
    assert sorted(n for some in found for n in some) == [*range(len(spans))]
    for some in (some for some in found if len(some) > 1):
        own, keys = zip(*((own, own + back) for own, back in map(spans.__getitem__, some)), strict=True)
        padded = len(some) * max(own) * max(keys)
        assert max(own) <= arrangement.SHORT
        assert max(keys) <= arrangement.SEEN
        assert padded <= arrangement.TOGETHER
        assert sum(a * b for a, b in zip(own, keys, strict=True)) >= arrangement.FILLED * padded


def test_equal_answers_get_equal_numbers_to_the_bit():
    """Beside rows of every length, which pad them; a tie of chosen and rejected must not be broken by rounding."""
    draw = random.Random(0)
    for _ in range(40):
        spans, twins = [], []
        for _ in range(draw.randint(2, 8)):
            start, prompt, own = spans[-1].stop if spans else 0, draw.randint(1, 60), draw.choice((10, 40, 150))
            first, second = start + prompt, start + prompt + own
            spans += [Segment(start, first), Segment(first, second, start, first)]
            spans.append(Segment(second, second + own, start, first))
            twins.append((slice(first, second), slice(second, second + own)))
        q, k, v = (torch.randn(spans[-1].stop, heads, 16).transpose(0, 1) for heads in (4, 2, 2))
        for one, other in twins:
            for x in (q, k, v):
                x[:, other] = x[:, one]
        out = WrittenOut.apply(q, k, v, 0.25, Rule(0, False), Segments(spans))
        assert all(torch.equal(out[one], out[other]) for one, other in twins)


def test_rows_of_one_length_are_one_part():
    assert [part.count for part in parts(Segments([Segment(90 * n, 90 * n + 90) for n in range(8)]))] == [8]
    assert [type(part) for part in parts(Segments([Segment(0, 90), Segment(90, 400)]))] == [Alone, Alone]
    assert [part.count for part in parts(Segments(SPANS))] == [2, 2]


def test_what_is_kept_for_backward_is_what_the_plan_counts():
    (q, k, v), _ = inputs(torch.float32)
    kept = WrittenOut.apply(q, k, v, 0.3, Rule(0, False), Segments(SPANS)).grad_fn.saved_tensors[3:]
    assert sum(p.numel() for p in kept) == q.shape[0] * arrangement.kept_scores([*map(lengths, SPANS)])


def errors(q, k, v, weights):
    """Of the output and the gradients of q, k and v, relative to float64: ours and the fused kernel's."""
    true = [x.detach().double().requires_grad_() for x in (q, k, v)]
    reference = wanted(*true, 0.3, Rule(0, False))
    exact = [reference.detach(), *torch.autograd.grad((reference * weights.double()).sum(), true)]
    found = []
    for out in (WrittenOut.apply(q, k, v, 0.3, Rule(0, False), Segments(SPANS)), wanted(q, k, v, 0.3, Rule(0, False))):
        numbers = [out.detach(), *torch.autograd.grad((out * weights).sum(), (q, k, v))]
        found.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(numbers, exact, strict=True)])
    return found


def test_bfloat16_is_as_near_to_the_truth_as_the_fused_kernel():
    (q, k, v), weights = inputs(torch.bfloat16, size=64)
    for mine, fused in zip(*errors(q, k, v, weights), strict=True):
        assert mine < 1.5 * fused


def test_bfloat16_keeps_the_gradient_of_queries_where_keys_have_a_mean():
    """The fused kernel takes the mean gradient of a row from the rounded output, and the mean key multiplies that."""
    (q, k, v), weights = inputs(torch.bfloat16, size=64)
    with torch.no_grad():
        k += 4 * torch.randn(k.shape[0], 1, k.shape[2], dtype=k.dtype)
        v += 4 * torch.randn(v.shape[0], 1, v.shape[2], dtype=v.dtype)
    ours, fused = errors(q, k, v, weights)
    assert ours[1] < fused[1]
