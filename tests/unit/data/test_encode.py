"""Encode: what is kept, what is dropped under which cause, when that is an error, and what is drawn by the seed."""

import json
from dataclasses import replace
from typing import Any

import pytest

from finetune_cli.data.chat import Chat
from finetune_cli.data.encode import encode_row, encode_set, fit, split_eval, weighted
from finetune_cli.data.sources import load
from finetune_cli.errors import DataError
from finetune_cli.methods.dpo import Dpo
from finetune_cli.methods.orpo import Orpo
from finetune_cli.methods.reward import Reward
from finetune_cli.methods.sft import Sft
from finetune_cli.recipe.sections import Data, Source
from finetune_cli.types import Branch, Row
from tests.helpers import CHATML, GEMMA, QWEN3, said, tiny_tokenizer, trained_texts

GOOD = {"messages": said("one", "two")}
LONG = {"messages": said("one", "two " * 40)}
EMPTY = {"messages": said("one", "")}
NO_TARGETS = {"messages": said("one")}
BAD = {"messages": [{"role": "bot", "content": "a"}]}
SYSTEM = {"messages": [{"role": "system", "content": "S"}, *said("one", "two")]}


@pytest.fixture(scope="module")
def chat():
    return Chat.bind(tiny_tokenizer())


@pytest.fixture
def source(tmp_path):
    def write(*rows: Any, name: str = "train.jsonl", **settings: Any) -> Source:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(path), **settings)

    return write


def encode(chat, *sources, seed=1, method=None, **settings):
    data = Data(train=list(sources), **{"max_length": 40, "max_dropped_fraction": 1.0} | settings)
    return encode_set(method or Sft(), sources, chat, data, seed=seed)


def test_everything_is_counted(chat, source):
    found = encode(chat, source(GOOD, LONG, EMPTY, NO_TARGETS, GOOD))
    assert [row.source for row in found.rows] == [0, 4]
    report = found.report
    assert (report["read"], report["kept"], report["rows"], report["truncated"]) == (5, 2, 2, 0)
    assert report["dropped"] == {"empty": 1, "no_targets": 1, "overlength": 1}
    assert report["examples"]["empty"][0].endswith("train.jsonl:3: messages[1].content is empty text, expected text")
    assert "unused" in report


def test_unrenderable_rows_are_dropped_with_the_reason(source):
    gemma = Chat.bind(tiny_tokenizer(GEMMA, bos="<s>", eos="<end_of_turn>"))
    found = encode(gemma, source(GOOD, SYSTEM))
    assert found.report["dropped"] == {"unrenderable": 1}
    assert "System role not supported" in found.report["examples"]["unrenderable"][0]


def test_too_many_dropped(chat, source):
    rows = [GOOD] * 9 + [EMPTY]
    assert encode(chat, source(*rows), max_dropped_fraction=0.1).report["kept"] == 9
    with pytest.raises(
        DataError, match=r"1 of 10 rows are dropped, more than data.max_dropped_fraction 0.05"
    ) as caught:
        encode(chat, source(*rows), max_dropped_fraction=0.05)
    (problem,) = caught.value.problems
    assert (problem.line, problem.rule) == (10, "FT001")
    assert problem.message.startswith("1 row dropped as empty, the first: messages[1].content is empty text")
    with pytest.raises(DataError, match="2 of 2 rows are dropped, so none is left"):
        encode(chat, source(EMPTY, LONG))


def test_malformed_rows_are_always_an_error_and_all_are_told(chat, source):
    with pytest.raises(DataError, match=r"train.jsonl:2: messages\[0\].role is the text 'bot'") as caught:
        encode(chat, source(GOOD, BAD, GOOD, {"text": "a"}))
    assert [problem.line for problem in caught.value.problems] == [2, 4]


def test_overlength(chat, source):
    rows = source(GOOD, LONG)
    assert encode(chat, rows, overlength="drop").report["dropped"] == {"overlength": 1}
    with pytest.raises(DataError, match=r"1 rows are longer than data.max_length 40"):
        encode(chat, rows, overlength="error")
    found = encode(chat, rows, overlength="truncate")
    assert found.report["truncated"] == 1
    assert [(row.length <= 40, row.truncated) for row in found.rows] == [(True, False), (True, True)]
    (whole,) = chat.conversation(LONG, loss_on="assistant")
    assert found.rows[1].branches[0].ids == whole.branches[0].ids[:40]


def test_a_prompt_that_fills_max_length_is_dropped(chat, source):
    long_prompt = {"messages": said("one " * 60, "two")}
    assert encode(chat, source(GOOD, long_prompt), overlength="truncate").report["dropped"] == {"overlength": 1}


