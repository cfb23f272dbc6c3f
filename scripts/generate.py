"""Writes what follows from the classes: the JSON Schemas and docs/reference.md. With --check it only compares."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune_cli import errors
from finetune_cli.checks.rules import RULES
from finetune_cli.methods import Method, registry
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.names import REMEDIES, RENAMED
from finetune_cli.recipe.schema import EXTENDS, published, recipe_schema
from finetune_cli.recipe.sections import Recipe, Source
from finetune_cli.recipe.shape import METHOD, Slot, fields
from finetune_cli.recipe.words import expected
from finetune_cli.spec import OneOrMany, OneOrNamed, Spec

ROOT = Path(__file__).resolve().parent.parent
BY_HAND = "Written by `python scripts/generate.py` from the classes; edit their docstrings, not this file."
INTRO = """A recipe is one YAML file. `finetune methods NAME` and `finetune schema` tell the same on the command
line, and an editor with a YAML language server completes it from the first line
`# yaml-language-server: $schema=../schemas/recipe.schema.json`.

Keys without a default are required, unless the recipe `extends` one that has them."""
SOURCES = """### Items of `data.train` and `data.eval_sets`

One set of rows; a bare text is its `path`."""
RULES_INTRO = """What `finetune validate` and every run look for before weights are loaded. `finetune explain FT016`
says why there is a rule, what is looked at and which test shows it. Errors stop a run. A warning is accepted with
`ignore: [FT016]`."""
OTHER_TOOLS = """These keys are errors here; the message says what this table says. The value may need another
form: the check of the key says which."""
ERROR_LINE = re.compile(r"── (?P<name>\w+) +(?P<code>\d+) +(?P<meaning>.+)")


def build() -> dict[str, str]:
    """The text of every generated file by its path under the root of the repository."""
    return {
        "schemas/recipe.schema.json": _json(recipe_schema()),
        "schemas/plan.schema.json": _json(published(Plan, "plan.schema.json", mode="serialization")),
        "docs/reference.md": reference(),
    }


def reference() -> str:
    parts = ["# Reference", BY_HAND, INTRO, "## Top level", top_level()]
    for key, where in fields(Recipe).items():
        for section in where.specs if key != METHOD else ():
            parts += [f"## `{key}`", prose(section), keys(section)]
            parts += [SOURCES, keys(Source)] if key == "data" else []
    parts += ["## Methods"]
    for name, method in registry().items():
        parts += [f"### `{name}`", prose(method), facts(method), keys(method)]
    parts += ["## Exit codes", exit_codes()]
    parts += ["## Rules", RULES_INTRO, table(("id", "what", "severity", "what to do"), rule_rows())]
    parts += [
        "## Names of other tools",
        OTHER_TOOLS,
        table(("name", "here"), sorted(other_names(), key=lambda row: row[0].strip("`"))),
    ]
    return "\n\n".join(parts) + "\n"


def top_level() -> str:
    rows = [("`extends`", "text", "none", str(EXTENDS["description"])), *key_rows(Recipe)]
    return table(("key", "type", "default", "meaning"), rows)


def keys(spec: type[Spec]) -> str:
    return table(("key", "type", "default", "meaning"), key_rows(spec))


def key_rows(spec: type[Spec]) -> Iterator[tuple[str, ...]]:
    manual = spec.manual()
    for key, where in fields(spec).items():
        info = spec.model_fields[key]
        about = manual.get(key) or " ".join(prose(section) for section in where.specs)
        is_section = spec is Recipe and where.specs
        link = f"[`{key}`](#{'methods' if key == METHOD else key})" if is_section else f"`{key}`"
        yield link, type_words(where), default_words(info.get_default(), required=info.is_required()), about


def type_words(where: Slot) -> str:
    """The words of `finetune validate`; one set of rows may also be bare."""
    one = (where.marked(OneOrMany) or where.marked(OneOrNamed)) and any(a.container for a in where.alternatives)
    holds_specs = where.item(list).specs or where.item(dict).specs
    words = expected(where)
    return f"text{', ' if ' or ' in words else ' or '}{words}" if one and holds_specs else words


def default_words(value: Any, *, required: bool) -> str:
    if required:
        return "**required**"
    if value is None:
        return "none"
    if isinstance(value, Spec):
        return "its defaults"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def facts(method: type[Method]) -> str:
    lora, full = method.rates(lora=True), method.rates(lora=False)
    return (
        f"Rows: {', '.join(method.shapes)}. `train.learning_rate: auto` is {lora.default:g} with LoRA, "
        f"{full.default:g} without."
    )


def rule_rows() -> Iterator[tuple[str, ...]]:
    for rule in RULES:
        severity = rule.severity if rule.checked else "held by the engine"
        yield (
            rule.id,
            rule.title,
            severity + (f"; error when {rule.error_when}" if rule.error_when else ""),
            rule.remedy,
        )


def exit_codes() -> str:
    text = errors.__doc__ or ""
    rows = [(f"{found['code']}", found["meaning"]) for found in ERROR_LINE.finditer(text)]
    assert [int(code) for code, _ in rows] == list(errors.KINDS), "the tree in errors.py lists every error"
    return "\n\n".join((text.strip().splitlines()[-1], table(("code", "what is wrong"), rows)))


def other_names() -> Iterator[tuple[str, str]]:
    yield from ((f"`{name}`", f"`{key}`") for name, key in RENAMED.items())
    yield from ((f"`{name}`", advice.removeprefix("here it is ")) for name, advice in REMEDIES.items())


def prose(spec: type[Spec]) -> str:
    return "\n".join(line.strip() for line in (spec.__doc__ or "").strip().splitlines())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in row) + " |" for row in cells)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def stale(files: Mapping[str, str], root: Path) -> list[str]:
    """The files that are missing from `root` or differ there."""
    return [
        name
        for name, text in files.items()
        if not (root / name).is_file() or (root / name).read_text(encoding="utf-8") != text
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files, or with --check return 1 when the ones on disk are not what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file on disk differs")
    args = parser.parse_args(argv)
    files = build()
    old = stale(files, ROOT)
    if args.check:
        for name in old:
            print(f"{name} is missing or differs; run: python scripts/generate.py", file=sys.stderr)
        return 1 if old else 0
    for name in old:
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(files[name], encoding="utf-8")
    print(f"wrote {len(old)} of {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
