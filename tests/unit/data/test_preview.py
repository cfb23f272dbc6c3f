"""Previews: a line for every row whatever is in it, and the same ids and targets that training has."""

import json

import pytest

from finetune_cli.data.preview import previews
from finetune_cli.data.rows import load_rows
from finetune_cli.errors import DataError
from tests.helpers import QWEN3, said

GOOD = {"messages": said("one", "two")}
ODD = [
    GOOD,
    {"messages": said("one", "two", "three", "four")},
    {"messages": said("🙂 日本\u200b", " \n spaces at both ends \n ")},
    {"messages": [{"role": "system", "content": ""}, *said("one", "<|im_end|> inside")]},
    {"messages": said("hello", "to all", first="assistant")},
    {"messages": [*said("one", "two"), {"role": "user", "content": "and?"}]},
    {"messages": [*said("one"), {"role": "assistant", "content": "no", "trainable": False}, *said("two", "yes")]},
    {"messages": said("one", "<think>\nhm\n</think>\n\ntwo", "three", "four"), "id": 7},
    {"messages": said("one", "long " * 60)},
    {"messages": said("one")},
    {"messages": said("one", "")},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "parts"}]}, *said("two", first="assistant")]},
]


def answer(text):
    return said(text, first="assistant")


def shown(recipe, chat, **asked):
    return [item.to_json() for item in previews(recipe, chat, **asked)]


def in_training(recipe, chat):
    """(row, part, branch) -> ids and targets, of what is trained on."""
    found = {}
    for row in load_rows(recipe, chat).train.rows:
        for number, branch in enumerate(row.branches):
            before = [row.prefix_trained and not number] * len(row.prefix)
            trained = [False, *[*before, *branch.trained][1:]]
            found[row.source, row.part, branch.name] = ([*row.prefix, *branch.ids], trained)
    return found


def in_previews(lines):
    kept = [line for line in lines if "error" not in line and line["dropped"] is None]
    return {(line["row"], line.get("part", 0), line["branch"]): (line["input_ids"], line["trained"]) for line in kept}


@pytest.mark.parametrize("overlength", ["drop", "truncate"])
@pytest.mark.parametrize("loss_on", ["assistant", "last_assistant"])
@pytest.mark.parametrize("template", ["chatml", "qwen3"])
def test_previews_are_what_is_trained_on(rows_and_chat, overlength, loss_on, template):
    data = {"max_length": 50, "overlength": overlength, "max_dropped_fraction": 1.0}
    method = {"name": "sft", "loss_on": loss_on}
    more = {"template": QWEN3} if template == "qwen3" else {}
    recipe, chat = rows_and_chat(ODD, data=data, method=method, **more)
    lines = shown(recipe, chat)
    trained = in_training(recipe, chat)
    assert in_previews(lines) == trained
    assert len(trained) >= 8
    assert {line["row"] for line in lines} == set(range(len(ODD)))
    tokens = sum(sum(line.get("trained", ())) for line in lines)
    assert tokens == sum(sum(mask) for _, mask in trained.values()) > 0


@pytest.mark.parametrize(
    ("rows", "method"),
    [
        ([{"text": "one two"}, {"text": "🙂"}], "sft"),
        ([{"prompt": "one ", "completion": "two"}, {"prompt": "a ", "completion": " b\n"}], "sft"),
        ([{"prompt": said("one"), "completion": answer("two")}], "sft"),
        ([{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [7, 8]}], "sft"),
        ([{"prompt": said("one"), "chosen": answer("a"), "rejected": answer("b")}], "dpo"),
        ([{"prompt": "one", "chosen": " a", "rejected": " b"}], "dpo"),
        ([{"prompt": "one two", "chosen": " a", "rejected": " b"}], "orpo"),
        ([{"prompt": said("one"), "chosen": answer("a"), "rejected": answer("b")}], "reward"),
        ([{"input_ids_chosen": [1, 2, 3], "input_ids_rejected": [1, 2, 4]}], "dpo"),
    ],
)  # fmt: skip
def test_rows_of_other_shapes(rows_and_chat, rows, method):
    recipe, chat = rows_and_chat(rows, method=method, bos="<s>")
    found = in_previews(shown(recipe, chat))
    assert found == in_training(recipe, chat)
    assert [row for row, _, name in found] == sorted([*range(len(rows))] * (1 if method == "sft" else 2))


