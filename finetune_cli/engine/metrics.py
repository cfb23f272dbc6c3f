"""Generation metrics: what an answer is worth beside the data's own."""

import importlib.util
import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune_cli.errors import DataError, FinetuneError, RecipeError, TrainError
from finetune_cli.log import LOGGER

Metric = Callable[[Sequence[str], Sequence[str]], list[float]]
"""(answers, references) -> one number each, higher is better."""


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where the answer is the reference, white space at both ends aside."""
    return [float(a.strip() == r.strip()) for a, r in zip(answers, references, strict=True)]


def json_match(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 where both are the same JSON value, whatever their spacing and key order."""
    return [float(_same_json(a, r)) for a, r in zip(answers, references, strict=True)]


def _same_json(answer: str, reference: str) -> bool:
    try:
        wanted = json.loads(reference)
    except ValueError as error:
        hint = "Every answer of the evaluation rows must be JSON for json_match; exact_match takes any text."
        raise DataError(f"eval.metric json_match: the data's answer {reference[:60]!r} is not JSON", hint) from error
    try:
        return _alike(json.loads(answer), wanted)
    except (ValueError, RecursionError):
        return False


def _alike(one: Any, other: Any) -> bool:
    """Python calls true and 1 equal, which JSON does not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


NAMED: dict[str, Metric] = {"exact_match": exact_match, "json_match": json_match}


def find(metric: str) -> tuple[str, Metric]:
    """(its name in logs, the function). `file.py:function` runs the user's own file."""
    if metric in NAMED:
        return metric, NAMED[metric]
    file, _, name = metric.rpartition(":")
    if not file.endswith(".py") or not Path(file).exists():
        raise RecipeError(
            f"eval.metric {metric!r} is not known", f"Use {', '.join(NAMED)} or path/to/file.py:function."
        )
    function: Metric = function_of(file, name, key="eval.metric", signature="function(answers, references)")
    return name, function


def function_of(file: str, name: str, *, key: str, signature: str) -> Any:
    """A function of the user's own file, which is run. Raises RecipeError where it cannot be had."""
    if not Path(file).exists():
        raise RecipeError(f"{key}: {file} does not exist", f"Name a file: {key} is file.py:{signature}.")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    LOGGER.info("%s: running %s for its %s", key, file, name)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise RecipeError(f"{file} cannot be run: {said(error)}", f"Mend the file that {key} names.") from error
    function: Any = vars(module).get(name)
    if not callable(function):
        raise RecipeError(f"{file} has no function {name!r}", f"{key} is file.py:{signature}.")
    return function


def judge(name: str, metric: Metric, answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """The metric's numbers, checked. Raises TrainError where it does not give one finite number for each answer."""
    try:
        scores = [float(score) for score in metric(answers, references)]
    except FinetuneError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise TrainError(f"eval.metric {name} failed: {said(error)}", "Mend the function.") from error
    if len(scores) != len(answers) or not all(s == s and abs(s) != float("inf") for s in scores):
        raise TrainError(
            f"eval.metric {name} gave {len(scores)} numbers for {len(answers)} answers, or one that is not finite",
            "Return a list with one finite number for each answer.",
        )
    return scores


def said(error: Exception) -> str:
    """An exception of the user's code on one line, with its place in that code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({Path(last.filename).name}:{last.lineno})"
