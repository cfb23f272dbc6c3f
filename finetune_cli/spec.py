"""Spec: the base of everything that a recipe or a plan is made of. Frozen, strict, and its own manual."""

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler
from pydantic_core import CoreSchema


class Spec(BaseModel):
    """A frozen value whose field docstrings are the manual. Unknown keys are errors; text is not a number."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
        strict=True,
    )

    shorthand: ClassVar[str | None] = None
    """The field that a bare value stands for: `model: X` is `model: {name_or_path: X}`."""

    @classmethod
    def manual(cls) -> dict[str, str]:
        """What the text below each field says. Read from the source when it is asked for: pydantic would read it at
        every start, which takes a tenth of `validate --fast`."""
        found: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, Spec):
                found |= _texts(base)
        return {name: about for name, about in found.items() if name in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        block = handler.resolve_ref_schema(schema)
        for name, about in cls.manual().items():
            block["properties"][name].setdefault("description", about)
        if cls.shorthand is None or handler.mode == "serialization":
            return schema
        short = block["properties"][cls.shorthand]
        if "const" not in short:
            return {"anyOf": [*_bare(short, handler), schema]}
        if block.get("required"):  # a method's name stands for its block only where nothing else is required
            return schema
        return {"anyOf": [{"const": short["const"], "description": block["description"]}, schema]}


@cache
def _texts(cls: type) -> dict[str, str]:
    """Name of each annotated field of a class's own body -> the string that follows it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in pairwise(body.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(about))):
                found[name] = inspect.cleandoc(about)
    return found


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
