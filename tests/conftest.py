"""Fixtures of all tests: a cache of their own, a tiny model, and jobs made in this process."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import model_folder, questions, write_recipe, write_rows


def pytest_configure(config: pytest.Config) -> None:
    """Test processes side by side take one core each: threads that wait for each other at barriers cost far more."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache, or believes that a launcher started it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """A command run in this process leaves nothing behind: its log handler, and accelerate's state of the process."""
    logger = logging.getLogger("finetune_cli")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, saved with a tokenizer that was trained here and a ChatML template."""
    return model_folder(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture
def recipe_of(tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a recipe on the tiny model and 12 rows, for the CPU: `recipe_of(train={"max_steps": 2})`."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def make(*, rows: list[dict[str, Any]] | None = None, name: str = "recipe.yaml", **sections: Any) -> Path:
        train = write_rows(tmp_path / "train.jsonl", questions(12) if rows is None else rows)
        own = {"model": {"name_or_path": str(tiny_model_folder)}, "data": {"train": str(train)}}
        merged = {key: {**value, **sections.pop(key, {})} for key, value in own.items()}
        return write_recipe(tmp_path / name, **merged, **sections)

    return make


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A model this small gains nothing from threads, and loses much where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job_of(one_thread: None) -> Callable[..., Any]:
    """(job, progress) of a recipe file, as the worker makes them; `sink` hears its events."""

    def make(recipe: Path, *overrides: str, sink: Any = lambda event: None, resume: Path | None = None) -> Any:
        from finetune_cli import commands
        from finetune_cli.data.rows import load_rows
        from finetune_cli.engine import prepare

        plan, _, _ = commands.planned(recipe, overrides)
        plan.run.mkdir(parents=True, exist_ok=True)
        words = prepare.bind(plan.recipe, plan.facts)
        return prepare.build(plan, words, load_rows(plan.recipe, words.chat), sink, resume=resume)

    return make
