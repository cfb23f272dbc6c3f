"""Rows for people: what of a row is shown where, how it differs from inference, and the bin that it is in."""

import pytest

from finetune_cli.data.preview import search
from finetune_cli.data.rows import load_rows
from finetune_cli.data.sheets import packing, sheets
from finetune_cli.engine.prepare import make_units
from tests.helpers import QWEN3, R1, questions, said


def sheets_of(recipe, chat, bins=None, **asked):
    found = search(recipe, chat, **asked)
    return [s for one in found for s in sheets(one, recipe, chat, bins or {})]


def text_of(pieces, state=None):
    return "".join(piece.text for piece in pieces if state in (None, piece.state))


def test_one_row(rows_and_chat):
    recipe, chat = rows_and_chat([{"messages": said("one", "two")}])
    (sheet,) = sheets_of(recipe, chat)
    (block,) = sheet.blocks
    assert (sheet.row, sheet.parts, sheet.tokens, sheet.trained) == (0, 1, block.tokens, block.turns[1].trained)
    assert sheet.place.endswith("train.jsonl:1")
    assert [turn.role for turn in block.turns] == ["user", "assistant"]
    assert text_of(block.turns[1].pieces, "trained") == "two<|im_end|>"
    assert [piece.text for piece in block.turns[0].pieces if piece.special] == ["<|im_start|>", "<|im_end|>"]
    assert (sheet.prompts, sheet.differences, sheet.warnings, sheet.error) == (1, [], [], "")


def test_a_cut_row_shows_what_was_cut(rows_and_chat):
    rows = [{"messages": said("one", "long " * 40)}]
    recipe, chat = rows_and_chat(rows, data={"max_length": 30, "overlength": "truncate"})
    (sheet,) = sheets_of(recipe, chat)
    turn = sheet.blocks[0].turns[-1]
    assert turn.cut > 10
    assert text_of(turn.pieces, "cut").endswith("long <|im_end|>\n")
    assert sheet.tokens == 30
    recipe, chat = rows_and_chat(rows, data={"max_length": 30})
    (sheet,) = sheets_of(recipe, chat)
    assert sheet.dropped == f"overlength: {sheet.tokens} tokens, data.max_length is 30"
    assert sheet.trained == 0


def test_a_pair_has_its_prompt_once(rows_and_chat):
    pair = {
        "prompt": said("one"),
        "chosen": said("good", first="assistant"),
        "rejected": said("bad", first="assistant"),
    }
    recipe, chat = rows_and_chat([pair], method="dpo")
    (sheet,) = sheets_of(recipe, chat)
    assert [block.name for block in sheet.blocks] == ["prompt", "chosen", "rejected"]
    assert [turn.role for turn in sheet.blocks[0].turns] == ["user", "(opens the answer)"]
    prompt, chosen, rejected = (text_of([p for t in block.turns for p in t.pieces]) for block in sheet.blocks)
    assert prompt == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert (chosen.strip(), rejected.strip()) == ("good<|im_end|>", "bad<|im_end|>")
    assert (sheet.prompts, sheet.differences) == (2, [])


def test_a_pair_that_is_scored_is_not_compared_with_a_prompt(rows_and_chat):
    pair = {"prompt": said("one"), "chosen": "good", "rejected": "bad"}
    pair |= {name: said(pair[name], first="assistant") for name in ("chosen", "rejected")}
    recipe, chat = rows_and_chat([pair], method="reward")
    (sheet,) = sheets_of(recipe, chat)
    assert (sheet.trained, sheet.prompts, sheet.differences) == (2, 0, [])


def test_a_trained_prompt_is_shown_as_trained(rows_and_chat):
    pair = {"prompt": "one", "chosen": " good", "rejected": " bad"}
    recipe, chat = rows_and_chat([pair], method="orpo")
    (sheet,) = sheets_of(recipe, chat)
    assert sheet.trained == sum(turn.trained for block in sheet.blocks for turn in block.turns)
    assert (sheet.prompts, sheet.differences) == (2, [])


def test_text_and_tokens_have_one_turn(rows_and_chat):
    for row in ({"text": "one two"}, {"input_ids": [4, 5, 6]}):
        recipe, chat = rows_and_chat([row])
        (sheet,) = sheets_of(recipe, chat)
        assert [turn.role for turn in sheet.blocks[0].turns] == ["completion"]
        assert (sheet.prompts, sheet.differences) == (0, [])


