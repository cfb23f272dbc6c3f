"""The published schema takes what the reader takes: every short form, and no key that is not there."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from jsonschema import Draft202012Validator, ValidationError
from pydantic import Field

from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe import yaml
from finetune_cli.recipe.schema import published, recipe_schema
from finetune_cli.recipe.sections import Recipe
from finetune_cli.shipped import recipes_folder
from finetune_cli.spec import OneOrMany, Spec

SHORT = {"method": "sft", "model": "org/m", "data": "train.jsonl", "output_dir": "runs/x"}
FULL = {
    "method": {"name": "sft", "loss_on": "assistant", "packing": True},
    "model": {"name_or_path": "org/m", "dtype": "bfloat16"},
    "data": {"train": [{"path": "train.jsonl", "weight": 2, "roles": {"assistant": ["bot"]}}], "max_length": 512},
    "output_dir": "runs/x",
    "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "quantization": {"load_in_4bit": True},
    "train": {"learning_rate": 2e-5, "global_batch_size": 32, "gradient_checkpointing": False},
    "logging": {"report_to": ["tensorboard", "wandb"]},
}


class Pairs(Spec):
    """Stands in for DPO."""

    shorthand: ClassVar = "name"
    name: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    loss_type: Annotated[list[Literal["sigmoid", "ipo"]], OneOrMany()] = ["sigmoid"]


class Rewarded(Spec):
    """Stands in for PPO: its block cannot be left out."""

    shorthand: ClassVar = "name"
    name: Literal["ppo"] = "ppo"
    reward: str


class Several(Recipe):
    """Methods as a discriminated union."""

    method: Annotated[Pairs | Rewarded, Field(discriminator="name")]  # type: ignore[assignment]


def errors(recipe: dict[str, Any], *, root: type[Recipe] = Recipe) -> list[str]:
    """Where the schema refuses the recipe, and within that why each alternative does, as `dotted.key: message`."""
    return list(told(Draft202012Validator(recipe_schema(root=root)).iter_errors(recipe)))


def told(found: Iterable[ValidationError]) -> Iterator[str]:
    for error in found:
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        yield from told(error.context or ())


def test_the_schemas_are_schemas() -> None:
    Draft202012Validator.check_schema(recipe_schema())
    Draft202012Validator.check_schema(recipe_schema(root=Several))
    Draft202012Validator.check_schema(published(Plan, "plan.schema.json", mode="serialization"))
    assert recipe_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


@pytest.mark.parametrize(
    "change",
    [
        {},
        FULL,
        {"data": ["a.jsonl", {"path": "b.jsonl", "weight": 0.5}]},
        {"data": {"train": "a.jsonl"}},
        {"data": {"train": {"path": "a.jsonl", "roles": {"assistant": "bot"}}}},
        {"data": {"train": ["a.jsonl", "b.jsonl"]}},
        {"data": {"train": "a.jsonl", "eval_sets": "b.jsonl"}},
        {"data": {"train": "a.jsonl", "eval_sets": {"path": "b.jsonl", "split": "test"}}},
        {"data": {"train": "a.jsonl", "eval_sets": {"code": "b.jsonl", "chat": {"path": "c.jsonl"}}}},
        {"data": {"train": "a.jsonl", "eval_sets": None}},
        {"logging": {"report_to": "wandb"}},
        {"lora": {"target_modules": "all-linear", "modules_to_save": "lm_head"}},
        {"lora": {"modules_to_save": None}},
        {"lora": None, "quantization": None},
        {"train": {"learning_rate": "auto", "lr_scheduler_kwargs": {"min_lr": 1e-6}}},
        {"ignore": "FT016"},
        {"method": {"name": "sft"}},
    ],
)
def test_every_form_is_taken(change: dict[str, Any]) -> None:
    assert errors({**SHORT, **change}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"learning_rat": 1e-5}}, "'learning_rat' was unexpected"),
        ({"max_seq_length": 512}, "'max_seq_length' was unexpected"),
        ({"data": {"path": "a.jsonl"}}, "'path' was unexpected"),
        ({"data": {"train": [{"path": "a.jsonl", "wieght": 2}]}}, "'wieght' was unexpected"),
        ({"data": {"train": []}}, "data.train: [] should be non-empty"),
        ({"data": {"train": [{"weight": 2}]}}, "'path' is a required property"),
        ({"data": {"max_length": 512}}, "'train' is a required property"),
        ({"model": {"revision": "main"}}, "'name_or_path' is a required property"),
        ({"method": {"packing": True}}, "'name' is a required property"),
        ({"method": {"name": "sft", "beta": 0.1}}, "'beta' was unexpected"),
        ({"method": "stf"}, "'sft' was expected"),
        ({"train": {"learning_rate": "2e-5"}}, "'2e-5' is not of type 'number'"),
        ({"train": {"learning_rate": 0}}, "0 is less than or equal to the minimum of 0"),
        ({"train": None}, "None is not of type 'object'"),
        ({"extends": ["base.yaml"]}, "is not of type 'string'"),
    ],
)
def test_what_the_reader_refuses_is_refused(change: dict[str, Any], message: str) -> None:
    assert message in "\n".join(errors({**SHORT, **change}))


@pytest.mark.parametrize("key", SHORT)
def test_a_recipe_that_stands_alone_has_the_required_keys(key: str) -> None:
    assert errors({k: v for k, v in SHORT.items() if k != key}) == [f": {key!r} is a required property"]


@pytest.mark.parametrize(
    "rest",
    [{}, {"data": {"max_length": 512}}, {"model": {"revision": "main"}}, {"method": {"packing": True}}, {"seed": 1}],
)
def test_a_recipe_that_extends_another_may_be_in_part(rest: dict[str, Any]) -> None:
    assert errors({"extends": "base.yaml", **rest}) == []
    assert "'learning_rat' was unexpected" in "\n".join(errors({"extends": "base.yaml", "train": {"learning_rat": 1}}))


@pytest.mark.parametrize(
    ("method", "fine"),
    [
        ("dpo", True),
        ({"name": "dpo", "beta": 0.2, "loss_type": "ipo"}, True),
        ({"name": "dpo", "loss_type": ["sigmoid", "ipo"]}, True),
        ({"name": "dpo", "loss_type": "ipx"}, False),
        ({"name": "dpo", "reward": "r"}, False),
        ({"beta": 0.2}, False),
        ("ppo", False),
        ({"name": "ppo"}, False),
        ({"name": "ppo", "reward": "r"}, True),
        ({"name": "kto"}, False),
    ],
)
def test_a_method_takes_its_own_keys(method: object, fine: bool) -> None:
    assert (errors({**SHORT, "method": method}, root=Several) == []) is fine


@pytest.mark.parametrize("method", [{"beta": 0.2}, {"reward": "r"}, {"name": "ppo"}, "dpo"])
def test_part_of_a_method_goes_over_that_of_the_base(method: object) -> None:
    assert errors({"extends": "base.yaml", "method": method}, root=Several) == []


def test_every_key_says_what_it_is() -> None:
    schema = recipe_schema()
    blocks = [schema, *(block for one in schema["$defs"].values() for block in one.get("anyOf", [one]))]
    keys = {key: where for block in blocks for key, where in block.get("properties", {}).items()}
    assert len(keys) > 80
    assert [key for key, where in keys.items() if not where.get("description")] == []


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("**/*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    node, problems = yaml.parse(path.read_text(encoding="utf-8"), path.name)
    assert problems == []
    assert node is not None
    assert errors(node.plain()) == []
