"""Optimisers and schedules, by the names transformers gives them."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from finetune_cli.errors import MachineError, RecipeError
from finetune_cli.recipe.sections import Train


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    split = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in split if group["params"]]


def build(model: nn.Module, train: Train, learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser by transformers' own table. Raises MachineError where its package is missing."""
    from transformers import Trainer

    # a plain namespace: making real TrainingArguments resets the process group that is already joined
    args: Any = SimpleNamespace(
        optim=train.optim,
        optim_args=None,
        learning_rate=learning_rate,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
    )
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer: torch.optim.Optimizer = kind(groups(model, train.weight_decay), **kwargs)
    except (ImportError, ValueError) as error:
        raise MachineError(f"train.optim {train.optim} cannot be used here: {error}", "Name another one.") from error
    return optimizer


def warmup_steps(train: Train, total: int) -> int:
    return train.warmup_steps if train.warmup_steps is not None else round(train.warmup_ratio * total)


def schedule(optimizer: torch.optim.Optimizer, train: Train, total: int) -> Any:
    """The learning rate's course over `total` optimiser steps."""
    from transformers import get_scheduler

    kwargs = dict(train.lr_scheduler_kwargs) or None
    warmup = warmup_steps(train, total)
    try:
        return get_scheduler(
            train.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        said = str(error).rpartition("() ")[2]
        hint = "Give what it needs in train.lr_scheduler_kwargs, or choose cosine, linear or constant."
        raise RecipeError(f"train.lr_scheduler_type {train.lr_scheduler_type} cannot be made: {said}", hint) from error


def move(scheduler: Any, place: int) -> None:
    """Put a fresh schedule where it is after `place` steps, whatever the optimiser's learning rates were."""
    scheduler.last_epoch = place
    rates = [base * rate(place) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def named_trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
