"""Role: the one module that is wrapped and called; backbone and score in one forward.

Reading the head's weight outside the wrapped forward would skip DDP's reducer and every sharding hook.
"""

from typing import Any

import torch
from torch import Tensor, nn

from finetune_cli.data.batches import Batch
from finetune_cli.engine.score import find_head, log_agreement, score, trunk_of
from finetune_cli.types import Scores


class Role(nn.Module):
    """A language model as a method sees it: it takes a batch and gives log-probabilities."""

    def __init__(self, model: nn.Module, *, noise_alpha: float | None = None, agreement: bool = False) -> None:
        super().__init__()
        self.model = model
        self.noise_alpha = noise_alpha
        self.agreement = agreement
        self._head = find_head(self.stock)

    @property
    def stock(self) -> Any:
        """The transformers model itself, under peft's wrapper where there is one; adapters are inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # type: ignore[operator]

    def noisy(self, batch: Batch, ids_BT: Tensor, alpha: float) -> Tensor:
        """Embeddings with NEFTune's noise (arXiv 2310.05914), scaled by each row's own length, whatever lies beside
        it: uniform in +- alpha / sqrt(length x D). [B, T, D]"""
        embeddings_BTD: Tensor = self.stock.get_input_embeddings()(ids_BT)
        size_BT1 = alpha / (batch.seen_BT * embeddings_BTD.shape[-1]).sqrt().unsqueeze(-1)
        noise_BTD = torch.empty_like(embeddings_BTD, dtype=torch.float32).uniform_(-1, 1) * size_BT1
        return embeddings_BTD + noise_BTD.to(embeddings_BTD.dtype)

    def forward(self, batch: Batch) -> Scores:
        inputs = batch.inputs()
        if self.noise_alpha is not None and self.training:
            inputs["inputs_embeds"] = self.noisy(batch, inputs.pop("input_ids"), self.noise_alpha)
        out = trunk_of(self.stock)(**inputs)
        h_ND = out.last_hidden_state.flatten(0, 1)[batch.read_N]
        logps_N, correct_N, entropy_N = score(self._head, h_ND, batch.label_N, measure=batch.measure)
        agreement_N = log_agreement(self._head, h_ND) if self.agreement else None
        return Scores(logps_N, batch.owner_N, correct_N, entropy_N, agreement_N)
