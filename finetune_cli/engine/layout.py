"""Whether a model can take rows end to end; found by looking at it and by trying, said where it cannot."""

from typing import Any

import torch
from torch import nn

from finetune_cli.data.batches import Batch, padded, tree
from finetune_cli.engine.attention import NAME, register
from finetune_cli.engine.score import trunk_of
from finetune_cli.recipe.sections import Model
from finetune_cli.types import Branch, Row

KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def choose(model: Any, setting: Model) -> str | None:
    """Why rows are padded; None where they will lie end to end."""
    if setting.layout == "padded":
        return "model.layout is padded"
    if setting.attn_implementation == "eager":
        return "model.attn_implementation is eager, the stock forward"
    return use_tree(model)


def use_tree(model: Any) -> str | None:
    """Switch a model to segments. None where it is right; else the reason, and the model is as it was."""
    register()
    config = model.config.get_text_config()
    before = config._attn_implementation
    reason = unfit(model) or _switch(model, config) or _probe(model)
    if reason is not None:
        model.set_attn_implementation(before)
    return reason


def unfit(model: Any) -> str | None:
    """What speaks against it without running anything."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    if getattr(model, "_is_stateful", False):
        return "the model carries a state from token to token, which would run across rows"
    if kinds - KNOWN_LAYERS:
        return f"it has {', '.join(sorted(kinds - KNOWN_LAYERS))} layers, which would run across rows"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "it has convolutions over tokens, which would run across rows"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    return None


def _switch(model: Any, config: Any) -> str | None:
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, KeyError, ImportError) as error:
        return f"its attention cannot be exchanged ({type(error).__name__})"
    if config._attn_implementation != NAME:
        return "its attention cannot be exchanged"
    return None


@torch.no_grad()
def _probe(model: Any) -> str | None:
    """Nine tokens with a shared prefix must give the states that they give as two padded rows, each as a whole: in
    bfloat16 SmolLM2's are 8% off those of float32 (of their length; one number of them by more than a standard
    deviation), whichever attention computes them, while states that crossed rows are another vector."""
    size = model.config.get_text_config().vocab_size
    ids = [3 % size, 5 % size, 7 % size, 11 % size, 13 % size, 17 % size, 19 % size, 23 % size, 29 % size]
    row = Row(ids[:4], tuple(Branch(b, [True] * len(b)) for b in (ids[4:7], ids[7:])))
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        shared, alone = (_states(model, batch.to(device)) for batch in (tree([row]), padded([row], 0)))
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
        return f"a trial of it failed ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    finally:
        model.train(training)
    if shared is None or alone is None:
        return "its layers do not all go through the attention interface"
    off = float(((shared - alone).norm(dim=-1) / alone.norm(dim=-1).clamp_min(1e-6)).max())
    limit = 0.01 if shared.dtype == torch.float32 else 0.25
    return None if off < limit else f"a trial gave other states than padded rows ({off:.0%} off)"


def _states(model: Any, batch: Batch) -> torch.Tensor | None:
    hidden: torch.Tensor = trunk_of(model)(**batch.inputs()).last_hidden_state.flatten(0, 1)[batch.read_N]
    layers = model.config.get_text_config().num_hidden_layers
    complete = batch.segments is None or batch.segments.seen >= layers
    return hidden if complete else None
