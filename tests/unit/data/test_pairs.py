"""Pairs in every form that people have, and the row of tokens that each becomes."""

import json
from typing import Any

import pytest

from finetune_cli.data.chat import Chat
from finetune_cli.data.pairs import boundary, joined
from finetune_cli.data.sources import load
from finetune_cli.errors import DataError
from finetune_cli.recipe.sections import Source
from finetune_cli.types import Row
from tests.helpers import LLAMA3, QWEN3, said, tiny_tokenizer

ASKED = said("What is two plus two?")
GOOD, BAD = said("It is four.", first="assistant"), said("It is five.", first="assistant")


def rows(tmp_path: Any, *values: dict[str, Any], template: str | None = None, **source: Any) -> tuple[list[Row], Any]:
    """(rows, [(id, message)] of what was noted)"""
    notes: list[tuple[str, str]] = []
    tokenizer = tiny_tokenizer(template) if template else tiny_tokenizer()
    chat = Chat.bind(tokenizer).noting(lambda name, text: notes.append((name, text)))
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(values))
    table = load(Source(path=str(path), **source), accepts=("pairs",))
    return [row for raw in table.raws for row in chat.pair(table.canonical(raw))], notes


def texts(row: Row, template: str | None = None) -> tuple[str, str, str]:
    decode = (tiny_tokenizer(template) if template else tiny_tokenizer()).decode
    return decode(row.prefix), decode(row.branches[0].ids), decode(row.branches[1].ids)


def trained(row: Row, template: str | None = None) -> tuple[str, ...]:
    decode = (tiny_tokenizer(template) if template else tiny_tokenizer()).decode
    return tuple(decode([i for i, t in zip(b.ids, b.trained, strict=True) if t]) for b in row.branches)


