"""Recipes with one method and with two, whatever is registered."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune_cli.recipe.sections import Recipe
from finetune_cli.spec import InputPath, OneOrMany, Spec

GOOD = "method: sft\nmodel: org/m\ndata: train.jsonl\noutput_dir: runs/x\n"


class Plain(Spec):
    """Stands in for SFT."""

    shorthand: ClassVar = "name"
    name: Literal["sft"] = "sft"
    loss_on: Literal["assistant", "completion", "all"] | None = None
    packing: bool = False


class Pairs(Spec):
    """Stands in for DPO."""

    shorthand: ClassVar = "name"
    name: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    loss_type: Annotated[list[Literal["sigmoid", "ipo"]], OneOrMany()] = ["sigmoid"]
    ref_model: Annotated[str, InputPath()] | None = None


class Two(Recipe):
    """Methods as a discriminated union."""

    method: Annotated[Plain | Pairs, Field(discriminator="name")]


class One(Recipe):
    """A single method."""

    method: Plain
