"""Adapters: attaching them, and counting what is trained."""

from typing import Any

from torch import nn

from finetune_cli.errors import ModelError
from finetune_cli.recipe.sections import Lora


def attach(model: Any, lora: Lora) -> Any:
    """The model with fresh adapters in float32, on the layers that `target_modules` names.

    Raises ModelError where it names none.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(task_type=TaskType.CAUSAL_LM, **lora.model_dump())
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:  # peft: no layer matches
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"lora.target_modules {lora.target_modules!r} fits no layer: {error}",
            f"The linear layers of this model are called {', '.join(names)}; all-linear takes them all.",
        ) from error


def sizes(model: nn.Module) -> tuple[int, int]:
    """(trained weights, all weights)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters())
