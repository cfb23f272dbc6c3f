"""Scoring: log-probabilities at supervised positions, from hidden states and the output head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune_cli.errors import ModelError


@dataclass(frozen=True)
class Head:
    """How a model makes logits of its hidden states: the head layer, then a scale, then a soft cap."""

    layer: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, h_ND: Tensor) -> Tensor:
        """[N, D] -> [N, V], float32."""
        z_NV: Tensor = self.layer(h_ND).float()
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
    trunk: nn.Module = model.base_model  # type: ignore[assignment]
    return trunk


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


def score(head: Head, h_ND: Tensor, label_N: Tensor, *, measure: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(log p of each label [N], whether it was the most probable, entropy in nats), float32."""
    logits_NV = head.logits(h_ND)
    lse_N = torch.logsumexp(logits_NV, -1)
    logps_N = logits_NV.gather(1, label_N[:, None])[:, 0] - lse_N
    if not measure:
        return logps_N, None, None
    with torch.no_grad():
        correct_N = (logits_NV.argmax(-1) == label_N).float()
        probs_NV = torch.exp(logits_NV - lse_N[:, None])
        entropy_N = lse_N - (probs_NV * logits_NV).sum(-1)
    return logps_N, correct_N, entropy_N
