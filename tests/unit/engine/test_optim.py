"""Optimisers by transformers' names: each that the recipe takes is built, or says what is missing."""

import pytest
import torch

from finetune_cli.checks.lints import OPTIMISERS, REFUSED_OPTIMISERS
from finetune_cli.engine import optim
from finetune_cli.errors import MachineError, RecipeError
from finetune_cli.recipe.sections import Train

HERE = {
    "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW", "adafactor": "Adafactor", "sgd": "SGD", "adagrad": "Adagrad",
    "rmsprop": "RMSprop",
}  # fmt: skip
"""Those that need torch and transformers alone, and their classes."""
BITSANDBYTES = {name for name in OPTIMISERS if name not in HERE} - {
    "adamw_torch_4bit", "adamw_torch_8bit", "stable_adamw", "grokadamw",
}  # fmt: skip


def small() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model[2].requires_grad_(False)
    return model


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_name_is_built_or_its_package_is_named(name):
    """One step moves the weights, where the optimiser steps on a CPU."""
    model = small()
    train = Train(optim=name, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-7)
    try:
        made = optim.build(model, train, 1e-2)
    except MachineError as error:
        assert name not in HERE
        assert name in error.message  # noqa: PT017
        assert error.exit_code == 4  # noqa: PT017
        return
    assert made.param_groups[0]["lr"] == 1e-2
    if name in HERE:
        assert type(made).__name__ == HERE[name]
        before = model[0].weight.detach().clone()
        model(torch.ones(2, 3)).square().sum().backward()
        made.step()
        assert float((model[0].weight.detach() - before).abs().max()) > 1e-4
    if name.startswith("adamw_torch") and name in HERE:
        group = made.param_groups[0]
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-7)
        assert bool(group["fused"]) == (name == "adamw_torch_fused")


@pytest.mark.parametrize("name", sorted(BITSANDBYTES))
def test_bitsandbytes_ones_are_built_where_it_is_installed(name):
    pytest.importorskip("bitsandbytes")
    assert type(optim.build(small(), Train(optim=name), 1e-3)).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize(
    "name", [*REFUSED_OPTIMISERS, "schedule_free_adamw", "galore_adamw_8bit", "adamw_trch", "adam"]
)
def test_others_are_refused_by_name_before_anything_is_loaded(recipe_of, name):
    from finetune_cli.commands import checked
    from finetune_cli.errors import RecipeError

    with pytest.raises(RecipeError) as caught:
        checked(recipe_of(train={"optim": name}), [])
    (problem,) = caught.value.problems
    assert (problem.key, problem.rule) == ("train.optim", "FT102")
    assert name in problem.message
    reason = next(
        (reason for prefix, reason in REFUSED_OPTIMISERS.items() if name.startswith(prefix)), "unknown optimiser"
    )
    assert reason in problem.message


def test_every_ordinary_name_of_transformers_is_taken_or_refused():
    """A name that a new transformers brings is looked at once."""
    from transformers.training_args import OptimizerNames

    names = {str(one.value) for one in OptimizerNames}
    refused = {name for name in names if name.startswith(tuple(REFUSED_OPTIMISERS))}
    assert set(OPTIMISERS) <= names
    assert names - set(OPTIMISERS) - refused == set()


def test_matrices_decay_and_norms_and_biases_do_not():
    model = small()
    decaying, others = optim.groups(model, 0.1)
    assert decaying["weight_decay"] == 0.1
    assert [p is model[0].weight for p in decaying["params"]] == [True]
    assert others["weight_decay"] == 0.0
    assert {id(p) for p in others["params"]} == {id(p) for p in (model[0].bias, model[1].weight, model[1].bias)}


def test_a_group_without_weights_is_left_out():
    """LoRA trains matrices alone."""
    model = torch.nn.Linear(3, 4, bias=False)
    assert [len(group["params"]) for group in optim.groups(model, 0.1)] == [1]


@pytest.mark.parametrize(
    ("setting", "steps"), [({}, 3), ({"warmup_ratio": 0.0}, 0), ({"warmup_steps": 7}, 7), ({"warmup_steps": 0}, 0)]
)
def test_warmup(setting, steps):
    assert optim.warmup_steps(Train(**setting), 100) == steps


def rates(**setting):
    made = optim.build(small(), Train(**setting), 1.0)
    course = optim.schedule(made, Train(**setting), 10)
    out = []
    for _ in range(10):
        out.append(course.get_last_lr()[0])
        made.step()
        course.step()
    return out


def test_courses_of_the_learning_rate():
    """Ten steps, two of them warmup: 0, 1/2, then the peak at step 2 (counted from 0)."""
    cosine = rates(lr_scheduler_type="cosine", warmup_steps=2)
    assert cosine[:3] == pytest.approx([0, 0.5, 1])
    assert cosine[6] == pytest.approx(0.5)
    assert rates(lr_scheduler_type="linear", warmup_steps=2)[2:] == pytest.approx([1 - n / 8 for n in range(8)])
    assert rates(lr_scheduler_type="constant", warmup_steps=0) == [1] * 10
    floor = rates(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 0.25}, warmup_steps=0)
    assert min(floor) > 0.25
    assert floor[5] == pytest.approx(0.625)


@pytest.mark.parametrize("kind", Train.model_json_schema()["properties"]["lr_scheduler_type"]["enum"])
def test_every_course_is_made(kind):
    more = {"warmup_stable_decay": {"num_decay_steps": 3}, "cosine_with_min_lr": {"min_lr": 0.1}}.get(kind, {})
    assert len(rates(lr_scheduler_type=kind, lr_scheduler_kwargs=more, warmup_steps=1)) == 10


def test_a_course_that_lacks_what_it_needs_is_named():
    for kind, missing in (("warmup_stable_decay", "num_decay_steps"), ("cosine_with_min_lr", "min_lr")):
        with pytest.raises(RecipeError, match=f"{kind} cannot be made: .*{missing}") as caught:
            rates(lr_scheduler_type=kind, warmup_steps=1)
        assert "lr_scheduler_kwargs" in caught.value.hint
