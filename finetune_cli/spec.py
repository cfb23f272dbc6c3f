"""Spec: the base of everything that a recipe or a plan is made of. Frozen, strict, and its own manual."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Spec(BaseModel):
    """A frozen value whose field docstrings are the manual. Unknown keys are errors; text is not a number."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
        strict=True,
    )

    shorthand: ClassVar[str | None] = None
    """The field that a bare value stands for: `model: X` is `model: {name_or_path: X}`."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        if cls.shorthand is None or handler.mode == "serialization":
            return schema
        block = handler.resolve_ref_schema(schema)
        short = block["properties"][cls.shorthand]
        if "const" not in short:
            return {"anyOf": [*_bare(short, handler), schema]}
        if block.get("required"):  # a method's name stands for its block only where nothing else is required
            return schema
        return {"anyOf": [{"const": short["const"], "description": block["description"]}, schema]}


class InputPath:
    """Marks a field that may hold a path: relative ones are looked up beside the file that names them."""


class OneOrMany:
    """Marks a list field that also takes one bare value: `report_to: wandb` is `report_to: [wandb]`."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        return schema if handler.mode == "serialization" else {"anyOf": [schema["items"], schema]}


class OneOrNamed:
    """Marks a mapping from names that also takes one bare value, which the reader keeps under the name ""."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        return schema if handler.mode == "serialization" else {"anyOf": [schema["additionalProperties"], schema]}


def _bare(schema: dict[str, Any], handler: GetJsonSchemaHandler) -> list[dict[str, Any]]:
    """The alternatives that a shorthand may stand for: a mapping is always the block itself."""
    schema = handler.resolve_ref_schema(schema)
    if "anyOf" in schema:
        return [bare for one in schema["anyOf"] for bare in _bare(one, handler)]
    return [] if schema.get("type") == "object" else [schema]
