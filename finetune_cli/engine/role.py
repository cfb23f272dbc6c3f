"""Role: the one module that is wrapped and called; backbone and score in one forward.

Reading the head's weight outside the wrapped forward would skip DDP's reducer and every sharding hook.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune_cli.data.batches import Batch
from finetune_cli.engine import routers
from finetune_cli.engine.score import find_head, log_agreement, score, trunk_of
from finetune_cli.errors import ModelError
from finetune_cli.methods import Method
from finetune_cli.types import Rewards, Scores


class Backbone(nn.Module):
    """A model that is asked for its states at some places of a batch."""

    def __init__(self, model: nn.Module, *, noise_alpha: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.noise_alpha = noise_alpha

    def own(self) -> list[nn.Parameter]:
        """What is trained of the language model itself."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def stock(self) -> Any:
        """The transformers model itself, under peft's wrapper where there is one; adapters are inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # type: ignore[operator]

    @contextmanager
    def noisy(self, batch: Batch, alpha: float) -> Iterator[None]:
        """Embeddings with NEFTune's noise (arXiv 2310.05914), scaled by each row's own length, whatever lies beside
        it: uniform in +- alpha / sqrt(length x D). Added to what the embedding gives, because some models read the
        tokens elsewhere too."""

        def add(_: nn.Module, __: Any, embeddings_BTD: Tensor) -> Tensor:
            size_BT1 = alpha / (batch.seen_BT * embeddings_BTD.shape[-1]).sqrt().unsqueeze(-1)
            noise_BTD = torch.empty_like(embeddings_BTD, dtype=torch.float32).uniform_(-1, 1) * size_BT1
            return embeddings_BTD + noise_BTD.to(embeddings_BTD.dtype)

        hook = self.stock.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()

    def trunk(self, batch: Batch, **more: Any) -> Any:
        """What the model without its head gives."""
        alpha = self.noise_alpha if self.training else None
        with nullcontext() if alpha is None else self.noisy(batch, alpha):
            return trunk_of(self.stock)(**batch.inputs(), **more)

    def states(self, batch: Batch, place_N: Tensor) -> Tensor:
        """Hidden states at places in the flattened tokens. [N, D]"""
        h_ND: Tensor = self.trunk(batch).last_hidden_state.flatten(0, 1)[place_N]
        return h_ND


class Role(Backbone):
    """A language model as a method sees it: it takes a batch and gives log-probabilities."""

    def __init__(self, model: nn.Module, *, noise_alpha: float | None = None, agreement: bool = False) -> None:
        super().__init__(model, noise_alpha=noise_alpha)
        self.agreement = agreement
        self._head = find_head(self.stock)
        self._routers = routers.find(self.stock)

    def forward(self, batch: Batch) -> Scores:
        balanced = self._routers if torch.is_grad_enabled() else None
        out = self.trunk(batch, **({} if balanced is None else {"output_router_logits": True}))
        h_ND: Tensor = out.last_hidden_state.flatten(0, 1)[batch.read_N]
        logps_N, correct_N, entropy_N = score(self._head, h_ND, batch.label_N, measure=batch.measure)
        agreement_N = log_agreement(self._head, h_ND) if self.agreement else None
        balance = None if balanced is None else balanced.balance(out.router_logits, batch)
        return Scores(logps_N, batch.owner_N, correct_N, entropy_N, agreement_N, balance)


class RewardRole(Backbone):
    """A sequence classifier: it takes a batch and gives scores, read where each sequence ends, in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not hasattr(self.stock, "score"):
            raise ModelError(f"{type(self.stock).__name__} has no `score` head", "Use a decoder of another family.")

    def forward(self, batch: Batch) -> Rewards:
        h_RD = self.states(batch, batch.last_R)
        with torch.autocast(h_RD.device.type, enabled=False):
            reward_RK: Tensor = self.stock.score(h_RD.float())
        return Rewards(reward_RK)


def role_of(model: nn.Module, method: Method) -> Backbone:
    """The module that a method asks."""
    if method.labels() is not None:
        return RewardRole(model)
    return Role(model, noise_alpha=method.embedding_noise(), agreement=method.token_agreement())
