"""Adapters: attaching them, computing them at less cost, and counting what is trained."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

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


class Adapted(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T, with W and b frozen (LoRA, arXiv 2106.09685).

    Six products and no element-wise pass: every sum happens inside a product, and what is kept is x, which layers of
    the same input share, and x A^T. Written as a chain of layers the adapter costs as many passes over the outputs,
    and a float32 copy of x, again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            x_TI, weight_OI, a_RI, b_OR = (
                x.to(dtype).reshape(-1, x.shape[-1]),
                *(w.to(dtype) for w in (weight_OI, a_RI, b_OR)),
            )
            y_TO = F.linear(x_TI, weight_OI, None if bias_O is None else bias_O.to(dtype))
            u_TR = x_TI @ a_RI.T
            torch.addmm(y_TO, u_TR, b_OR.T, alpha=scaling, out=y_TO)
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, u_TR)
        ctx.scaling, ctx.shape = scaling, x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, a_RI, b_OR, u_TR = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dy_TO = dy.reshape(-1, dy.shape[-1])
            du_TR = (dy_TO @ b_OR).mul_(ctx.scaling)
            dx_TI = None
            if ctx.needs_input_grad[0]:
                dx_TI = dy_TO @ weight_OI
                torch.addmm(dx_TI, du_TR, a_RI, out=dx_TI)
            da_RI = du_TR.T @ x_TI
            db_OR = (u_TR.T @ dy_TO).mul_(ctx.scaling).T
        return None if dx_TI is None else dx_TI.view(ctx.shape), None, None, da_RI, db_OR, None


class FastLinear(LoraLinear):  # type: ignore[misc]
    """peft's layer, computed by `Adapted` where that is the same thing; everywhere else as peft does."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain(kwargs)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
        made: Any = Adapted.apply
        y: Tensor = made(x, base.weight, base.bias, a, b, self.scaling[name])
        return y

    def _plain(self, kwargs: Any) -> str | None:
        """The active adapter, where it is the only one, plain LoRA, not merged, and drops nothing out."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or kwargs or active[0] in self.lora_variant:
            return None
        dropout, bias = self.lora_dropout[active[0]], self.lora_B[active[0]].bias
        quiet = isinstance(dropout, nn.Identity) or not self.training
        return active[0] if quiet and bias is None else None


def hasten(model: nn.Module) -> None:
    """Let every plain adapter on a frozen linear layer be computed by `Adapted`."""
    for layer in model.modules():
        base = layer.base_layer if type(layer) is LoraLinear else None
        if type(base) is nn.Linear and not any(p.requires_grad for p in base.parameters()):
            layer.__class__ = FastLinear
