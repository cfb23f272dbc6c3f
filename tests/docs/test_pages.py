"""README and docs/: every snippet of a recipe is valid, every key, rule, option and link exists, and the rows shown as
examples are read as the page says."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml

from finetune_cli import cli
from finetune_cli.checks.rules import BY_ID
from finetune_cli.data.sources import load as read_rows
from finetune_cli.engine import health, watch
from finetune_cli.errors import DataError
from finetune_cli.methods import registry
from finetune_cli.recipe.load import load
from finetune_cli.recipe.sections import Recipe, Source
from tests.helpers import write_rows

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [page for page in PAGES if page.name not in ("reference.md", "decisions.md")]
"""By hand and for readers; the others have no commands."""
EACH = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)
NOT_RUN = {
    "pip install": "the tests run where it has been done; .ci/run does it in a fresh environment",
    "pytest": "this is it",
    "accelerate launch": "tests/unit/engine/test_processes.py starts runs under accelerate and torchrun",
}
"""Beginnings of commands that test_commands.py does not run, and why."""
CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands_of(page: Path) -> Iterator[str]:
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (part.strip() for part in re.sub(r"\s+# .*", "", line).split("&&") if part.strip())


def skipped(command: str) -> bool:
    return any(command.startswith(start) for start in NOT_RUN)


def code_of(page: Path) -> list[str]:
    """Inline code, fenced blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [found.replace("\\|", "|") for found in CODE.findall(text)]


# ── commands ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_run_is_there_to_be_run():
    every = [command for page in WRITTEN for command in commands_of(page)]
    assert len(every) >= 30
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in every), start
    assert sum(map(skipped, every)) <= 4


@EACH
def test_every_command_in_the_text_is_one(page):
    known = typer.main.get_command(cli.app).commands
    for code in code_of(page):
        if code.startswith("finetune ") and not code.startswith("finetune --"):
            name, rest = re.match(r"finetune ([\w-]+)(.*)", code).groups()
            assert name in known, code
            options = {option for parameter in known[name].params for option in parameter.opts}
            for option in re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", rest):
                assert option in options, code


# ── recipes, keys, rules, links ───────────────────────────────────────────────────────────────────────────────────────

BASE = {"method": "sft", "model": "a/b", "data": "rows.jsonl", "output_dir": "out"}


def snippets(page: Path) -> Iterator[str]:
    """Whole recipes in blocks, and inline YAML that begins with a section."""
    yield from blocks(page, "yaml")
    yield from (code for code in code_of(page) if re.match(rf"({'|'.join(Recipe.model_fields)}): \S", code))


@EACH
def test_every_snippet_of_a_recipe_is_valid(page, tmp_path):
    for text in snippets(page):
        given = yaml.safe_load(text.replace("...", "a/b"))
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({**BASE, **given}))
        loaded = load(tmp_path / "r.yaml")
        assert loaded.recipe.output_dir


def keys_of(section: str) -> set[str]:
    if section == "method":
        return {key for method in registry().values() for key in method.model_fields}
    annotation = Recipe.model_fields[section].annotation
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return {key for kind in kinds for key in getattr(kind, "model_fields", {})}


@EACH
def test_every_key_is_one(page):
    named = re.compile(r"(?<![\w./])(method|model|data|train|eval|generation|save|logging|launch|health|lora)\.(\w+)")
    for code in code_of(page):
        for section, key in named.findall(code):
            assert key in keys_of(section) or key in ("yaml", "jsonl"), code


@EACH
def test_every_rule_and_every_link_is_there(page):
    text = page.read_text(encoding="utf-8")
    for rule in re.findall(r"FT\d{3}", text):
        assert rule in BY_ID, rule
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# ── what the pages say in numbers and names ───────────────────────────────────────────────────────────────────────────


def tables(page: Path, head: str) -> list[list[str]]:
    """The rows of every table whose first line begins with `head`."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.M):
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines.splitlines()]
        if lines.startswith(head):
            found += cells[2:]
    return found


def test_the_learning_rates_are_those_of_the_methods():
    rates = {name: (float(lora), float(full)) for name, lora, full in tables(ROOT / "docs/from-trl.md", "| | LoRA |")}
    known = registry().items()
    assert rates == {name: (m.rates(lora=True).default, m.rates(lora=False).default) for name, m in known}


def test_twenty_idioms_are_in_the_first_table_and_each_has_its_paragraph():
    rows = tables(ROOT / "docs/from-trl.md", "| # | In a TRL script")
    text = (ROOT / "docs/from-trl.md").read_text()
    assert len(rows) >= 20
    for number, (link, theirs, ours) in enumerate(rows, 1):
        assert link.startswith(f"[{number}](#{number}-")
        assert f"\n## {number} " in text
        assert theirs
        assert ours


def test_the_signs_of_health_are_those_that_are_told():
    source = Path(health.__file__).read_text() + Path(watch.__file__).read_text()
    text = (ROOT / "docs/when-a-loss-misbehaves.md").read_text()
    told = {"loss_spike", "grad_norm_spike", *re.findall(r'(?:_once|Finding)\(\s*"([a-z_]+)",$', source, re.M)}
    assert {"both_fall", "kl_blow_up", "overfitting", "nothing_changes", "slow"} <= told
    for name in told:
        assert f"`{name}`" in text, name


def test_rows_are_read_as_the_page_says(tmp_path):
    rows = tables(ROOT / "docs/data-formats.md", "| columns |")
    assert len(rows) == 10
    for columns, example, methods in rows:
        row = json.loads(example.strip("`"))
        assert set(re.findall(r"`(\w+)`", columns)) >= set(row)
        write_rows(tmp_path / "rows.jsonl", [row])
        for name, method in registry().items():
            if name in methods.split(", "):
                table = read_rows(Source(path=str(tmp_path / "rows.jsonl")), accepts=method.shapes)
                assert table.canonical(table.raws[0])
            elif not (name == "ppo" and "input_ids_chosen" in row):  # refused where its prompt is looked for
                with pytest.raises(DataError, match=r"which the method does not take|make no shape"):
                    read_rows(Source(path=str(tmp_path / "rows.jsonl")), accepts=method.shapes)


def test_memory_says_what_was_measured():
    cases = json.loads((ROOT / "benchmarks/memory-cpu-amd-epyc-2c.json").read_text())["cases"]
    text = (ROOT / "docs/memory.md").read_text()
    assert f"in all {len(cases)} cases" in text
    assert max(abs(case["off"]) for case in cases) < 0.13
    assert f"within 1% in {sum(abs(case['off']) < 0.01 for case in cases)} of them" in text
    found = {case["case"]: f"{case['measured_gib']:.2f}" for case in cases}
    for name in ("full bf16 2x256", "full bf16 2x256 optim=adamw_8bit", "qlora bf16 2x256", "lora bf16 4x256"):
        assert found[f"smollm2-135m sft {name}"] in text, name
    assert found["smollm2-135m sft lora bf16 4x256 checkpointed"] in text
