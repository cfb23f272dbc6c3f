"""Role: the one module that is wrapped and called; backbone and score in one forward.

Reading the head's weight outside the wrapped forward would skip DDP's reducer and every sharding hook.
"""

from typing import Any

from torch import nn

from finetune_cli.data.batches import Batch
from finetune_cli.engine.score import find_head, score, trunk_of
from finetune_cli.types import Scores


class Role(nn.Module):
    """A language model as a method sees it: it takes a batch and gives log-probabilities."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._head = find_head(self.stock)

    @property
    def stock(self) -> Any:
        """The transformers model itself, under peft's wrapper where there is one; adapters are inside it."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # type: ignore[operator]

    def forward(self, batch: Batch) -> Scores:
        out = trunk_of(self.stock)(**batch.inputs())
        h_ND = out.last_hidden_state.flatten(0, 1)[batch.read_N]
        logps_N, correct_N, entropy_N = score(self._head, h_ND, batch.label_N, measure=batch.measure)
        return Scores(logps_N, batch.owner_N, correct_N, entropy_N)
