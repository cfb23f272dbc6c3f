"""Whatever is in the file, the reader returns a recipe or says what is wrong."""

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_cli.errors import RecipeError
from finetune_cli.recipe.load import load
from tests.unit.recipe.two_methods import GOOD, One, Two

FULL = (
    GOOD.replace("method: sft", "method: {name: dpo, beta: 0.1, loss_type: [sigmoid, ipo]}")
    + """\
lora: {r: 16, target_modules: [q_proj, "v_proj"]}
quantization: {load_in_4bit: true}
train: # comment
  learning_rate: 2e-5
  max_steps: 10
  gradient_checkpointing: auto
eval: &e {eval_steps: 0.1, metric: m.py:f}
logging:
  report_to: [wandb, 'x']
ignore: FT016
"""
)
BOUNDED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PIECES = (
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "[",
    "]",
    "{",
    "}",
    ": ",
    "\t",
    "- ",
    "'",
    '"',
    "\x00",
    "é",
    "\n",
    "1e999",
    "|\n",
    "? ",
    "---\n",
)
KEYS = st.one_of(
    st.sampled_from(
        ["method", "name", "model", "data", "train", "eval_sets", "path", "lora", "", "extends", "lr", "r"]
    ),
    st.text(max_size=5),
)
TREES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["sft", "dpo", "auto"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=20,
)


def attempt(path: Path, text: str, *overrides: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for root in (One, Two):
        try:
            loaded = load(path, overrides, root=root)
            problems = []
            assert loaded.recipe
        except RecipeError as error:
            problems = [str(problem) for problem in error.problems] or [""]
        assert all(line and "\n" not in line for line in problems)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


@BOUNDED
@given(text=st.one_of(st.text(), st.binary().map(lambda raw: raw.decode("latin-1"))))
def test_arbitrary_text(file: Path, text: str) -> None:
    attempt(file, text)


@BOUNDED
@given(seed=st.integers(0, 2**32), times=st.integers(1, 6))
def test_mutated_recipes(file: Path, seed: int, times: int) -> None:
    draw = random.Random(seed)
    text = FULL
    for _ in range(times):
        at = draw.randrange(len(text) + 1)
        width = draw.choice((0, 1, 1, 5))
        text = text[:at] + draw.choice((*PIECES, "", "", chr(draw.randrange(0x3000)))) + text[at + width :]
        lines = text.splitlines(keepends=True)
        draw.random() < 0.3 and lines and lines.insert(draw.randrange(len(lines)), draw.choice(lines))
        text = "".join(lines)
    attempt(file, text)


@BOUNDED
@given(tree=st.dictionaries(KEYS, TREES, max_size=6), valid=st.booleans())
def test_random_trees(file: Path, tree: dict[str, Any], valid: bool) -> None:
    data = {**yaml.safe_load(FULL), **tree} if valid else tree
    attempt(file, yaml.safe_dump(data, allow_unicode=True))


@BOUNDED
@given(
    key=st.one_of(KEYS, st.sampled_from(["learning_rate", "data.train", "method.beta", "beta"])),
    value=st.one_of(st.text(max_size=9), TREES.map(repr)),
)
def test_arbitrary_options(file: Path, key: str, value: str) -> None:
    attempt(file, FULL, f"{key}={value}", value)


def test_the_recipe_that_is_mutated_is_valid(file: Path) -> None:
    file.write_text(FULL)
    assert load(file, root=Two).recipe.lora is not None