def test_fit_cuts_every_branch_behind_the_shared_prefix():
    row = Row([1, 2, 3], (Branch([4, 5, 6], [True] * 3, "chosen"), Branch([7], [True], "rejected")))
    cut, cause = fit(row, 5, "truncate")
    assert cause is None
    assert [branch.ids for branch in cut.branches] == [[4, 5], [7]]
    assert fit(row, 3, "truncate")[1] == "overlength"
    assert fit(row, 6, "drop") == (row, None)
    late = replace(row, branches=(Branch([4, 5, 6], [False, False, True]), row.branches[1]))
    assert fit(late, 5, "truncate")[1] == "overlength"


def test_the_first_token_of_all_is_no_target():
    assert fit(Row([], (Branch([1], [True]),)), 9, "drop")[1] == "no_targets"


def test_parts_of_a_conversation_are_dropped_one_by_one(source):
    chat = Chat.bind(tiny_tokenizer(QWEN3))
    found = encode(chat, source({"messages": said("one", "two", "three", "four " * 40)}))
    assert [(row.source, row.part) for row in found.rows] == [(0, 0)]
    assert (found.report["dropped"], found.report["parts_dropped"]) == ({}, {"overlength": 1})


def test_encode_row_is_total(chat, source):
    table = load(source(GOOD, BAD, EMPTY, LONG))
    data = Data(train=[Source(path="x")], max_length=40)
    good, bad, empty, long = (encode_row(Sft(), table, raw, chat=chat, data=data) for raw in table.raws)
    assert (good.dropped, good.error, len(good.rows)) == (None, None, 1)
    assert trained_texts(chat.tokenizer, good.rows[0]) == ["two<|im_end|>"]
    assert (bad.dropped, bad.rows) == ("malformed", [])
    assert bad.error is not None
    assert (bad.error.line, bad.error.rule) == (2, "malformed")
    assert empty.dropped == "empty"
    assert (long.dropped, long.error, [cause for _, cause in long.lost]) == ("overlength", None, ["overlength"])


def test_warnings_are_counted_with_an_example(chat, source):
    report = encode(chat, source(GOOD, {"messages": said("x", "one", "two", first="assistant")})).report
    assert report["warnings"]["leading_assistant"]["rows"] == 1
    assert "train.jsonl:2: message 0" in report["warnings"]["leading_assistant"]["example"]


def test_many_rows_in_threads_are_the_same_rows(chat, source):
    rows = [{"messages": said(f"say {i}", f"it is {i}")} for i in range(250)]
    found = encode(chat, source(*rows))
    one_by_one = [row for talk in rows for row in chat.conversation(talk, loss_on="assistant")]
    assert [row.branches for row in found.rows] == [row.branches for row in one_by_one]
    assert [row.source for row in found.rows] == list(range(250))


def test_sources_are_counted_on(chat, source):
    found = encode(chat, source(GOOD, GOOD), source({"text": "a b", "id": 1}, name="more.jsonl"))
    assert [row.source for row in found.rows] == [0, 1, 2]
    assert [*found.report["unused"].values()] == [["id"]]


@pytest.mark.parametrize(("weight", "count"), [(1.0, 10), (2.0, 20), (0.5, 5), (2.3, 23)])
def test_weights(weight, count):
    conversations = [[Row([], (), source=i)] for i in range(10)]
    rows = weighted(conversations, weight, "1 0")
    assert len(rows) == count
    assert rows == weighted(conversations, weight, "1 0")
    seen = [sum(row.source == i for row in rows) for i in range(10)]
    assert max(seen) - min(seen) <= 1


def test_repeats_are_apart_and_in_the_order_of_the_file():
    rows = weighted([[Row([], (), source=i)] for i in range(4)], 2.5, "1 0")
    assert [row.source for row in rows[:8]] == [0, 1, 2, 3] * 2
    drawn = [row.source for row in rows[8:]]
    assert len(drawn) == 2
    assert drawn == sorted(drawn)
    other = [
        row.source for seed in range(9) for row in weighted([[Row([], (), source=i)] for i in range(4)], 0.5, f"{seed}")
    ]
    assert {*other} == {0, 1, 2, 3}


def test_sources_of_unequal_weight(chat, source):
    found = encode(chat, source(GOOD, GOOD, weight=2.0), source(GOOD, GOOD, GOOD, GOOD, name="b.jsonl", weight=0.5))
    seen = [row.source for row in found.rows]
    assert seen[:4] == [0, 1, 0, 1]
    assert len(seen) == 6
    assert {*seen[4:]} < {2, 3, 4, 5}
    assert (found.report["read"], found.report["rows"]) == (6, 6)


