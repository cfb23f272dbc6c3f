"""The variable-length kernels, with a slow stand-in that has their exact argument semantics."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.attention.varlen as torch_varlen

from finetune_cli.data.batches import tree
from finetune_cli.engine import attention
from finetune_cli.types import Branch, Row

ROWS = [
    Row([1] * 7, (Branch([2] * 5, [True] * 5), Branch([3], [True]))),
    Row([], (Branch([4] * 9, [True] * 9),)),
    Row([5], (Branch([6] * 3, [True] * 3), Branch([7] * 4, [True] * 4))),
]


def slow(q, k, v, cu_q, cu_k, scale, left, right):
    """Query i of a sequence of L queries and K keys stands at key K - L + i and sees keys from `left` before to `right`
    after it, both inclusive; -1 is no bound. [T, H, D] in, [T, H, D] out."""
    out = []
    for n in range(len(cu_q) - 1):
        a, b, c, d = int(cu_q[n]), int(cu_q[n + 1]), int(cu_k[n]), int(cu_k[n + 1])
        qs, ks, vs = q[a:b], k[c:d], v[c:d]
        ks, vs = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (ks, vs))
        at = torch.arange(b - a)[:, None] + (d - c) - (b - a)
        j = torch.arange(d - c)[None]
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        mask &= (at - j <= left) if left >= 0 else True
        mask &= (j - at <= right) if right >= 0 else True
        s = torch.einsum("qhd,khd->hqk", qs.float(), ks.float()) * (scale or q.shape[-1] ** -0.5)
        p = s.masked_fill(~mask, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", p, vs.float()))
    return torch.cat(out).to(q.dtype)


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert max_q == max(cu_seq_q.diff())
    assert max_k == max(cu_seq_k.diff())
    return slow(q, k, v, cu_seq_q, cu_seq_k, scale, *window_size)


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size):
    assert causal
    left, _ = window_size
    return slow(q, k, v, cu_q, cu_k, softmax_scale, left, 0)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    flash = ModuleType("flash_attn")
    flash.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)


@pytest.mark.parametrize("backend", ["varlen", "flash_attention_2"])
@pytest.mark.parametrize("local", [0, 1, 4])
def test_kernels_equal_the_loop_over_segments(backend, local):
    torch.manual_seed(0)
    batch = tree(ROWS, backend=backend)
    t = batch.ids_BT.shape[1]
    q, k, v = (torch.randn(1, h, t, 8, dtype=torch.bfloat16, requires_grad=True) for h in (4, 2, 2))
    marker = torch.empty(1, 1, 0, local, dtype=torch.bool)
    out, _ = attention.segments_attention(torch.nn.Module(), q, k, v, marker, layout=batch.segments)
    out.float().square().sum().backward()
    found = [out.detach(), *(x.grad.clone() for x in (q, k, v))]
    for x in (q, k, v):
        x.grad = None
    batch.segments.backend = "sdpa"
    again, _ = attention.segments_attention(torch.nn.Module(), q, k, v, marker, layout=batch.segments)
    again.float().square().sum().backward()
    for mine, loop in zip(found, [again.detach(), *(x.grad for x in (q, k, v))], strict=True):
        torch.testing.assert_close(mine.float(), loop.float(), rtol=3e-2, atol=6e-2)
    assert batch.segments.seen == 2


def test_what_cannot_be_honoured_is_refused():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="position_bias"):
        attention.segments_attention(torch.nn.Module(), q, q, q, None, position_bias=q)
    layout = tree([Row([], (Branch([1, 2, 3], [True] * 3),))]).segments
    with pytest.raises(RuntimeError, match="lost on the way"):
        attention.segments_attention(torch.nn.Module(), q, q, q, None, layout=layout)
    with pytest.raises(RuntimeError, match="lost on the way"):
        attention.segments_attention(torch.nn.Module(), q, q, q, torch.empty(1, 1, 0, 0))


def test_causal_mask_is_aligned_at_the_bottom_right():
    mask = attention.causal_mask(1, 4, attention.Rule(0, False), device=torch.device("cpu"))
    assert mask.tolist() == [[True] * 4]
    window = attention.causal_mask(2, 4, attention.Rule(2, False), device=torch.device("cpu"))
    assert window.tolist() == [[False, True, True, False], [False, False, True, True]]
    chunks = attention.causal_mask(4, 4, attention.Rule(2, True), device=torch.device("cpu"))
    assert chunks.tolist() == [[True, False, False, False], [True, True, False, False],
                               [False, False, True, False], [False, False, True, True]]  # fmt: skip
