"""All rows of a recipe: which sets there are, and what of the recipe makes them be tokenised anew."""

import json

import pytest

from finetune_cli.data import cache
from finetune_cli.data.chat import Chat
from finetune_cli.data.rows import load_rows
from finetune_cli.errors import DataError, RecipeError
from finetune_cli.recipe.load import load
from tests.helpers import CHATML, questions, said, tiny_tokenizer, write_rows


@pytest.fixture
def rows_of(recipe_of, tmp_path, monkeypatch):
    """Load the rows of a recipe changed by --set; how many sets had to be tokenised."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    calls = []
    encode_set = cache.encode_set
    monkeypatch.setattr(cache, "encode_set", lambda *args, **named: calls.append(1) or encode_set(*args, **named))

    def rows(*changes, template=CHATML, **sections):
        recipe = load(recipe_of(**sections), changes).recipe
        before = len(calls)
        found = load_rows(recipe, Chat.bind(tiny_tokenizer(template), template_mismatch=recipe.data.template_mismatch))
        return found, len(calls) - before

    return rows


@pytest.mark.parametrize(
    "change",
    [
        "learning_rate=1e-3", "num_train_epochs=7", "per_device_train_batch_size=1", "lora.r=2", "precision=bf16",
        "sample_prompts=0", "output_dir=other", "data.shuffle=false", "method.packing=true", "logging_steps=7",
    ],
)  # fmt: skip
def test_what_leaves_the_ids_as_they_are_hits_the_cache(rows_of, change):
    first, made = rows_of()
    assert made == 1
    second, made = rows_of(change)
    assert made == 0
    assert second.train == first.train


@pytest.mark.parametrize(
    "change",
    [
        "seed=1", "max_length=60", "overlength=truncate", "max_dropped_fraction=0.5", "template_mismatch=render",
        "method.loss_on=all", "data.train=[{path: train.jsonl, weight: 0.5}]",
        "data.train=[{path: train.jsonl, roles: {assistant: [bot]}}]",
    ],
)  # fmt: skip
def test_what_changes_ids_or_counts_misses_the_cache(rows_of, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    rows_of()
    assert rows_of(change)[1] == 1


def test_another_template_or_another_row_misses_the_cache(rows_of):
    first, _ = rows_of()
    other, made = rows_of(template="!" + CHATML)
    assert (made, other.train.rows != first.train.rows) == (1, True)
    changed, made = rows_of(rows=questions(12, first=1))
    assert (made, changed.train.rows != first.train.rows) == (1, True)
    assert rows_of()[1] == 0


def test_named_evaluation_sets(rows_of, tmp_path):
    write_rows(tmp_path / "a.jsonl", questions(3, first=50))
    write_rows(tmp_path / "b.jsonl", questions(2, first=60))
    sets = {"near": {"path": str(tmp_path / "a.jsonl")}, "far": str(tmp_path / "b.jsonl")}
    found, _ = rows_of(f"data.eval_sets={json.dumps(sets)}", "eval_split=0.25")
    assert {name: len(encoded.rows) for name, (encoded, _) in found.evals.items()} == {"": 3, "near": 3, "far": 2}
    assert [*found.summary()["sets"]] == ["train", "eval", "eval near", "eval far"]
    assert len(found.train.rows) == 9
    assert {prompt.answer.split(",")[0] for prompt in found.evals["far"][1]} == {"It is six and 60"}


def test_an_evaluation_set_is_not_repeated(rows_of, tmp_path):
    half = {"path": str(tmp_path / "train.jsonl"), "weight": 0.5}
    found, _ = rows_of(data={"eval_sets": {"half": half}})
    assert len(found.evals["half"][0].rows) == 6
    with pytest.raises(RecipeError) as caught:
        rows_of(data={"eval_sets": {"half": {**half, "weight": 2}}})
    assert "eval_sets.half: weight above 1" in str(caught.value.problems[0])


def test_two_unnamed_evaluation_sets(rows_of, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", questions(3))
    with pytest.raises(DataError, match="both make the unnamed set"):
        rows_of(f"data.eval_sets={path}", "eval_split=0.25")


def test_weights_of_training_sets_and_evaluation_once(rows_of, tmp_path):
    train = [{"path": str(tmp_path / "train.jsonl"), "weight": 3}]
    found, _ = rows_of("eval_split=0.25", data={"train": train})
    assert len(found.train.rows) == 27
    assert len(found.evals[""][0].rows) == 3


def test_held_out_rows_are_counted_for_themselves(rows_of, tmp_path):
    """Ten conversations that are cut, two of them held out; the others are taken three times."""
    rows = [{"messages": said("one", "four " * 60)} for _ in range(10)]
    source = {"path": str(tmp_path / "train.jsonl"), "weight": 3}
    data = {"train": source, "eval_split": 0.2, "overlength": "truncate", "max_length": 40}
    found, _ = rows_of(rows=rows, data=data)
    train, held = found.train.report, found.evals[""][0].report
    assert (train["read"], train["kept"], train["held_out"], train["truncated"]) == (10, 10, 2, 8)
    assert (held["read"], held["kept"], held["truncated"]) == (2, 2, 2)
    assert (train["rows"], held["rows"], held["lengths"]["max"]) == (24, 2, 40)
    assert held["targets"]["trained"] == sum(row.targets for row in found.evals[""][0].rows) > 0


def test_a_conversation_that_ends_with_a_question_asks_that_one(rows_of):
    """Where a method draws its own answers; one that trains the answers of the data asks for the last of those."""
    rows = [{"messages": said("one", "two", "three")}, {"messages": said("four")}]
    two = {"eval": {"sample_prompts": 2}}
    prompts = rows_of(rows=rows, method={"name": "ppo", "reward": "x.py:f"}, **two)[0].train_prompts
    assert [(prompt.text, prompt.answer) for prompt in prompts] == [("three", ""), ("four", "")]
    assert [prompt.text for prompt in rows_of(rows=rows[:1])[0].train_prompts] == ["one"]


def test_prompts_that_cannot_be_asked_are_left_out(rows_of):
    """A template that loses what stands beside tool calls, and texts of which nothing is shared."""
    call = {"role": "assistant", "content": "so", "tool_calls": [{"name": "f", "arguments": {}}], "trainable": False}
    rows = [{"messages": [*said("one", "two"), *said("three"), call]}, {"messages": said("four", "five")}]
    template = CHATML.replace("{{ m.content }}", "{{ m.content if not m.tool_calls else 'call' }}")
    assert template != CHATML
    found, _ = rows_of(rows=rows, template=template, eval={"sample_prompts": 2})
    assert [prompt.text for prompt in found.train_prompts] == ["one", "four"]
    pairs = [{"chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    assert rows_of(rows=pairs, method="dpo")[0].train_prompts == []


def test_an_evaluation_set_may_be_called_train(rows_of, tmp_path):
    sets = {"train": str(write_rows(tmp_path / "a.jsonl", questions(3, first=50)))}
    found, _ = rows_of(method={"name": "ppo", "reward": "x.py:f"}, data={"eval_sets": sets})
    assert [len(found.raws[name]) for name in (None, "train")] == [12, 3]
