"""The loss that keeps the experts of a mixture evenly used (Switch Transformer, arXiv 2101.03961, eq. 4 to 6)."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from finetune_cli.data.batches import Batch
from finetune_cli.errors import ModelError
from finetune_cli.types import Balance

FUNCTION = "load_balancing_loss_func"
"""As every mixture of transformers calls its own."""

NUMBERS = ("num_experts", "num_experts_per_tok")
"""Attributes of a model."""
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names in configurations."""


@dataclass(frozen=True)
class Routers:
    """How a model computes it, and what it counts."""

    function: Callable[..., Tensor]
    experts: int
    chosen: int
    """Experts of a token."""
    coefficient: float

    def balance(self, logits: Any, batch: Batch) -> Balance | None:
        """Of the routers' logits, one tensor [tokens, experts] a layer; None of a model whose layers all are dense.
        Each token of the batch counts once, padding never."""
        if not logits:
            return None
        mask = None if batch.segments is not None else batch.mask_BT
        return Balance(self.function(logits, self.experts, self.chosen, mask), self.coefficient)


def find(model: Any) -> Routers | None:
    """Those of a language model whose configuration asks for the loss (`output_router_logits`) and weighs it.

    Raises ModelError where it does and the model's way of computing it is not known.
    """
    config = model.config.get_text_config()
    weights = (getattr(config, name, None) for name in COEFFICIENTS)
    coefficient = next((float(weight) for weight in weights if weight), 0.0)
    if not getattr(config, "output_router_logits", False) or not coefficient:
        return None
    function = getattr(sys.modules[type(model).__module__], FUNCTION, None)
    told: list[Any] = [getattr(model, name, None) for name in NUMBERS]
    if function is None or None in told:
        raise ModelError(
            f"{type(model).__name__} asks for an auxiliary loss (output_router_logits) that this version does not know",
            "Set output_router_logits to false in the model's config.json, or report the model.",
        )
    experts, chosen = told
    return Routers(function, experts, chosen, coefficient)
