"""Scoring: log-probabilities at supervised positions, from hidden states and the output head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from finetune_cli.engine.packed import Packed, packed, times
from finetune_cli.errors import ModelError


@dataclass(frozen=True)
class Head:
    """How a model makes logits of its hidden states: the head layer, then a scale, then a soft cap."""

    layer: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def frozen_weight(self) -> Tensor | None:
        """[V, D], where the head is a plain layer that is not trained; None where it has adapters or learns."""
        if type(self.layer) is not nn.Linear or any(p.requires_grad for p in self.layer.parameters()):
            return None
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias if type(self.layer) is nn.Linear else None

    @property
    def vocabulary(self) -> int:
        return max(int(p.shape[0]) for p in self.layer.parameters())  # an adapter's own are narrower

    def logits(self, h_ND: Tensor) -> Tensor:
        """[N, D] -> [N, V], float32. Past the layer's hooks: chunks are many or few in each process, and DeepSpeed's
        wait for one another at every call."""
        z_NV: Tensor = self.layer.forward(h_ND).float()
        if self.scale != 1.0:
            z_NV = z_NV * self.scale
        return z_NV if self.softcap is None else torch.tanh(z_NV / self.softcap) * self.softcap


def scalings(config: object) -> tuple[float, float | None]:
    """(scale, soft cap) as the families name them in their configurations."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return scale, cap


def trunk_of(model: nn.Module) -> nn.Module:
    """The module that gives hidden states: the model without its head."""
    trunk: Any = model.base_model
    found: nn.Module = model.model if trunk is model else trunk
    return found


@torch.no_grad()
def find_head(model: nn.Module) -> Head:
    """The head of a causal language model, proved on eight tokens against the model's own logits.

    Raises ModelError where none of the known forms gives them.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if layer is None:
        raise ModelError(f"{type(model).__name__} has no output head", "Use a model with a language-modelling head.")
    scale, cap = scalings(config)
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % config.vocab_size
    training = model.training
    model.eval()
    hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
    wanted = model(input_ids=ids, use_cache=False).logits[0].float()
    model.train(training)
    for head in (Head(layer, scale, cap), Head(layer)):
        if torch.allclose(head.logits(hidden[0]), wanted, atol=1e-2, rtol=1e-2):
            return head
    raise ModelError(
        f"{type(model).__name__} makes its logits in a way this version does not know",
        "Please report the model; its head is neither plain, scaled nor soft-capped.",
    )


Scored = tuple[Tensor, Tensor | None, Tensor | None]
"""(log p of each label [N], whether it was the most probable [N], entropy in nats [N]), float32; the latter two on
demand."""

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**26}
"""Logits alive at once. On a CPU, whose products lose 8% against twice as many, 32 MiB in float32. A GPU needs some
hundred rows before the head's weight is read less often than it is multiplied with."""