def test_the_first_token_is_no_target(rows_and_chat):
    recipe, chat = rows_and_chat([{"text": "one two"}], bos="<s>")
    (line,) = shown(recipe, chat)
    assert line["trained"] == [False] + [True] * (len(line["input_ids"]) - 1)


def test_every_row_has_a_line_whatever_is_in_it(rows_and_chat):
    rows = [
        GOOD,
        "{broken",
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "[]",
        "7",
        "",
        '{"messages": 7}',
        '{"messages": [{"role": "bot", "content": "x"}]}',
        '{"prompt": "of another shape"}',
        '{"messages": [{"role": "user", "content": {"a": 1}}]}',
        "[" * 100000,
        GOOD,
    ]
    recipe, chat = rows_and_chat(rows)
    lines = shown(recipe, chat)
    assert [line["row"] for line in lines] == list(range(11))
    assert [line["row"] for line in lines if "error" not in line] == [0, 10]
    for line in lines[1:10]:
        assert line.keys() == {"row", "error"}
        assert line["error"].keys() == {"id", "message"}
        assert line["error"]["id"] == "malformed"
        json.dumps(line, ensure_ascii=False).encode()
    assert lines[1]["error"]["message"].endswith("train.jsonl:2: not valid JSON (Expecting property name enclosed in "
                                                 "double quotes at column 2)")  # fmt: skip
    assert "train.jsonl:7: messages is 7, expected a list of messages" in lines[5]["error"]["message"]


def test_the_keys_of_a_line(rows_and_chat):
    recipe, chat = rows_and_chat([GOOD, ODD[1]], template=QWEN3)
    whole, *parts = shown(recipe, chat)
    keys = {"row", "branch", "input_ids", "trained", "text", "warnings", "dropped"}
    assert whole.keys() == keys
    assert [(part["row"], part["part"], part.keys()) for part in parts] == [(1, k, keys | {"part"}) for k in (0, 1)]
    assert whole["text"] == chat.tokenizer.decode(whole["input_ids"])
    assert (whole["branch"], whole["dropped"]) == ("completion", None)


def test_dropped_and_cut_rows(rows_and_chat):
    rows = [{"messages": said("one", "long " * 60)}, {"messages": said("one")}]
    recipe, chat = rows_and_chat(rows, data={"max_length": 30})
    long, none = shown(recipe, chat)
    assert (long["dropped"], none["dropped"]) == ("overlength", "no_targets")
    assert not any(long["trained"] + none["trained"])
    assert len(long["input_ids"]) > 60
    recipe, chat = rows_and_chat(rows, data={"max_length": 30, "overlength": "truncate"})
    cut, _ = shown(recipe, chat)
    assert (cut["dropped"], cut["input_ids"]) == (None, long["input_ids"][:30])
    assert cut["warnings"] == [
        {"id": "truncated", "message": f"cut from {len(long['input_ids'])} to 30 tokens, data.max_length"}
    ]


def test_which_rows(rows_and_chat, tmp_path):
    recipe, chat = rows_and_chat([GOOD, ODD[1], {"messages": said("one")}, GOOD], template=QWEN3)
    second = tmp_path / "second.jsonl"
    second.write_text("".join(json.dumps(row) + "\n" for row in [{"messages": said("one", "long " * 90)}, ODD[10]]))
    recipe.data.train.append(recipe.data.train[0].model_copy(update={"path": str(second)}))

    def numbers(**asked):
        return [line["row"] for line in shown(recipe, chat, **asked)]

    assert numbers() == [0, 1, 1, 2, 3, 4, 5]
    assert numbers(most=2) == [0, 1, 1]
    assert numbers(rows=[3, 5]) == [3, 5]
    assert numbers(where="split") == [1, 1]
    assert numbers(where="overlength") == [4]
    assert numbers(where="zero_loss") == [2, 5]
    assert numbers(where="zero_loss", most=1) == [2]
    with pytest.raises(DataError, match="there is no row 6") as caught:
        numbers(rows=[0, 6])
    assert "6 rows" in caught.value.hint


def test_columns_that_make_no_rows(rows_and_chat):
    recipe, chat = rows_and_chat([{"question": "one", "answer": "two"}, "{", {"question": "three"}])
    lines = shown(recipe, chat)
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert "make no shape of rows" in lines[0]["error"]["message"]
    assert "not valid JSON" in lines[1]["error"]["message"]
    with pytest.raises(DataError):
        load_rows(recipe, chat)
