"""The JSON Schema of a recipe: what editors complete and check, shorthands and `extends` included."""

from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode

from finetune_cli.recipe.sections import Recipe
from finetune_cli.spec import Spec

Schema = dict[str, Any]

EXTENDS = {
    "type": "string",
    "minLength": 1,
    "description": "A recipe file to start from, beside this one; what is written here goes over it.",
}


def recipe_schema(*, root: type[Recipe] = Recipe) -> Schema:
    """Of a recipe file. Nothing is required where it extends another: the base has it."""
    schema = published(root, "recipe.schema.json")
    schema["properties"] = {"extends": EXTENDS, **schema["properties"]}
    schema["if"] = {"required": ["extends"]}
    schema["else"] = _whole(schema)
    return schema


def published(spec: type[Spec], name: str, *, mode: JsonSchemaMode = "validation") -> Schema:
    """The schema of `spec` with its dialect and its name; `serialization` is of what we write, all keys present."""
    schema = spec.model_json_schema(schema_generator=_Generator, mode=mode)
    for key, where in schema["properties"].items():
        for block in _blocks(where, schema) if key != "method" else ():
            where.setdefault("description", block["description"])
        if "$ref" in where:  # a section's defaults are told at its keys
            where.pop("default", None)
    return {"$schema": _Generator.schema_dialect, "$id": name, **_tidy(schema)}


def _whole(schema: Schema) -> Schema:
    """What a recipe that stands alone must have: the required keys of the top level and of its sections, taken out
    of the sections, which may be in part where the recipe extends another."""
    needs = {key: need for key, where in schema["properties"].items() if (need := _needs(where, schema))}
    return {"required": schema.pop("required"), "properties": needs}


def _needs(where: Schema, schema: Schema) -> Schema:
    blocks = [(block, block.pop("required", [])) for block in _blocks(where, schema)]
    if not any("const" in block["properties"].get("name", {}) for block, _ in blocks):
        return next(({"required": keys} for _, keys in blocks if keys), {})
    cases = [
        {
            "if": {"properties": {"name": {"const": block["properties"]["name"]["const"]}}, "required": ["name"]},
            "then": {"required": keys},
        }
        for block, keys in blocks
        if keys
    ]
    return {"required": ["name"], **({"allOf": cases} if cases else {})}


def _blocks(where: Schema, schema: Schema) -> Iterator[Schema]:
    """The mappings with keys of their own that may stand here."""
    if "$ref" in where:
        yield from _blocks(schema["$defs"][where["$ref"].rpartition("/")[2]], schema)
    for one in (*where.get("anyOf", ()), *where.get("oneOf", ())):
        yield from _blocks(one, schema)
    if "properties" in where:
        yield where


def _tidy(node: Any) -> Any:
    """Descriptions in one line. `oneOf` by `discriminator` is OpenAPI; here the constant `name` tells blocks apart."""
    if isinstance(node, list):
        return [_tidy(one) for one in node]
    if not isinstance(node, dict):
        return node
    tidy = {key: _tidy(value) for key, value in node.items()}
    if isinstance(tidy.get("description"), str):
        tidy["description"] = " ".join(tidy["description"].split())
    if "oneOf" in tidy:
        tidy["anyOf"] = tidy.pop("oneOf")
        tidy.pop("discriminator", None)
    return tidy


class _Generator(GenerateJsonSchema):
    """Makes no titles out of the names of keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False
