"""Policy, critic and reward models on one copy of the frozen weights: one module, switched from role to role.

Where adapters are trained the critic is an adapter of its own beside the policy's, and so is a reward model on the same
base. Where all weights are trained the critic is a second model.

A switch holds until the next one. A checkpointed layer runs again in backward under whatever adapter is active then,
so a role's backward must end before another role is asked; `Method.losses` and the loop keep that order.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finetune_cli.data.batches import Batch
from finetune_cli.engine.role import Backbone, Role
from finetune_cli.engine.score import Head
from finetune_cli.types import Rewards, Scores

POLICY, CRITIC = "default", "critic"
"""Names of adapters."""


def at_temperature(head: Head, temperature: float) -> Head:
    """The head whose logits are those of `head` divided by a temperature."""
    cap = head.softcap / temperature if head.softcap is not None else None
    return replace(head, scale=head.scale / temperature, softcap=cap)


def add_critic(model: Any) -> None:
    """Give an adapted model a second adapter, which starts as what the first is now."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    config = copy.deepcopy(model.peft_config[POLICY])
    config.inference_mode, config.init_lora_weights = False, True  # other kinds would change the base again
    state = get_peft_model_state_dict(model, adapter_name=POLICY)
    model.add_adapter(CRITIC, config)
    set_peft_model_state_dict(model, state, adapter_name=CRITIC)
    for name, p in model.named_parameters():
        if CRITIC in name.split("."):
            p.requires_grad_(True)
            p.data = p.data.float()


class Actor(Role):
    """A language model that answers, and what else judges its answers on the same weights."""

    def __init__(self, model: nn.Module, *, critic: nn.Module | None, temperature: float) -> None:
        """`critic`: a model of its own where the policy has no adapter."""
        super().__init__(model)
        self._head = at_temperature(self._head, temperature)
        self.critic = Backbone(critic) if critic is not None else None
        if critic is None:
            add_critic(model)
        size = self.stock.config.get_text_config().hidden_size
        device = next(model.parameters()).device
        self.value_head = nn.Linear(size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)  # it expects the same of everyone, whatever is drawn for other weights
        nn.init.zeros_(self.value_head.bias)
        self.score_heads = nn.ModuleDict()
        self._frozen: list[nn.Parameter] = []
        self._active = POLICY

    @property
    def adapted(self) -> bool:
        return hasattr(self.model, "peft_config")

    def own(self) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if p.requires_grad and CRITIC not in name.split(".")]

    def beside(self) -> dict[str, nn.Parameter]:
        """What is trained and is not the policy's, by name: the critic's."""
        mine = {id(p) for p in self.own()}
        return {name: p for name, p in self.named_parameters() if p.requires_grad and id(p) not in mine}

    def add_judge(self, name: str, score: nn.Linear) -> None:
        """A reward model whose adapter `name` is on the policy's base already, with its head."""
        self.score_heads[name] = score.requires_grad_(False)
        frozen = [p for key, p in self.model.named_parameters() if name in key.split(".")]
        for p in frozen:
            p.requires_grad_(False)
        self._frozen += frozen

    def switch(self, adapter: str) -> None:
        """Make an adapter the active one. peft makes it trained and the others frozen on the way; what is trained
        stays trained, what is frozen frozen."""
        if not self.adapted or adapter == self._active:
            return
        trained = [p for p in self.parameters() if p.requires_grad]
        self.model.set_adapter(adapter)  # type: ignore[operator]
        for p in trained:
            p.requires_grad_(True)
        for p in self._frozen:
            p.requires_grad_(False)
        self._active = adapter

    def forward(self, batch: Batch, role: str = "policy") -> Scores | Tensor | Rewards:  # type: ignore[override]
        """Of the policy the Scores, of `value` what it expects before each token [N], of a reward model its Rewards."""
        if role == "policy":
            self.switch(POLICY)
            return super().forward(batch)
        if role == "value":
            return self.values(batch)
        self.switch(role)
        h_RD = self.states(batch, batch.last_R)
        with torch.autocast(h_RD.device.type, enabled=False):
            return Rewards(self.score_heads[role](h_RD.float()))

    @torch.no_grad()
    def expect(self, value: float) -> None:
        """Let the critic expect `value` of every token, beside what it has learned of each."""
        self.value_head.bias.fill_(value)

    def values(self, batch: Batch) -> Tensor:
        if self.critic is None:
            self.switch(CRITIC)
        h_ND = (self.critic or self).states(batch, batch.read_N)
        with torch.autocast(h_ND.device.type, enabled=False):
            value_N: Tensor = self.value_head(h_ND.float())[:, 0]
        return value_N
