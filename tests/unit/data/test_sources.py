"""Sources: every kind of file gives the same rows, every shape its canonical form, every mistake its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.data.cells import EmptyValue
from finetune_cli.data.readers import fingerprint
from finetune_cli.data.sources import load, shape_of
from finetune_cli.errors import DataError
from finetune_cli.recipe.sections import Source
from tests.helpers import said

TALK = {"messages": said("one", "two")}
CALL = '{"name": "add", "arguments": {"a": 1}}'
CALLED = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


def written(folder: Path, *rows: Any, name: str = "train.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def canonical(folder: Path, row: dict[str, Any], **settings: Any) -> dict[str, Any]:
    table = load(Source(path=written(folder, row), **settings))
    return table.canonical(table.raws[0])


def every_row(source: Source) -> list[dict[str, Any]]:
    table = load(source)
    return [table.canonical(raw) for raw in table.raws]


# --- files -------------------------------------------------------------------------------------------------------


def test_every_kind_of_file(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c, d", "completion": "e\nf"}]
    data = Dataset.from_list(rows)
    written(tmp_path, *rows)
    (tmp_path / "train.json").write_text(json.dumps(rows))
    data.to_csv(tmp_path / "train.csv")
    data.to_parquet(tmp_path / "train.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"test": data}).save_to_disk(tmp_path / "splits")
    for name in ("train.jsonl", "train.json", "train.csv", "train.parquet", "saved"):
        table = load(Source(path=str(tmp_path / name)), first=5)
        assert [table.canonical(raw) for raw in table.raws] == rows, name
        assert [raw.source for raw in table.raws] == [5, 6]
    assert len(load(Source(path=str(tmp_path / "splits"), split="test")).raws) == 2
    with pytest.raises(DataError, match="no split 'train'") as caught:
        load(Source(path=str(tmp_path / "splits")))
    assert "test" in caught.value.hint


def test_arrow_nulls_below_the_columns_are_dropped(tmp_path):
    from datasets import Dataset

    rows = [
        {"messages": said("one", "two")},
        {"messages": [*said("one"), {"role": "assistant", "content": "x", "name": "Bo"}]},
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    table = load(Source(path=str(tmp_path / "train.parquet")))
    assert [table.canonical(raw) for raw in table.raws] == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', "a.jsonl:3: not valid JSON (Expecting value at column 9)"),
        ("a.jsonl", '{"text": "a"}\n7\n', "a.jsonl:2: is 7, expected an object"),
        ("a.json", '[{"text": "a"},\n{"text" "b"}]', "a.json:2: not valid JSON (Expecting ':' delimiter at column 9)"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', "a.jsonl:2: holds half of a surrogate pair"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100000, "a.jsonl:2: not readable JSON (maximum recursion depth exceeded"),
        ("a.json", '[{"text": "a"},\n{"text": "b"}\n{}]', "a.json:3: not valid JSON (Expecting ',' or the end of the"),
        ("a.json", '[{"text": "a"},\n]', "a.json:2: not valid JSON (Expecting value at column 1)"),
        ("a.json", '[{"text": "a"}] x', "a.json:1: not valid JSON (Expecting ',' or the end of the list at column 15)"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "a.json:2:1: not valid JSON (Extra data)"),
        ("a.json", '{"text": "a"}', "a.json is an object with text, expected a list of rows"),
        ("a.json", '[{"text": "a"}, "b"]', "a.json:1: is the text 'b', expected an object"),
        ("a.csv", "prompt,completion\na,b\nc\n", "a.csv:3: fewer cells than the header's 2"),
        ("a.csv", "prompt,completion\na,b,c\n", "a.csv:2: more cells than the header's 2"),
        ("a.csv", 'prompt,completion\na,b\n"c', "a.csv:3: not valid CSV (unexpected end of data)"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv:1: two columns are named 'prompt'"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.parquet", "no", "a.parquet is not a parquet file"),
        ("a.jsonl", "", "a.jsonl has no rows"),
    ],
)
def test_mistakes_in_files(tmp_path, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with pytest.raises(DataError) as caught:
        every_row(Source(path=name))
    assert caught.value.message.startswith(message)


def test_bad_lines_are_rows_and_the_others_go_on(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{\n\n{"text": "b"}\n{"text": "\xe4"}\n{"text": "c"}\n')
    table = load(Source(path=str(path)))
    wrong = [(raw.row, raw.line) for raw in table.raws if raw.wrong]
    assert wrong == [(1, 2), (3, 5)]
    assert [table.canonical(raw)["text"] for raw in table.raws if not raw.wrong] == ["a", "b", "c"]


def test_a_file_without_a_good_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n[1]\n")
    with pytest.raises(DataError) as caught:
        load(Source(path=str(path)))
    assert [problem.line for problem in caught.value.problems] == [1, 2]


def test_lines_of_rows(tmp_path):
    rows = [{"text": "a\nb"}, {"text": "c"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.csv").write_text('text\n"a\nb"\n\nc\n')
    tables = [load(Source(path=str(tmp_path / name))) for name in ("a.json", "a.csv")]
    assert [[raw.line for raw in table.raws] for table in tables] == [[2, 5], [2, 5]]
    assert [table.canonical(table.raws[0]) for table in tables] == [rows[0]] * 2


@pytest.mark.parametrize(
    ("first", "second", "column"),
    [
        (
            {"prompt": "a", "completion": "b"},
            {"prompt": said("a"), "completion": said("b", first="assistant")},
            "prompt",
        ),
        ({"query": said("a")}, {"query": "a"}, "query"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a", "chosen": said("b"), "rejected": "c"},
            "chosen",
        ),
    ],
)
def test_text_and_messages_in_one_column(tmp_path, monkeypatch, first, second, column):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, first, first, second)
    table = load(Source(path="train.jsonl"))
    assert [raw.wrong for raw in table.raws[:2]] == [None, None]
    with pytest.raises(DataError, match=r"^train.jsonl:3: is .*, and in train.jsonl:1 it is (text|messages)") as caught:
        table.canonical(table.raws[2])
    assert caught.value.problems[0].key == column


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        load(Source(path=str(tmp_path / "no.jsonl")))
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        load(Source(path=str(tmp_path)))
    assert "save_to_disk" in caught.value.hint
    with pytest.raises(DataError, match="`split` and `name`"):
        load(Source(path=written(tmp_path, TALK), split="train"))


def test_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "ä\u2028b"}\n'.encode())
    table = load(Source(path=str(path)))
    assert table.canonical(table.raws[0]) == {"text": "ä\u2028b"}
    for name, text in {"a.jsonl": b'{"text": "\xe4"}\n', "a.csv": b"text\n\xe4\n"}.items():
        (tmp_path / name).write_bytes(text)
        with pytest.raises(DataError, match="not UTF-8"):
            load(Source(path=str(tmp_path / name)))


def test_fingerprint_follows_the_bytes(tmp_path):
    source = Source(path=written(tmp_path, TALK))
    before = fingerprint(source)
    assert fingerprint(source) == before
    written(tmp_path, TALK, TALK)
    assert fingerprint(source) != before


# --- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "shape"),
    [
        ("messages id", "messages"),
        ("conversations tools", "messages"),
        ("prompt completion", "completion"),
        ("instruction input output", "messages"),
        ("text", "text"),
        ("prompt chosen rejected", "pairs"),
        ("chosen rejected", "pairs"),
        ("prompt answer", "prompt"),
        ("query", "prompt"),
        ("input_ids attention_mask", "tokens"),
        ("text input_ids labels", "tokens"),
        ("question answer", None),
    ],
)
def test_shape_of(columns, shape):
    assert shape_of(columns.split()) == shape


def test_a_method_sees_the_shapes_it_takes():
    assert shape_of(["messages", "chosen", "rejected"]) == "pairs"
    assert shape_of(["messages", "chosen", "rejected"], ("messages", "text")) == "messages"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (TALK, TALK),
        ({"messages": {"role": "user", "content": "one"}}, {"messages": said("one")}),
        ({"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}, TALK),
        ({"conversations": said("one", "two"), "system": ""}, TALK),
        ({**TALK, "system": "S"}, {"messages": [{"role": "system", "content": "S"}, *said("one", "two")]}),
        ({**TALK, "tools": ""}, TALK),
        ({**TALK, "tools": '[{"name": "f"}]'}, {**TALK, "tools": [{"type": "function", "function": {"name": "f"}}]}),
        ({**TALK, "chat_template_kwargs": {"a": 1}}, {**TALK, "chat_template_kwargs": {"a": 1}}),
        (
            {"conversations": [{"from": "function_call", "value": CALL}, {"from": "observation", "value": "3"}]},
            {
                "messages": [
                    {"role": "assistant", "content": "", "tool_calls": CALLED},
                    {"role": "tool", "content": "3"},
                ]
            },
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [json.loads(CALL)]}]},
            {"messages": [{"role": "assistant", "content": "", "tool_calls": CALLED}]},
        ),
        ({"messages": [said("one")[0], {**said("one", "two")[1], "tool_calls": []}]}, TALK),
        ({"instruction": "one", "input": "", "output": "two"}, TALK),
        ({"instruction": "one", "input": "more", "output": "two"}, {"messages": said("one\n\nmore", "two")}),
        (
            {"instruction": "three", "output": "four", "system": "S", "history": [["one", "two"]]},
            {"messages": [{"role": "system", "content": "S"}, *said("one", "two", "three", "four")]},
        ),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}),
        (
            {"prompt": said("one"), "completion": {"role": "assistant", "content": "two"}},
            {"prompt": said("one"), "completion": [{"role": "assistant", "content": "two"}]},
        ),
        ({"text": "a"}, {"text": "a"}),
        ({"prompt": "a", "id": 1}, {"prompt": "a"}),
        ({"query": "a", "tools": None}, {"prompt": "a"}),
        (
            {"query": said("a"), "tools": [{"name": "f"}]},
            {"prompt": said("a"), "tools": [{"type": "function", "function": {"name": "f"}}]},
        ),
        ({"input_ids": [1, 2]}, {"input_ids": [1, 2]}),
        (
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
            {"input_ids": [1, 2, 3], "trained": [False, True, True]},
        ),
    ],
)
def test_canonical(tmp_path, row, expected):
    assert canonical(tmp_path, row) == expected


def test_columns_and_roles_are_mapped(tmp_path):
    row = {"talk": [{"from": "me", "value": "one"}, {"from": "bot", "value": "two"}], "messages": 7, "id": 1}
    source = Source(
        path=written(tmp_path, row), columns={"messages": "talk"}, roles={"user": ["me"], "assistant": ["bot"]}
    )
    table = load(source)
    assert table.canonical(table.raws[0]) == TALK
    assert table.unused == ("messages", "id")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, "messages is the text 'hi', expected a list of messages"),
        ({"messages": [7]}, "messages[0] is 7, expected an object with role and content"),
        (
            {"messages": [{"role": "user"}]},
            "messages[0] is an object with role, expected an object with role and content",
        ),
        ({"messages": [{"content": "a"}]}, "messages[0] is an object with content, expected an object with role"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role is the text 'bot', expected one of user"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content is 7, expected text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages[0].content[0] is an object with type",
        ),
        ({"messages": [{"role": "user", "content": "a", "trainable": True}]}, "messages[0].trainable is true"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0] is an object"),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            "conversations[0].value is the text 'add(1)'",
        ),
        ({**TALK, "tools": "{"}, "tools is the text '{', expected a list of tools, or JSON text of one"),
        ({**TALK, "tools": [7]}, "tools[0] is 7"),
        ({**TALK, "chat_template_kwargs": [1]}, "chat_template_kwargs is a list of 1, expected an object"),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
            "completion is a list of 1, expected the kind",
        ),
        ({"prompt": 7, "completion": "b"}, "prompt is 7, expected text"),
        (
            {"prompt": "a", "completion": "b", "tools": [{"name": "f"}]},
            "prompt is the text 'a', expected messages, because",
        ),
        (
            {"prompt": "a", "chat_template_kwargs": {"x": 1}},
            "prompt is the text 'a', expected messages, because the row has",
        ),
        (
            {**TALK, "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs.tools is an empty list, expected nothing",
        ),
        ({"input_ids": "1 2"}, "input_ids is the text '1 2', expected a list of token ids"),
        ({"input_ids": [1, -2]}, "input_ids is a list of 2, expected a list of token ids"),
        ({"input_ids": [1, True]}, "input_ids is a list of 2, expected a list of token ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels is a list of 1, expected 2 labels, as many as input_ids"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels[0] is 2, expected -100, or 1 as in input_ids"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "attention_mask is a list of 2, expected ones alone"),
        ({"text": ["a"]}, "text is a list of 1, expected text"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history[0] is a list of 1, expected a pair"),
    ],
)
def test_malformed(tmp_path, monkeypatch, row, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        canonical(tmp_path, row)
    assert caught.value.message.startswith(f"train.jsonl:1: {message}")
    (problem,) = caught.value.problems
    assert (problem.rule, problem.line, problem.key) == ("malformed", 1, message.split(" is ")[0])


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"text": ""}, "text"),
        ({"text": None}, "text"),
        ({"prompt": "a", "completion": ""}, "completion"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"instruction": "a", "output": ""}, "output"),
        ({"input_ids": []}, "input_ids"),
        ({"query": None}, "query"),
    ],
)
def test_empty(tmp_path, row, field):
    with pytest.raises(EmptyValue) as caught:
        canonical(tmp_path, row)
    assert caught.value.problems[0].key == field


def test_a_row_of_another_shape(tmp_path):
    table = load(Source(path=written(tmp_path, TALK, {"prompt": "a", "completion": "b"})))
    with pytest.raises(DataError, match=r"train.jsonl:2: the row has no messages, as other rows have"):
        table.canonical(table.raws[1])


def test_no_shape(tmp_path):
    with pytest.raises(DataError, match="the columns question, answer make no shape") as caught:
        load(Source(path=written(tmp_path, {"question": "a", "answer": "b"})))
    assert "columns: {messages:" in caught.value.hint
    with pytest.raises(DataError, match="are pairs, which the method does not take"):
        load(Source(path=written(tmp_path, {"chosen": "a", "rejected": "b"})), accepts=("messages",))


def test_wrong_maps(tmp_path):
    path = written(tmp_path, TALK)
    with pytest.raises(DataError, match="no column 'talk'"):
        load(Source(path=path, columns={"messages": "talk"}))
    with pytest.raises(DataError, match="not a column we read") as caught:
        load(Source(path=path, columns={"mesages": "messages"}))
    assert "messages" in caught.value.hint
    with pytest.raises(DataError, match="no role 'asistant'"):
        load(Source(path=path, roles={"asistant": ["bot"]}))


@pytest.mark.parametrize(
    ("row", "columns", "shape"),
    [
        ({"instruction": "a", "output": "b", "text": "a b"}, {"text": "text"}, "text"),
        ({"instruction": "a", "output": "b", "text": "a b"}, None, "messages"),
        ({**TALK, "question": "a", "answer": "b"}, {"prompt": "question", "completion": "answer"}, "completion"),
        ({"chosen": "a", "rejected": "b", "asked": "c"}, {"prompt": "asked"}, "pairs"),
        ({"messages": None, "prompt": "a", "completion": "b"}, None, "completion"),
    ],
)
def test_what_is_mapped_and_what_is_empty_decide_the_shape(row, columns, shape, tmp_path):
    assert load(Source(path=written(tmp_path, row), columns=columns)).shape.name == shape


def test_a_null_in_the_first_row_decides_nothing(tmp_path):
    rows = {"instruction": "a", "output": None, "text": "t"}, {"instruction": "a", "output": "b", "text": "t"}
    assert load(Source(path=written(tmp_path, *rows))).shape.name == "messages"


def test_a_mapping_that_nothing_reads_is_refused(tmp_path):
    path = written(tmp_path, {"prompt": "a", "completion": "b", "s": "c"})
    with pytest.raises(DataError, match=r"columns\.system: the rows are read as completion") as caught:
        load(Source(path=path, columns={"system": "s"}))
    assert "Take it out" in caught.value.hint


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "output": "b", "history": 5}, "history is"),
        ({"instruction": "a", "output": "b", "history": [["q", " "]]}, "says something"),
        ({"instruction": " \n", "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "output": " "}, "output is"),
        ({"prompt": "a", "completion": "  "}, "completion is"),
        ({"input_ids": [1, 2], "attention_mask": 1}, "attention_mask is"),
        ({**TALK, "tools": [{"type": "function", "function": {"name": None}}]}, "tools\\[0\\] is"),
        ({"messages": [*said("a"), {"role": "function_call", "content": CALL, "trainable": "no"}]}, "true or false"),
    ],
)
def test_cells_of_a_wrong_kind_are_named(row, said, tmp_path):
    with pytest.raises(DataError, match=said):
        canonical(tmp_path, row)


def test_white_space_in_an_optional_column_says_nothing(tmp_path):
    row = {"instruction": "a", "input": " ", "output": "b", "tools": "  "}
    assert canonical(tmp_path, row)["messages"][0]["content"] == "a"


def test_an_answer_that_is_only_reasoned(tmp_path):
    row = {"messages": [*said("a"), {"role": "assistant", "content": "", "reasoning": "hm"}]}
    assert canonical(tmp_path, row)["messages"][1]["reasoning"] == "hm"


def test_a_column_that_is_not_read_may_be_mixed(tmp_path):
    table = load(Source(path=written(tmp_path, {**TALK, "prompt": "a"}, {**TALK, "prompt": said("b")})))
    assert [raw.wrong for raw in table.raws] == [None, None]
