"""Models and tokenizers, loaded as the plan says."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_cli.data import builtin
from finetune_cli.engine import lora
from finetune_cli.errors import ModelError
from finetune_cli.log import LOGGER
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.sections import Model
from finetune_cli.types import Row


@dataclass(frozen=True)
class Location:
    """Where a model is loaded from: arguments of `from_pretrained`, and the adapter on top of it."""

    name: str
    kwargs: dict[str, Any]
    adapter: str | None = None


def locate(model: Model, *, base_of_adapter: str | None = None) -> Location:
    """Resolve built-in models, GGUF files and adapter folders."""
    name = model.name_or_path
    kwargs: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.revision is not None:
        kwargs["revision"] = model.revision
    if name.startswith("builtin:"):
        return Location(str(builtin.resolve(name.removeprefix("builtin:"), announce=LOGGER.info)), kwargs)
    if name.endswith(".gguf"):
        path = Path(name)
        return Location(str(path.parent), {**kwargs, "gguf_file": path.name})
    if (Path(name) / "adapter_config.json").exists():
        if base_of_adapter is None:
            raise ModelError(f"the adapter {name} does not say which model it belongs to", "Name a model folder.")
        return Location(base_of_adapter, kwargs, adapter=name)
    return Location(name, kwargs)


def load_tokenizer(model: Model, location: Location) -> Any:
    """The tokenizer beside the model or the adapter, with the recipe's own template where it names one."""
    from transformers import AutoTokenizer

    name, kwargs = location.name, location.kwargs
    if location.adapter is not None and (Path(location.adapter) / "tokenizer_config.json").exists():
        name, kwargs = location.adapter, {"trust_remote_code": model.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer of {name} cannot be loaded: {_first(error)}", HUB_HINT) from error
    if model.chat_template is not None:
        tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
    return tokenizer


HUB_HINT = "Check model.name_or_path, the network, and HF_TOKEN for a gated model."


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_stock(plan: Plan, location: Location, dtype: torch.dtype) -> Any:
    """The bare model, weights in `dtype`, never believing itself quantised because of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    labels = plan.recipe.method.labels()
    kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    stock = "eager" if plan.resolved.attn_implementation == "eager" else "sdpa"
    kwargs = {**location.kwargs, "dtype": dtype, "attn_implementation": stock, **quantised(plan)}
    kwargs |= {} if labels is None else {"num_labels": labels}
    try:
        model = kind.from_pretrained(location.name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{location.name} cannot be loaded: {_first(error)}", HUB_HINT) from error
    if "gguf_file" in location.kwargs:
        forget_quantisation(model)
    for layer in model.modules():  # bitsandbytes would repack the weights for a CPU's inference, in place, for good
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    return model


def quantised(plan: Plan) -> dict[str, Any]:
    """Arguments of `from_pretrained` for frozen weights in 4 or 8 bits, each process on its own device."""
    asked = plan.recipe.quantization
    if asked is None:
        return {}
    from accelerate import PartialState
    from transformers import BitsAndBytesConfig

    told = {**asked.model_dump(), "bnb_4bit_compute_dtype": plan.resolved.bnb_4bit_compute_dtype}
    told |= {} if plan.recipe.method.labels() is None else {"llm_int8_skip_modules": ["score"]}
    return {"quantization_config": BitsAndBytesConfig(**told), "device_map": {"": PartialState().device}}


def forget_quantisation(model: Any) -> None:
    """GGUF weights are dequantised on loading, yet transformers marks the model and then refuses to save it."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def load_policy(plan: Plan, location: Location) -> Any:
    """The model to train: with a starting adapter, with fresh ones, or whole. What is trained is float32."""
    recipe = plan.recipe
    adapted = recipe.lora is not None or location.adapter is not None
    dtype = getattr(torch, plan.resolved.dtype if adapted else "float32")
    classifies = recipe.method.labels() is not None
    if location.adapter is not None and is_classifier(location.adapter) != classifies:
        raise ModelError(
            f"the adapter {location.adapter} is {'not ' if classifies else ''}one of a sequence classifier",
            f"{recipe.method.name} needs {'one, or a model without adapter' if classifies else 'a language model'}.",
        )
    model = load_stock(plan, location, dtype)
    if location.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, location.adapter, is_trainable=True, autocast_adapter_dtype=True)
    elif recipe.lora is not None:
        torch.manual_seed(recipe.seed)  # the adapters' own draw, whatever was drawn before
        model = lora.attach(model, recipe.lora, classifies=classifies)
    for p in model.parameters():
        if p.requires_grad:  # peft leaves modules that are trained in full as they were loaded
            p.data = p.data.float()
    lora.hasten(model)
    if plan.resolved.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def is_classifier(adapter: str) -> bool:
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return bool(config.get("task_type") == "SEQ_CLS")


def settle_pad(model: Any, tokenizer: Any, rows: Sequence[Row]) -> None:
    """Give a classifier a pad token that no row ends in: transformers reads its score at the last token that is no pad.

    The tokenizer's own where it may stay, else another of its special tokens; both are saved with the result.
    """
    ends = {(branch.ids or row.prefix)[-1] for row in rows for branch in row.branches}
    known = [tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(tokenizer.added_tokens_decoder)]
    free = next((i for i in known if i is not None and i not in ends and i != tokenizer.eos_token_id), None)
    pad = tokenizer.pad_token_id
    if pad is None or pad in ends:
        if free is None:
            raise ModelError("the tokenizer has no token to pad with", "Use a tokenizer with a pad token.")
        tokenizer.pad_token_id = pad = free
    model.config.get_text_config().pad_token_id = pad
    model.config.pad_token_id = pad


def declared_stops(location: Location, tokenizer: Any) -> list[int]:
    """The stop ids that the model's generation configuration declares, before any weight is read."""
    from transformers import GenerationConfig

    if "gguf_file" in location.kwargs:
        return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        declared = GenerationConfig.from_pretrained(location.name, **_revision(location)).eos_token_id
    except OSError:  # a model need not have one
        declared = None
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *ids]))


def _revision(location: Location) -> dict[str, Any]:
    return {"revision": location.kwargs["revision"]} if "revision" in location.kwargs else {}
