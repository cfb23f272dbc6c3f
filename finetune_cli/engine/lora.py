"""Adapters: attaching them, computing them at less cost, and counting what is trained."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_cli.engine.packed import pack, packed, times
from finetune_cli.errors import ModelError
from finetune_cli.recipe.sections import Lora, Recipe


def attach(model: Any, lora: Lora, *, classifies: bool = False, tokens: Sequence[int] = ()) -> Any:
    """The model with fresh adapters in float32, on the layers that `target_modules` names; a classifier's head is
    trained and saved with them, and so are the rows of `tokens` in embedding and head.

    Raises ModelError where it names none.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    told = {
        **lora.model_dump(),
        "trainable_token_indices": rows_by_layer(model, tokens, whole=lora.modules_to_save or ()),
        "exclude_modules": text_only(lora.exclude_modules, towers(model)),
    }
    if lora.layers_to_transform is not None and lora.target_modules == "all-linear":  # peft wants names with it
        told["target_modules"] = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    try:
        config = LoraConfig(task_type=TaskType.SEQ_CLS if classifies else TaskType.CAUSAL_LM, **told)
        return get_peft_model(model, config, autocast_adapter_dtype=True)
    except ValueError as error:  # peft: no layer matches
        names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"lora.target_modules {lora.target_modules!r} fits no layer: {error}",
            f"The linear layers of this model are called {', '.join(names)}; all-linear takes them all.",
        ) from error


def towers(model: Any) -> list[str]:
    """Names of the parts of a language model that see or hear. Text does not go through them: what is trained there
    gets no gradient, which several processes would wait for."""
    if model.config.get_text_config() is model.config or model.config.is_encoder_decoder:
        return []
    decoder, named = model.get_decoder(), dict(model.named_modules())
    path = next(name for name, module in named.items() if module is decoder)
    steps, found = path.split("."), []
    for depth in range(1, len(steps)):  # beside the trunk itself are only heads
        above = ".".join(steps[:depth])
        found += [f"{above}.{name}" for name, _ in named[above].named_children() if name != steps[depth]]
    return found


def text_only(excluded: str | Sequence[str] | None, parts: Sequence[str]) -> str | list[str] | None:
    """`lora.exclude_modules`, and these parts with all that is in them, as one pattern."""
    if not parts:
        return excluded if excluded is None or isinstance(excluded, str) else list(excluded)
    patterns = [rf"({'|'.join(map(re.escape, parts))})(\..*)?"]
    if isinstance(excluded, str):
        patterns.append(excluded)
    elif excluded:
        patterns.append(rf"(.*\.)?({'|'.join(map(re.escape, excluded))})")
    return "|".join(f"({pattern})" for pattern in patterns)


LAYERS = "layers", "h", "blocks"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name; the head is outside."""
    named = ((name, module) for name, module in model.named_modules() if {*name.split(".")} & {*LAYERS})
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


def rows_by_layer(model: Any, tokens: Sequence[int], *, whole: Sequence[str]) -> dict[str, list[int]] | None:
    """The rows of `tokens` under the names of the layers that hold them; a head that is tied has none of its own, and
    one that is trained as a `whole` has them already."""
    if not tokens:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    return {names[id(layer)]: [*tokens] for layer in layers if names[id(layer)] not in whole}


def tokens_of(recipe: Recipe, tokenizer: Any) -> list[int]:
    """Ids of the tokens whose rows are trained beside adapters: those that are new, and those that are named.

    Raises ModelError for a text that is no token, or an id that there is not.
    """
    lora, found = recipe.lora, dict[int, None]()
    saved = (lora.modules_to_save or []) if lora is not None else []
    if lora is None or "embed_tokens" in saved:
        return []
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    for token in (*(recipe.model.new_tokens or ()), *(lora.trainable_token_indices or ())):
        number = vocabulary.get(token) if isinstance(token, str) else token
        if number is None or not 0 <= number <= max(vocabulary.values()):
            raise ModelError(
                f"lora.trainable_token_indices: {token!r} is no token of the tokenizer",
                "Name a token as the vocabulary has it, or add it with model.new_tokens.",
            )
        found[number] = None
    return list(found)


def sizes(model: nn.Module) -> tuple[int, int]:
    """(trained weights, all weights)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return trained, sum(p.numel() if state is None else state.shape.numel() for p, state in states)  # 4 bits: 2 a byte


