"""Models and tokenizers, loaded as the plan says."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from finetune_cli.data import builtin
from finetune_cli.engine import lora, norms
from finetune_cli.engine.manifest import BASE
from finetune_cli.engine.packed import pack_head
from finetune_cli.errors import ModelError
from finetune_cli.log import LOGGER
from finetune_cli.plan.memory import room_of
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.sections import Model, Recipe
from finetune_cli.types import Row


@dataclass(frozen=True)
class Location:
    """Where a model is loaded from: arguments of `from_pretrained`, and the adapter on top of it."""

    name: str
    kwargs: dict[str, Any]
    adapter: str | None = None
    merge: str | None = None
    """An adapter that becomes part of the model before anything else (`merged_base`)."""


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
        if model.starting_adapter == "merge":
            return Location(base_of_adapter, kwargs, merge=name)
        return Location(base_of_adapter, kwargs, adapter=name)
    return Location(name, kwargs)


def load_tokenizer(model: Model, location: Location) -> Any:
    """The tokenizer beside the model or the adapter, with the recipe's own template where it names one."""
    from transformers import AutoTokenizer

    name, kwargs = location.name, location.kwargs
    adapter = location.adapter or location.merge
    if adapter is not None and (Path(adapter) / "tokenizer_config.json").exists():
        name, kwargs = adapter, {"trust_remote_code": model.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the tokenizer of {name} cannot be loaded: {_first(error)}", HUB_HINT) from error
    if model.chat_template is not None:
        tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
    if model.new_tokens:
        tokenizer.add_tokens(model.new_tokens, special_tokens=True)
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
    name = location.name if location.merge is None else str(merged_base(plan, location))
    kwargs = {**(location.kwargs if location.merge is None else {}), "dtype": dtype, "attn_implementation": stock}
    kwargs |= quantised(plan) | ({} if labels is None else {"num_labels": labels})
    try:
        model = kind.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{name} cannot be loaded: {_first(error)}", HUB_HINT) from error
    if "gguf_file" in location.kwargs:
        forget_quantisation(model)
    for layer in model.modules():  # bitsandbytes would repack the weights for a CPU's inference, in place, for good
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    if plan.recipe.model.new_tokens or (location.adapter is not None and brings_tokens(location.adapter)):
        make_room(model, load_tokenizer(plan.recipe.model, location))
    return model


def make_room(model: Any, tokenizer: Any) -> None:
    """A row of the embedding for every token; new rows are drawn around the mean of the others."""
    wanted = max(tokenizer.get_vocab().values()) + 1
    if wanted > model.get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same in every process and at every load
            model.resize_token_embeddings(wanted)


def brings_tokens(adapter: str) -> bool:
    """Whether rows of the embedding were trained and saved with an adapter."""
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    return bool(config.get("trainable_token_indices")) or "embed_tokens" in (config.get("modules_to_save") or [])


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


def merged_base(plan: Plan, location: Location) -> Path:
    """The folder, in the run's, of the base that the starting adapter has become part of. It is made by the process
    that comes first, in float32 and rounded once, whatever it is quantised to afterwards; a run that goes on finds it.
    """
    folder = plan.run / BASE
    with FileLock(folder.with_name(f".{BASE}.lock")):
        if not (folder / "config.json").is_file():
            write_merged(plan, location, folder)
            LOGGER.info("the starting adapter is merged into its base, which is kept in %s", folder)
    return folder


def write_merged(plan: Plan, location: Location, folder: Path) -> None:
    """Raises ModelError where a language model is asked for and the adapter is one of a classifier."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    assert location.merge is not None
    classifies, labels = is_classifier(location.merge), plan.recipe.method.labels()
    if classifies and labels is None:
        raise ModelError(f"the adapter {location.merge} is one of a sequence classifier", "Name a language model's.")
    dtype = getattr(torch, plan.resolved.dtype)
    kind, more = (
        (AutoModelForSequenceClassification, {"num_labels": labels}) if classifies else (AutoModelForCausalLM, {})
    )
    try:
        base = kind.from_pretrained(location.name, dtype=dtype, **location.kwargs, **more)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{location.name} cannot be loaded: {_first(error)}", HUB_HINT) from error
    if "gguf_file" in location.kwargs:
        forget_quantisation(base)
    if brings_tokens(location.merge):
        make_room(base, load_tokenizer(plan.recipe.model, location))
    base.float()
    made: Any = PeftModel.from_pretrained(base, location.merge).merge_and_unload()
    untie(made)
    beside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    made.to(dtype).save_pretrained(beside)
    load_tokenizer(plan.recipe.model, location).save_pretrained(beside)
    beside.rename(folder)


def untie(model: Any) -> None:
    """Where embedding and head have become two, the configuration says so; else one of them would be lost."""
    head, text = model.get_output_embeddings(), model.config.get_text_config()
    if head is not None and getattr(text, "tie_word_embeddings", False):
        embedding = model.get_input_embeddings().weight
        if head.weight.data_ptr() != embedding.data_ptr() and not torch.equal(head.weight, embedding):
            model.config.tie_word_embeddings = text.tie_word_embeddings = False


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
    unused = lora.towers(model)
    if location.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, location.adapter, is_trainable=True, autocast_adapter_dtype=True)
    elif recipe.lora is not None:
        torch.manual_seed(recipe.seed)  # the adapters' own draw, whatever was drawn before
        tokens = lora.tokens_of(recipe, load_tokenizer(recipe.model, location)) if learns_tokens(recipe) else []
        model = lora.attach(model, recipe.lora, classifies=classifies, tokens=tokens)
    for name, p in model.named_parameters():
        if any(f".{part}." in f".{name}" for part in unused):
            p.requires_grad_(False)
        if p.requires_grad:  # peft leaves modules that are trained in full as they were loaded
            p.data = p.data.float()
    lora.hasten(model, room=room_of(plan))
    pack_head(model, room_of(plan))
    norms.hasten(model)
    if plan.resolved.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def learns_tokens(recipe: Recipe) -> bool:
    return bool(recipe.model.new_tokens or (recipe.lora is not None and recipe.lora.trainable_token_indices))


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
    brought = location.merge is not None and (Path(location.merge) / "generation_config.json").is_file()
    told = (location.merge, {}) if brought else (location.name, _revision(location))
    try:
        declared = GenerationConfig.from_pretrained(told[0], **told[1]).eos_token_id
    except OSError:  # a model need not have one
        declared = None
    ids = [] if declared is None else declared if isinstance(declared, list) else [declared]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *ids]))


def _revision(location: Location) -> dict[str, Any]:
    return {"revision": location.kwargs["revision"]} if "revision" in location.kwargs else {}