def chunk_rows(head: Head, h_ND: Tensor) -> int:
    return max(16, CHUNK_LOGITS["cpu" if h_ND.device.type == "cpu" else "cuda"] // head.vocabulary)


def score(head: Head, h_ND: Tensor, label_N: Tensor, *, measure: bool) -> Scored:
    """Scores chunk by chunk, so that no [N, V] tensor outlives its chunk.

    A frozen plain head has its gradient made in the same pass; any other is recomputed in backward.
    """
    chunk = chunk_rows(head, h_ND)
    weight = head.frozen_weight
    if weight is not None:
        made: Any = FrozenHead.apply
        copies = packed(head.layer, weight.dtype)
        scored: Scored = made(h_ND, weight, head.bias, label_N, head.scale, head.softcap, chunk, measure, copies)
        return scored
    pieces = [
        _recomputed(head, h, y, measure)
        for h, y in zip(torch.split(h_ND, chunk), torch.split(label_N, chunk), strict=True)
    ]
    logps, corrects, entropies = zip(*pieces, strict=True)
    return torch.cat(logps), torch.cat(corrects) if measure else None, torch.cat(entropies) if measure else None


def _recomputed(head: Head, h_ND: Tensor, label_N: Tensor, measure: bool) -> Scored:
    if not torch.is_grad_enabled():
        return plain(head, h_ND, label_N, measure)
    scored: Scored = checkpoint(plain, head, h_ND, label_N, measure, use_reentrant=False)
    return scored


def plain(head: Head, h_ND: Tensor, label_N: Tensor, measure: bool) -> Scored:
    """All logits at once."""
    logits_NV = head.logits(h_ND)
    lse_N = torch.logsumexp(logits_NV, -1)
    logps_N = logits_NV.gather(1, label_N[:, None])[:, 0] - lse_N
    if not measure:
        return logps_N, None, None
    with torch.no_grad():
        correct_N = (logits_NV.argmax(-1) == label_N).float()
        entropy_N = lse_N - (torch.exp(logits_NV - lse_N[:, None]) * logits_NV).sum(-1)
    return logps_N, correct_N, entropy_N


@torch.no_grad()
def log_agreement(head: Head, h_ND: Tensor) -> Tensor:
    """log sum_v p_v^2 at each position, chunk by chunk. [N], float32"""
    pieces = torch.split(h_ND, chunk_rows(head, h_ND))
    logits = (head.logits(h) for h in pieces)
    return torch.cat([torch.logsumexp(2 * z, -1) - 2 * torch.logsumexp(z, -1) for z in logits])


@dataclass(frozen=True)
class Room:
    """What a chunk's logits and probabilities are written to, one chunk after the other: fresh memory for each costs a
    CPU more than what is computed in it."""

    product_NV: Tensor
    """Logits as the head's product gives them, then what the product by its weight takes; the head's format."""
    z_NV: Tensor
    p_NV: Tensor

    @classmethod
    def of(cls, rows: int, weight_VD: Tensor) -> "Room":
        product = weight_VD.new_empty(rows, weight_VD.shape[0])
        z = product if product.dtype == torch.float32 else torch.empty_like(product, dtype=torch.float32)
        return cls(product, z, torch.empty_like(z))

    def logits(
        self,
        h_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        scale: float,
        softcap: float | None,
        copies: Packed | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logits [N, V], room for their probabilities, the soft cap's slope at them), float32."""
        rows = h_ND.shape[0]
        product_NV, z_NV, p_NV = self.product_NV[:rows], self.z_NV[:rows], self.p_NV[:rows]
        h_ND = h_ND.to(weight_VD.dtype)
        if copies is None:
            torch.mm(h_ND, weight_VD.T, out=product_NV)
        else:
            product_NV = times(h_ND, copies.forward)
        z_NV.copy_(product_NV if bias_V is None else product_NV.add_(bias_V))
        if scale != 1.0:
            z_NV *= scale
        if softcap is None:
            return z_NV, p_NV, None
        bent_NV = torch.tanh(z_NV / softcap)
        return bent_NV * softcap, p_NV, 1 - bent_NV * bent_NV

    def rounded(self, p_NV: Tensor) -> Tensor:
        """The same in the head's format."""
        return self.product_NV[: p_NV.shape[0]].copy_(p_NV)


class FrozenHead(torch.autograd.Function):
    """Log-probabilities with d lp / d h made in the forward chunk: W[y] - softmax(z) W, through scale and soft cap.

    Backward is one product by [N, 1]: it never meets the vocabulary, and what is kept is [N, D]. Only right where W is
    not trained. The one-hot is subtracted in float32, before the product rounds: for a token of probability 0.999 the
    difference to 1 is the whole gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        label_N: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
        measure: bool,
        copies: Packed | None = None,
    ) -> Scored:
        rows = h_ND.shape[0]
        logps_N = h_ND.new_empty(rows, dtype=torch.float32)
        correct_N, entropy_N = (torch.empty_like(logps_N) if measure else None for _ in range(2))
        dh_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        room, back = Room.of(min(chunk, rows), weight_VD), None if copies is None else copies.backward
        with torch.autocast(h_ND.device.type, enabled=False):
            for a in range(0, rows, chunk):
                b = min(a + chunk, rows)
                y_N1 = label_N[a:b, None]
                z_NV, p_NV, slope_NV = room.logits(h_ND[a:b], weight_VD, bias_V, scale, softcap, copies)
                top_N = z_NV.amax(-1)
                torch.softmax(z_NV, -1, out=p_NV)
                lse_N = top_N - p_NV.amax(-1).log()  # the largest probability is at least 1 / V
                logps_N[a:b] = z_NV.gather(1, y_N1)[:, 0] - lse_N
                if correct_N is not None and entropy_N is not None:
                    correct_N[a:b] = (z_NV.argmax(-1) == y_N1[:, 0]).float()
                    entropy_N[a:b] = lse_N - torch.linalg.vecdot(p_NV, z_NV)
                if dh_ND is None:
                    continue
                p_NV.scatter_add_(1, y_N1, torch.full_like(y_N1, -1.0, dtype=torch.float32))  # minus d lp / d z
                if slope_NV is not None:
                    p_NV *= slope_NV
                dz_NV = room.rounded(p_NV)
                dh_ND[a:b] = (dz_NV @ weight_VD if back is None else times(dz_NV, back)) * -scale
        ctx.save_for_backward(dh_ND)
        if correct_N is not None and entropy_N is not None:
            ctx.mark_non_differentiable(correct_N, entropy_N)
        return logps_N, correct_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dh_ND,) = ctx.saved_tensors
        return (dh_ND.float() * grads[0][:, None]).to(dh_ND.dtype), *(None,) * 8