class Adapted(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T, with W and b of the base layer frozen (LoRA, arXiv 2106.09685).

    Six products and no element-wise pass: every sum happens inside a product, and what is kept is x, which layers of
    the same input share, and x A^T. Written as a chain of layers the adapter costs as many passes over the outputs,
    and a float32 copy of x, again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor, base: Any, scaling: float) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x_TI, a_RI, b_OR = x.to(dtype).reshape(-1, x.shape[-1]), a_RI.to(dtype), b_OR.to(dtype)
            y_TO = product(x_TI, base)
            u_TR = x_TI @ a_RI.T
            torch.addmm(y_TO, u_TR, b_OR.T, alpha=scaling, out=y_TO)
        ctx.save_for_backward(x_TI, a_RI, b_OR, u_TR)
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape
        # no view to autograd, because some models add to a layer's result in place
        y: Tensor = torch.ops.aten._unsafe_view.default(y_TO, [*x.shape[:-1], y_TO.shape[-1]])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, a_RI, b_OR, u_TR = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dy_TO = dy.reshape(-1, dy.shape[-1])
            du_TR = (dy_TO @ b_OR).mul_(ctx.scaling)
            dx_TI = None
            if ctx.needs_input_grad[0]:
                dx_TI = product_back(dy_TO, ctx.base)
                torch.addmm(dx_TI, du_TR, a_RI, out=dx_TI)
            da_RI = du_TR.T @ x_TI
            db_OR = (u_TR.T @ dy_TO).mul_(ctx.scaling).T
        return None if dx_TI is None else dx_TI.view(ctx.shape), da_RI, db_OR, None, None


FEW = 64
"""Rows up to which an adapter's products take less time in float32 on a CPU: 20 us in place of 45 for eight rows."""