PROMPT = "<|im_start|>user\nWhat is two plus two?<|im_end|>\n<|im_start|>assistant\n"
FORMS = {
    "messages": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "one message object": {"prompt": ASKED, "chosen": GOOD[0], "rejected": BAD[0]},
    "answers as text": {"prompt": ASKED, "chosen": "It is four.", "rejected": "It is five."},
    "a question as text": {"prompt": "What is two plus two?", "chosen": GOOD, "rejected": BAD},
    "conversations": {
        "conversations": [{"from": "human", "value": "What is two plus two?"}],
        "chosen": {"from": "gpt", "value": "It is four."},
        "rejected": {"from": "gpt", "value": "It is five."},
    },
    "messages column": {"messages": ASKED, "chosen": GOOD, "rejected": BAD},
    "no prompt": {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "the prompt in both": {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "the question in both": {"prompt": "What is two plus two?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
    "instruction": {"instruction": "What is two plus two?", "chosen": "It is four.", "rejected": "It is five."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_is_the_same_row(form, tmp_path):
    (row,), notes = rows(tmp_path, FORMS[form])
    assert texts(row) == (PROMPT, "It is four.<|im_end|>\n", "It is five.<|im_end|>\n")
    assert trained(row) == ("It is four.<|im_end|>", "It is five.<|im_end|>")
    assert [branch.name for branch in row.branches] == ["chosen", "rejected"]
    assert [name for name, _ in notes] == (["implicit_prompt"] if form == "no prompt" else [])


def test_ids_are_the_tokenizers_own_for_each_render(tmp_path):
    (row,), _ = rows(tmp_path, FORMS["messages"], template=LLAMA3)
    tokenizer = tiny_tokenizer(LLAMA3)
    for branch, answer in zip(row.branches, (GOOD, BAD), strict=True):
        text = tokenizer.apply_chat_template(ASKED + answer, tokenize=False)
        assert [*row.prefix, *branch.ids] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(branch.trained[0] for branch in row.branches)  # the whole prompt is shared


def test_tools_and_system_and_several_turns(tmp_path):
    tool = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}
    template = "{% if tools %}<|im_start|>tools{{ tools | tojson }}<|im_end|>\n{% endif %}" + QWEN3
    value = {
        "system": "You add.", "tools": json.dumps([tool]), "chosen": GOOD, "rejected": BAD,
        "prompt": said("Hi.", "Hello.", "What is two plus two?"),
    }  # fmt: skip
    (row,), _ = rows(tmp_path, value, template=template)
    prefix, _, _ = texts(row, template)
    assert '"name": "add"' in prefix
    assert "You add." in prefix
    assert "Hello." in prefix  # an assistant's turn of the prompt: not trained
    assert trained(row, template)[0].endswith("It is four.<|im_end|>")


def test_an_answer_of_several_turns_trains_the_assistants(tmp_path):
    value = {
        "prompt": ASKED,
        "chosen": GOOD + said("Sure?", "Yes."),
        "rejected": GOOD + said("Sure?", "No."),
    }
    (row,), _ = rows(tmp_path, value)
    assert trained(row) == ("It is four.<|im_end|>Yes.<|im_end|>", "It is four.<|im_end|>No.<|im_end|>")
    assert texts(row)[0] == PROMPT  # what both answers begin with is not shared: it is trained


def test_answers_that_the_template_renders_in_pieces_are_refused(tmp_path):
    thinking = said("<think>\nx\n</think>\n\nFour.", first="assistant")
    more = thinking + said("Sure?", "<think>\ny\n</think>\n\nYes.")
    with pytest.raises(DataError, match="pieces"):
        rows(tmp_path, {"prompt": ASKED, "chosen": more, "rejected": more}, template=QWEN3)


class TestTexts:
    def test_the_prompt_is_shared_and_answers_get_an_end(self, tmp_path):
        (row,), notes = rows(tmp_path, {"prompt": "And three?", "chosen": " Six.", "rejected": " Seven."})
        assert texts(row) == ("And three?", " Six.<|im_end|>", " Seven.<|im_end|>")
        assert trained(row) == (" Six.<|im_end|>", " Seven.<|im_end|>")
        assert notes == []

    def test_an_empty_prompt(self, tmp_path):
        (row,), _ = rows(tmp_path, {"prompt": "", "chosen": "Six.", "rejected": "Seven."})
        assert row.prefix == []
        assert row.targets == sum(len(branch.ids) - 1 for branch in row.branches)

    def test_without_prompt_it_ends_where_the_last_answer_is_opened(self, tmp_path):
        start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: And three?\n\nAssistant:"
        value = {"chosen": start + " It is six.", "rejected": start + " It is seven."}
        (row,), notes = rows(tmp_path, value)
        assert texts(row) == (start, " It is six.<|im_end|>", " It is seven.<|im_end|>")
        assert trained(row)[0] == " It is six.<|im_end|>"  # the words that both share are trained
        assert notes == [
            ("implicit_prompt",
             f"no prompt column; the prompt is the first {len(start)} characters, although more words are shared")
        ]  # fmt: skip

    def test_without_any_turn_nothing_is_a_prompt(self, tmp_path):
        (row,), notes = rows(tmp_path, {"chosen": "The answer is six.", "rejected": "The answer is seven."})
        assert row.prefix == []
        assert trained(row)[0] == "The answer is six.<|im_end|>"
        assert "nothing: both are trained from their first word" in notes[0][1]

    @pytest.mark.parametrize(
        ("chosen", "rejected", "start"),
        [
            ("### Instruction:\nAdd.\n\n### Response:\nSix", "### Instruction:\nAdd.\n\n### Response:\nTen", 36),
            ("[INST] Add. [/INST] Six", "[INST] Add. [/INST] Ten", 19),
            ("<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB", "<|im_start|>user\nA<|im_end|>\n", 0),
            ("Human: my assistant is kind", "Human: my assistant is rude", 0),
            ("A: x", "B: x", 0),
            ("Human: 2+2\n\nAssistant: Sure.\nAnswer: 4", "Human: 2+2\n\nAssistant: Sure.\nAnswer: 5", 22),
            ("Human: a\nAI: b\nHuman: c\nAI: d", "Human: a\nAI: b\nHuman: c\nAI: e", 27),
        ],
    )  # fmt: skip
    def test_boundaries(self, chosen, rejected, start):
        found, _ = boundary(chosen, rejected)
        assert chosen[:found] == chosen[:start]


class TestTokens:
    def test_labels_say_where_the_answer_is(self, tmp_path):
        value = {
            "input_ids_chosen": [20, 21, 30, 31], "labels_chosen": [-100, -100, 30, 31],
            "input_ids_rejected": [20, 21, 30], "labels_rejected": [-100, -100, 30],
        }  # fmt: skip
        (row,), notes = rows(tmp_path, value)
        assert (row.prefix, [b.ids for b in row.branches]) == ([20, 21], [[30, 31], [30]])
        assert all(all(b.trained) for b in row.branches)
        assert notes == []

    def test_without_labels_the_prompt_ends_at_a_control_token(self, tmp_path):
        stop = tiny_tokenizer().convert_tokens_to_ids("<|im_end|>")
        value = {"input_ids_chosen": [20, stop, 40, 41], "input_ids_rejected": [20, stop, 40, 42]}
        (row,), notes = rows(tmp_path, value)
        assert row.prefix == [20, stop]  # 40 is a word that both answers begin with
        assert [name for name, _ in notes] == ["implicit_prompt"]

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ({"input_ids_chosen": [1, "a"], "input_ids_rejected": [1]}, "token ids"),
            ({"input_ids_chosen": [1, 2], "input_ids_rejected": []}, "at least one token"),
            ({"input_ids_chosen": [1, 2], "labels_chosen": [1], "input_ids_rejected": [1]}, "2 values"),
            ({"input_ids_chosen": [1, 2], "labels_chosen": [-100, 9], "input_ids_rejected": [1]}, "-100 or the token"),
            ({"input_ids_chosen": [1, 99999], "input_ids_rejected": [1]}, "there is no token 99999"),
        ],
    )
    def test_refused(self, value, said, tmp_path):
        with pytest.raises(DataError, match=said):
            rows(tmp_path, value)


def test_where_the_prompts_tokens_differ_only_what_is_equal_is_shared():
    """A merge across the border in one render: the longer prompt is in the branch, and not trained."""
    one, other = ([1, 2, 3, 7, 8], [False] * 3 + [True] * 2), ([1, 2, 9, 8], [False] * 3 + [True])
    row = joined([one, other], {})
    assert row.prefix == [1, 2]
    assert [(b.ids, b.trained) for b in row.branches] == [
        ([3, 7, 8], [False, True, True]),
        ([9, 8], [False, True]),
    ]


def test_the_system_column_is_in_every_form(tmp_path):
    asked = "<|im_start|>system\nBe brief.<|im_end|>\n" + PROMPT
    for form, value in FORMS.items():
        (row,), _ = rows(tmp_path, {**value, "system": "Be brief."})
        assert texts(row)[0] == asked, form


def test_an_empty_column_is_no_prompt(tmp_path):
    for value in ({"messages": ASKED}, {"conversations": FORMS["conversations"]["conversations"]}, {}):
        sides = {"chosen": GOOD, "rejected": BAD} if value else {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}
        (row,), _ = rows(tmp_path, {"prompt": None, **value, **sides})
        assert texts(row)[0] == PROMPT


OPENS_THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is false %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)


def test_sides_that_think_differently_have_one_prompt(tmp_path):
    """Alone, an answer without thoughts is trained behind thinking that is closed already."""
    thought = [{"role": "assistant", "content": "It is four.", "reasoning_content": "Two and two."}]
    for sides in ({"chosen": thought, "rejected": BAD}, {"chosen": BAD, "rejected": thought}):
        (row,), notes = rows(tmp_path, {"prompt": ASKED, **sides}, template=OPENS_THINKING)
        assert "chosen and rejected think differently" in "".join(text for _, text in notes)
        assert texts(row, OPENS_THINKING)[0] == PROMPT + "<think>\n"
        assert sorted(trained(row, OPENS_THINKING)) == [
            "\n</think>\n\nIt is five.<|im_end|>",
            "Two and two.\n</think>\n\nIt is four.<|im_end|>",
        ]
    (row,), notes = rows(tmp_path, {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}, template=OPENS_THINKING)
    assert texts(row, OPENS_THINKING)[0].endswith("</think>\n\n")
    assert "differently" not in "".join(text for _, text in notes)


def test_numbers_of_a_csv_are_text(tmp_path):
    (row,), _ = rows(tmp_path, {**FORMS["messages"], "margin": "1.5", "label": ""})
    assert row.extra == {"margin": 1.5}


def test_margins_and_labels(tmp_path):
    values = [
        {**FORMS["messages"], "margin": 1.5, "label": [1, 0]},
        {**FORMS["messages"], "margin": 2, "label": [-1, 1]},
    ]
    found, _ = rows(tmp_path, *values)
    assert [row.extra for row in found] == [
        {"margin": 1.5, "label.0": 1, "label.1": 0},
        {"margin": 2, "label.0": -1, "label.1": 1},
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"prompt": ASKED, "chosen": GOOD, "rejected": "x"}, "rejected"),
        ({**FORMS["messages"], "margin": "much"}, "a number"),
        ({**FORMS["messages"], "margin": 10**400}, "a number"),
        ({"chosen": "Q: a", "rejected": "Q: b", "system": "s"}, "messages, because the row has system"),
        ({"prompt": "", "chosen": GOOD, "rejected": BAD}, "prompt is empty"),
        ({"prompt": ASKED, "chosen": "a", "rejected": "b", "tools": [{"type": "function", "function": "x"}]}, "tools"),
        ({**FORMS["messages"], "margin": float("nan")}, "a number"),
        ({**FORMS["messages"], "label": 2}, "no preference"),
        ({"prompt": ASKED, "chosen": said("Other?", "x"), "rejected": BAD}, "the prompt's own messages"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "system": "s"}, "messages, because the row has system"),
        ({"prompt": ASKED, "chosen": "", "rejected": "b"}, "chosen is empty text"),
    ],
)
def test_refused(value, said, tmp_path):
    with pytest.raises(DataError, match=said):
        rows(tmp_path, value)