def test_a_prompt_and_its_completion_are_two_turns(rows_and_chat):
    recipe, chat = rows_and_chat([{"prompt": "one", "completion": " two"}], bos="<s>")
    (sheet,) = sheets_of(recipe, chat)
    assert [(turn.role, text_of(turn.pieces)) for turn in sheet.blocks[0].turns] == [
        ("prompt", "one"), ("completion", " two<|im_end|>")
    ]  # fmt: skip
    assert (sheet.prompts, sheet.differences) == (1, [])


def test_a_conversation_in_parts(rows_and_chat):
    recipe, chat = rows_and_chat([{"messages": said("one", "two", "three", "four")}], template=QWEN3)
    first, second = sheets_of(recipe, chat)
    assert [(s.row, s.part, s.parts, s.prompts, s.differences) for s in (first, second)] == [
        (0, 0, 2, 1, []),
        (0, 1, 2, 1, []),
    ]
    assert [turn.role for turn in first.blocks[0].turns] == ["user", "assistant"]
    assert [turn.trained > 0 for turn in second.blocks[0].turns] == [False, False, False, True]


def test_a_difference_to_inference_is_said(rows_and_chat):
    rows = [{"messages": said("one", "two")}]
    settings = {"template": R1, "bos": "<s>", "eos": "</s>"}
    recipe, chat = rows_and_chat(rows, data={"template_mismatch": "render"}, **settings)
    (sheet,) = sheets_of(recipe, chat)
    (said_so,) = sheet.differences
    assert "inference feeds" in said_so
    assert "<think>" in said_so.partition("the row has")[0]
    assert "<think>" not in said_so.partition("the row has")[2]
    recipe, chat = rows_and_chat(rows, data={"template_mismatch": "inference"}, **settings)
    (sheet,) = sheets_of(recipe, chat)
    assert (sheet.prompts, sheet.differences) == (1, [])


def test_bins_are_those_of_training(rows_and_chat):
    rows = questions(20)
    recipe, chat = rows_and_chat(
        rows, method={"name": "sft", "packing": True}, data={"max_length": 100, "eval_split": 0.1}
    )
    bins, told = packing(recipe, chat)
    units = make_units(load_rows(recipe, chat).train.rows, recipe, None)
    for number, unit in enumerate(units):
        for row in unit:
            (found,) = bins[row.source, row.part]
            assert (found.number, found.tokens, found.capacity) == (number, sum(r.length for r in unit), 100)
            assert sorted(found.others) == sorted((r.source, r.part) for r in unit if r is not row)
    fill = sum(row.length for unit in units for row in unit) / (100 * len(units))
    assert told == f"packing: 18 rows in {len(units)} bins of 100 tokens, {fill:.1%} full"
    sheet = sheets_of(recipe, chat, bins, rows=[units[0][0].source])[0]
    assert sheet.bins == bins[units[0][0].source, 0]


def test_bins_of_rows_that_cannot_be_trained_on(rows_and_chat):
    recipe, chat = rows_and_chat([*questions(2), "{"], method={"name": "sft", "packing": True})
    bins, told = packing(recipe, chat)
    assert bins == {}
    assert "is not known" in told
    assert packing(*rows_and_chat(questions(2))) == ({}, "")


@pytest.mark.parametrize("row", ['{"messages": [{"role": "bot", "content": "x"}]}', "{"])
def test_a_row_that_cannot_be_rendered(rows_and_chat, row):
    recipe, chat = rows_and_chat([*questions(1), row])
    _, sheet = sheets_of(recipe, chat)
    assert sheet.error.startswith("malformed: ")
    assert "train.jsonl:2" in sheet.error
    assert sheet.blocks == []


def test_a_prompt_alone_is_shown(rows_and_chat, tmp_path):
    (tmp_path / "judge.py").write_text("def judge(prompts, responses, rows):\n    return [0.0 for _ in prompts]\n")
    method = {"name": "ppo", "reward": f"{tmp_path}/judge.py:judge"}
    recipe, chat = rows_and_chat([{"prompt": said("one")}], method=method)
    (sheet,) = sheets_of(recipe, chat)
    (block,) = sheet.blocks
    assert (block.name, sheet.trained, sheet.tokens) == ("prompt", 0, block.tokens)
    assert "one" in text_of(piece for turn in block.turns for piece in turn.pieces)
