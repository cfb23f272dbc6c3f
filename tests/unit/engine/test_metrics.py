"""What generated answers are worth."""

import pytest

from finetune_cli.engine.metrics import exact_match, find, json_match, judge
from finetune_cli.errors import DataError, RecipeError, TrainError


def test_exact_match_leaves_white_space_at_the_ends_aside():
    answers = ["four", " four\n", "Four", "four.", "fo ur", ""]
    assert exact_match(answers, ["four"] * 6) == [1, 1, 0, 0, 0, 0]
    assert exact_match([""], [""]) == [1]


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ('{"a": 1, "b": [1, 2]}', '{"b":[1,2],"a":1}', 1),
        ('{"a": 1}', '{"a": 2}', 0),
        ('{"a": 1} and more', '{"a": 1}', 0),
        ('{"a": 1', '{"a": 1}', 0),
        ('{"a": "1"}', '{"a": 1}', 0),
        ("[1, 2]", "[2, 1]", 0),
        ("", "{}", 0),
        ("[" * 100_000, "[]", 0),
    ],
)
def test_json_match(answer, reference, score):
    assert json_match([answer], [reference]) == [score]


def test_metrics_refuse_lists_of_unequal_length():
    for metric in (exact_match, json_match):
        with pytest.raises(ValueError, match="zip"):
            metric(["1", "2"], ["1"])


def test_json_match_needs_data_that_is_json():
    with pytest.raises(DataError, match=r"'It is four\.' is not JSON"):
        judge("json_match", json_match, ["4"], ["It is four."])


def test_named_ones_are_found():
    assert find("exact_match") == ("exact_match", exact_match)
    assert find("json_match") == ("json_match", json_match)


def test_own_file_is_run(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def longer(answers, references):\n    return [len(a) - len(r) for a, r in zip(answers, references)]\n"
    )
    name, metric = find(f"{file}:longer")
    assert name == "longer"
    assert judge(name, metric, ["four", ""], ["a", "bc"]) == [3.0, -2.0]


@pytest.mark.parametrize("asked", ["exact", "nowhere.py:f", "{file}", "{file}:other", "{file}:number", "{file}:"])
def test_what_is_not_a_metric_is_refused(tmp_path, asked):
    file = tmp_path / "mine.py"
    file.write_text("number = 3\ndef f(answers, references): return []\n")
    with pytest.raises(RecipeError):
        find(asked.format(file=file))


@pytest.mark.parametrize("scores", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_numbers_are_checked(scores):
    with pytest.raises(TrainError, match="for 2 answers"):
        judge("mine", lambda answers, references: scores, ["a", "b"], ["a", "b"])


def test_what_own_code_raises_is_told_with_its_place(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def f(answers, references):\n    return [1 / 0]\n")
    with pytest.raises(TrainError, match=r"eval.metric f failed: ZeroDivisionError: division by zero \(mine.py:2\)"):
        judge("f", find(f"{file}:f")[1], ["a"], ["a"])
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(RecipeError, match=r"ModuleNotFoundError: .*nothing_of_that_name.* \(mine.py:1\)"):
        find(f"{file}:f")


def test_json_tells_true_from_one():
    said = ['{"a": true}', "[1, 0]", '{"a": 1.0}', "[true, [false]]"]
    meant = ['{"a": 1}', "[true, false]", '{"a": 1}', "[true, [false]]"]
    assert json_match(said, meant) == [0.0, 0.0, 1.0, 1.0]
