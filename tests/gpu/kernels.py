"""Attention by this device's own kernels beside the plain loop over segments in float32; the differences as JSON.

Run by `test_cuda.py` in a process of its own: python tests/gpu/kernels.py cuda
"""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

from finetune_cli.data.batches import Segments, tree
from finetune_cli.engine import attention
from finetune_cli.types import Branch, Row

HEADS, KV_HEADS, SIZE = 8, 2, 64
ROWS = [
    Row([1] * 70, (Branch([2] * 50, [True] * 50), Branch([3], [True]))),
    Row([], (Branch([4] * 300, [True] * 300),)),
    Row([5], (Branch([6] * 3, [True] * 3), Branch([7] * 140, [True] * 140))),
]


def made(kernel: bool, x: list[Tensor], layout: Segments, local: int) -> list[Tensor]:
    """(the output, the gradients of queries, keys and values), float32."""
    own = [one.detach().requires_grad_() for one in x]
    marker = torch.empty(1, 1, 0, local, dtype=torch.bool, device=own[0].device)
    if kernel:
        out, _ = attention.segments_attention(torch.nn.Module(), *own, marker, layout=layout)
    else:
        out = attention.by_segment(*own, layout, (None, 0.0, None, None), local, chunked=False)
    draw = torch.Generator(out.device).manual_seed(1)
    out.backward(torch.randn(out.shape, generator=draw, device=out.device).to(out.dtype))
    return [out.detach().float(), *(one.grad.float() for one in own if one.grad is not None)]


def differences(device: str) -> Iterator[dict[str, object]]:
    """Of each kernel, format and window: the distance from float32, as a share of its norm, of output and gradients;
    beside it that of the loop over segments in the same format."""
    kernels = (
        ["sdpa"] if device == "cpu" else ["varlen", *["flash_attention_2"] * (find_spec("flash_attn") is not None)]
    )
    for kernel in kernels:
        for dtype in (torch.bfloat16, torch.float16):
            for local in (0, 2, 64):
                layout = tree(ROWS, backend=kernel).to(torch.device(device)).segments
                assert layout is not None
                tokens, draw = layout.spans[-1].stop, torch.Generator(device).manual_seed(0)
                shapes = [(1, heads, tokens, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
                x = [torch.randn(shape, generator=draw, device=device).to(dtype) for shape in shapes]
                truth = made(False, [one.float() for one in x], layout, local)
                ours, loop = made(True, x, layout, local), made(False, x, layout, local)
                yield {
                    "kernel": kernel, "dtype": str(dtype), "local": local,
                    "ours": [float((a - b).norm() / b.norm()) for a, b in zip(ours, truth, strict=True)],
                    "loop": [float((a - b).norm() / b.norm()) for a, b in zip(loop, truth, strict=True)],
                }  # fmt: skip


if __name__ == "__main__":
    sys.stdout.write(json.dumps(list(differences(sys.argv[1]))))