def drawn(layer: Any, name: str) -> Callable[..., Tensor]:
    """The forward of a layer with the adapter `name` while answers are drawn: no graph, nothing asked twice. Of the few
    rows of a token, what goes on around the products takes as long as they do."""
    base, usual, scaling = layer.base_layer, type(layer).forward, layer.scaling[name]
    a_IR, b_RO = layer.lora_A[name].weight.T, layer.lora_B[name].weight.T
    a_wide_IR, b_wide_RO = a_IR.float(), b_RO.float() * scaling
    dtype, wide, copies = base.weight.dtype, base.weight.device.type == "cpu", packed(base, base.weight.dtype)
    multiply, weight = (F.linear, base.weight) if copies is None else (times, copies.forward)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype != dtype or kwargs:
            return usual(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
        x_TI = x.reshape(-1, x.shape[-1])
        y_TO = multiply(x_TI, weight, base.bias)
        if wide and len(x_TI) <= FEW:
            y_TO += x_TI.float() @ a_wide_IR @ b_wide_RO
        else:
            torch.addmm(y_TO, x_TI @ a_IR, b_RO, alpha=scaling, out=y_TO)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    return forward


def bare(x: Tensor, base: nn.Module) -> Tensor:
    """The layer without its adapter and without a graph."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if packed(base, dtype) is None:
        return type(base).forward(base, x)  # type: ignore[no-any-return]  # not what `whole_states` put there
    with torch.autocast(x.device.type, enabled=False):
        y_TO = product(x.to(dtype).reshape(-1, x.shape[-1]), base)
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


@contextmanager
def drawing(model: nn.Module) -> Iterator[None]:
    """Plain adapters on layers of full width as `drawn` has them. Not wherever there is no graph: a policy and its
    reference are equal to the last bit, one with a graph and one without."""
    layers = [layer for layer in model.modules() if isinstance(layer, Fast)]
    quick = [(layer, name) for layer in layers if (name := layer.drawn_as()) is not None]
    for layer, name in quick:
        layer.forward = drawn(layer, name)
    try:
        yield
    finally:
        for layer, _ in quick:
            del layer.forward


def product(x_TI: Tensor, base: Any) -> Tensor:
    """x W^T + b of a frozen layer, in the format of x. [T, O]"""
    bias_O = None if base.bias is None else base.bias.to(x_TI.dtype)
    copies = packed(base, x_TI.dtype)
    return F.linear(x_TI, frozen(base, x_TI.dtype), bias_O) if copies is None else times(x_TI, copies.forward, bias_O)


def product_back(dy_TO: Tensor, base: Any) -> Tensor:
    """dy W. [T, I]"""
    copies = packed(base, dy_TO.dtype)
    if copies is None or copies.backward is None:
        return dy_TO @ frozen(base, dy_TO.dtype)
    return times(dy_TO, copies.backward)


def frozen(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The base layer's weight [O, I] as it is multiplied with, 4-bit weights written out for the time of a product."""
    weight: Any = base.weight
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    wide: Tensor = weight.to(dtype)
    return wide


class Fast:
    """A layer of peft's, computed by `Adapted` where that is the same thing; everywhere else as peft does."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain(kwargs)
        if name is None:
            quiet = self.disable_adapters and not (self.merged or kwargs or torch.is_grad_enabled())
            if quiet and "packed" in self.base_layer.__dict__:
                return bare(x, self.base_layer)
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        made: Any = Adapted.apply
        weights = self.lora_A[name].weight, self.lora_B[name].weight
        y: Tensor = made(x, *weights, self.base_layer, self.scaling[name])
        return y

    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        """peft writes into the base's weight past all that would tell of it."""
        self.base_layer.__dict__.pop("packed", None)
        super().merge(*args, **kwargs)  # type: ignore[misc]

    def unmerge(self: Any) -> None:
        self.base_layer.__dict__.pop("packed", None)
        super().unmerge()  # type: ignore[misc]

    def drawn_as(self: Any) -> str | None:
        """The adapter, where `drawn` computes the layer: nothing is cast there."""
        name = self._plain({})
        return name if name is not None and self.lora_A[name].weight.dtype == self.base_layer.weight.dtype else None

    def _plain(self: Any, kwargs: Any) -> str | None:
        """The active adapter, where it is the only one, plain LoRA, not merged, and drops nothing out."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or kwargs or active[0] in self.lora_variant:
            return None
        dropout, bias = self.lora_dropout[active[0]], self.lora_B[active[0]].bias
        quiet = isinstance(dropout, nn.Identity) or not self.training
        return active[0] if quiet and bias is None else None


@cache
def fast(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fast{kind.__name__}", (Fast, kind), {"__module__": __name__})


def hasten(model: nn.Module, *, room: float = 0.0) -> None:
    """Let every plain adapter on a frozen linear layer, of full width or of 4 bits, be computed by `Adapted`; up to
    `room` bytes may be taken for copies of frozen weights (`engine/packed.py`)."""
    able: list[nn.Linear] = []
    for layer in model.modules():
        base: Any = getattr(layer, "base_layer", None)
        if (type(layer).__name__, type(base).__name__) not in (("Linear", "Linear"), ("Linear4bit", "Linear4bit")):
            continue
        if type(layer).__module__.startswith("peft.tuners.lora") and not any(
            p.requires_grad for p in base.parameters()
        ):
            layer.__class__ = fast(type(layer))  # type: ignore[arg-type]
            able += [] if layer.lora_variant else [base]
    pack(able, room)
