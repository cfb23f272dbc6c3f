"""The model's shape without its weights: what is trained, how large it is, whether an adapter fits."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_cli.checks.rule import Weights
from finetune_cli.engine import lora, models
from finetune_cli.engine.models import HUB_HINT, Location, _first
from finetune_cli.errors import ModelError
from finetune_cli.plan.facts import shapes
from finetune_cli.recipe.sections import Recipe


def look(recipe: Recipe, location: Location) -> Weights:
    """Sizes by the configuration, on the meta device. Raises ModelError where there is no usable configuration."""
    model = empty(location)
    embedding = model.get_input_embeddings().weight.shape[0]
    tokens: list[int] = []
    if models.learns_tokens(recipe):
        tokens = lora.tokens_of(recipe, models.load_tokenizer(recipe.model, location))
    if recipe.model.new_tokens or (location.adapter is not None and models.brings_tokens(location.adapter)):
        embedding = max(embedding, len(models.load_tokenizer(recipe.model, location)))
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # not every family names one
    inside = lora.linear_layers(model)
    linear = tuple(dict.fromkeys(name.rpartition(".")[2] for name in inside))
    in_blocks = sum(layer.weight.numel() for layer in inside.values())
    refused = misfit = ""
    wrapped: nn.Module = model
    if location.adapter is not None:
        wrapped, misfit = with_adapter(model, Path(location.adapter))
    elif recipe.lora is not None:
        try:
            # pissa and the like would decompose the weights, which are not there
            rows = model.get_input_embeddings().weight.shape[0]
            known = [token for token in tokens if token < rows]
            wrapped = lora.attach(model, recipe.lora.model_copy(update={"init_lora_weights": False}), tokens=known)
        except ModelError as error:
            refused = f"{error.message}; {error.hint}"
    trained, total = lora.sizes(wrapped)
    adapted, most = adapted_in(wrapped), positions(model, window)
    return Weights(total, trained, embedding, window, in_blocks, linear, adapted, refused, misfit, most)


def positions(model: Any, window: int | None) -> int | None:
    """The window, where positions have an embedding (OPT's has two rows more)."""
    tokens = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    return window if window is not None and any(window <= rows <= window + 2 for rows in tables) else None


def empty(location: Location) -> Any:
    """The model on the meta device: shapes and no numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(location.name, **location.kwargs)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=location.kwargs.get("trust_remote_code", False)
            )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the configuration of {location.name} cannot be used: {_first(error)}", HUB_HINT) from error


def adapted_in(model: nn.Module) -> tuple[str, ...]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in found))


def with_adapter(model: Any, folder: Path) -> tuple[nn.Module, str]:
    """The model with the folder's adapter, and why that is not one of this model; empty where it is."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode, config.init_lora_weights = False, False
        wrapped = get_peft_model(model, config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return model, f"the adapter in {folder} cannot be put on its base model: {_first(error)}"
    ours = {name: [*tensor.shape] for name, tensor in get_peft_model_state_dict(wrapped).items()}
    file = folder / "adapter_model.safetensors"
    return wrapped, unlike(ours, shapes(file)) if file.is_file() else ""


def unlike(ours: dict[str, list[int]], theirs: dict[str, list[int]]) -> str:
    """Which tensors of an adapter are not of the model, in words; empty where all are."""
    wrong = [name for name in theirs if ours.get(name) != theirs[name]]
    if not wrong:
        return ""
    name = wrong[0]
    here = f"has {ours[name]}" if name in ours else "has no such layer"
    return (
        f"{len(wrong)} of the adapter's {len(theirs)} tensors are not of this model: {name} is {theirs[name]}, "
        f"and the base {here}"
    )