def test_rows_of_tokens_are_taken_as_they_are(chat, source):
    found = encode(chat, source({"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5]}))
    assert [(row.branches[0].ids, row.branches[0].trained) for row in found.rows] == [
        ([1, 2, 3], [False, True, True]),
        ([4, 5], [True, True]),
    ]
    size = len(chat.tokenizer)
    with pytest.raises(DataError, match=f":2: has the token id {size}, the tokenizer {size} tokens"):
        encode(chat, source({"input_ids": [size - 1]}, {"input_ids": [0, size]}))
    with pytest.raises(DataError, match="none is left") as caught:
        encode(chat, source({"input_ids": [1, 2]}), method=Sft(loss_on="assistant"))
    assert "say so by their labels" in caught.value.problems[0].message


def test_all_malformed_rows_at_once(chat, source, tmp_path):
    path = source(GOOD, BAD, GOOD).path
    with open(path, "a") as file:
        file.write("{\n[]\n")
    with pytest.raises(DataError) as caught:
        encode(chat, Source(path=path))
    assert [(problem.rule, problem.line) for problem in caught.value.problems] == [("malformed", i) for i in (2, 4, 5)]


def test_a_row_brings_its_own_template_arguments_and_tools(source):
    template = "{% if shout %}!{% endif %}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML
    chat = Chat.bind(tiny_tokenizer(template))
    tools = [{"name": "add"}]
    rows = [
        GOOD,
        GOOD | {"chat_template_kwargs": {"shout": True}},
        GOOD | {"tools": json.dumps(tools)},
        GOOD | {"tools": tools},
    ]
    texts = [chat.tokenizer.decode(row.branches[0].ids) for row in encode(chat, source(*rows)).rows]
    plain = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    assert texts == [plain, "!" + plain, "add" + plain, "add" + plain]


def test_split_eval():
    rows = [Row([], (), source=i, part=part) for i in range(10) for part in (0, 1)]
    train, held = split_eval(rows + rows, 0.2, 1)
    assert len({row.source for row in held}) == 2
    assert len(held) == 4
    assert not {row.source for row in train} & {row.source for row in held}
    assert len(train) == 32
    assert split_eval(rows + rows, 0.2, 1) == (train, held)
    assert split_eval(rows, 0.0, 1) == (rows, [])
    with pytest.raises(DataError, match="leaves none to train on"):
        split_eval(rows[:2], 0.5, 1)


def test_conversations_that_are_cut_are_counted_once(chat, source):
    found = encode(chat, source(GOOD, LONG, weight=3), overlength="truncate")
    assert (found.report["read"], found.report["rows"], found.report["truncated"]) == (2, 6, 1)


def test_a_pair_for_a_reward_model_is_cut_and_read_at_its_new_end(chat, source):
    pair = {"prompt": said("one"), "chosen": "two " * 40, "rejected": "three"}
    for method in (Reward(), Dpo()):
        found = encode(chat, source(pair), method=method, overlength="truncate")
        ((long, short),) = [row.branches for row in found.rows]
        assert (len(found.rows[0].prefix) + len(long.ids), found.report["truncated"]) == (40, 1)
        marks = [[i for i, t in enumerate(branch.trained) if t] for branch in (long, short)]
        ends = [len(long.ids) - 1, len(short.ids) - 1]
        if method.name == "reward":
            assert marks == [[end] for end in ends]
        else:  # the line break after the stop is not trained
            assert marks == [[*range(ends[0] + 1)], [*range(ends[1])]]


@pytest.mark.parametrize("method", [Dpo(), Orpo()])
def test_a_pair_that_says_it_is_the_wrong_way_round_is_refused(chat, source, method):
    pair = {"prompt": said("one"), "chosen": "two", "rejected": "three"}
    report = encode(chat, source({**pair, "label": -1}, {**pair, "label": 1}), method=method).report
    assert report["dropped"] == {"unrenderable": 1}
    assert "Swap chosen and rejected" in report["examples"]["unrenderable"][0]


@pytest.mark.parametrize("loss_on", ["assistant", "completion", "last_assistant"])
def test_text_has_no_turns_to_train(chat, source, loss_on):
    with pytest.raises(DataError, match="1 of 1 rows are dropped") as caught:
        encode(chat, source({"text": "one two"}), method=Sft(loss_on=loss_on))
    assert f"method.loss_on: {loss_on} needs messages" in caught.value.problems[0].message


def test_half_a_character_costs_its_row(chat, source):
    tool = '[{"name": "\\ud83d", "parameters": {}}]'
    rows = source({**GOOD, "tools": tool}, GOOD, name="tools.jsonl")
    template = "{{ tools | tojson if tools }}" + CHATML
    found = encode(Chat.bind(tiny_tokenizer(template)), rows)
    assert (found.report["kept"], found.report["dropped"]) == (1, {"unrenderable": 1})
