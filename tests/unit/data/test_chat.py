"""Chat: the exact text that is trained under templates of each kind, and what is refused or told."""

import re
from typing import Any

import pytest

from finetune_cli.data.chat import Chat
from finetune_cli.data.forms import forms, lost
from finetune_cli.errors import DataError
from tests.helpers import CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3, R1, said, tiny_tokenizer, trained_texts

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
KINDS = {
    "chatml": (CHATML, None, "<|im_end|>", None),
    "llama3": (LLAMA3, "<s>", "<|eot_id|>", None),
    "gemma": (GEMMA, "<s>", "</s>", "<end_of_turn>"),
    "qwen3": (QWEN3, None, "<|im_end|>", None),
    "r1": (R1, "<s>", "</s>", None),
    "mistral": (MISTRAL, "<s>", "</s>", None),
}
THOUGHT = said("What?", "<think>\nhm\n</think>\n\nfour", "And?", "<think>\nso\n</think>\n\nfive")
SYSTEM = [{"role": "system", "content": "Be short."}, *said("What?", "four")]


def bound(kind: str, **settings: Any) -> Chat:
    template, bos, eos, stop = KINDS[kind]
    tokenizer = tiny_tokenizer(template, bos=bos, eos=eos)
    ids = [tokenizer.convert_tokens_to_ids(stop)] if stop else []
    return Chat.bind(tokenizer, stop_ids=ids, **settings)


def trained(chat: Chat, messages: list[dict[str, Any]], loss_on: str = "assistant", **row: Any) -> list[list[str]]:
    rows = chat.conversation({"messages": messages, **row}, loss_on=loss_on)
    return [trained_texts(chat.tokenizer, one) for one in rows]


def notes_of(chat: Chat, messages: list[dict[str, Any]], loss_on: str = "assistant", **row: Any) -> dict[str, str]:
    notes: dict[str, str] = {}
    list(chat.noting(notes.__setitem__).conversation({"messages": messages, **row}, loss_on=loss_on))
    return notes


@pytest.mark.parametrize(
    ("kind", "messages", "expected"),
    [
        ("chatml", said("What?", "four"), [["four<|im_end|>"]]),
        ("chatml", SYSTEM, [["four<|im_end|>"]]),
        ("chatml", said("a", "b ", "c", "d"), [["b <|im_end|>", "d<|im_end|>"]]),
        ("chatml", said("a", "b", "and?"), [["b<|im_end|>"]]),
        ("chatml", THOUGHT, [["<think>\nhm\n</think>\n\nfour<|im_end|>", "<think>\nso\n</think>\n\nfive<|im_end|>"]]),
        ("llama3", said("a", " b\n", "c", "d"), [["b<|eot_id|>", "d<|eot_id|>"]]),
        ("gemma", said("a", "b", "c", "d"), [["b<end_of_turn>", "d<end_of_turn>"]]),
        ("mistral", said("a", "b", "c", "d"), [[" b</s>", " d</s>"]]),
        ("qwen3", said("a", "b"), [["<think>\n\n</think>\n\nb<|im_end|>"]]),
        (
            "qwen3",
            THOUGHT,
            [["<think>\nhm\n</think>\n\nfour<|im_end|>"], ["<think>\nso\n</think>\n\nfive<|im_end|>"]],
        ),
    ],
)
def test_trained_text(kind, messages, expected):
    assert trained(bound(kind), messages) == expected


def test_split_rows_are_numbered_and_each_is_one_render():
    chat = bound("qwen3")
    rows = list(chat.conversation({"messages": THOUGHT}, loss_on="assistant"))
    assert [row.part for row in rows] == [0, 1]
    texts = [chat.tokenizer.decode(row.branches[0].ids) for row in rows]
    assert texts == [chat.tokenizer.apply_chat_template(THOUGHT[:n], tokenize=False) for n in (2, 4)]


@pytest.mark.parametrize(
    ("kind", "messages", "reason"),
    [
        ("r1", said("What?", "four"), "the generation prompt is not in the rendered message 1: it has '<think>"),
        ("gemma", SYSTEM, "TemplateError: System role not supported"),
        ("mistral", said("a", "b", first="assistant"), "Conversation roles must alternate"),
    ],
)
def test_refused(kind, messages, reason):
    with pytest.raises(DataError, match=re.escape(reason)) as caught:
        trained(bound(kind), messages)
    assert ("data.template_mismatch" in caught.value.hint) == (kind == "r1")


def test_template_mismatch_modes():
    inference, render = (bound("r1", template_mismatch=mode) for mode in ("inference", "render"))
    assert trained(inference, THOUGHT) == [["hm\n</think>\n\nfour</s>"], ["so\n</think>\n\nfive</s>"]]
    first = next(inference.conversation({"messages": THOUGHT}, loss_on="assistant"))
    prompt = "<s><|User|>What?<|Assistant|><think>\n"
    assert inference.tokenizer.decode(first.branches[0].ids) == prompt + "hm\n</think>\n\nfour</s>"
    assert trained(render, said("a", "b", "c", "d")) == [["b</s>", "d</s>"]]
    assert "template_mismatch" in notes_of(render, said("a", "b"))


def test_loss_on():
    chat, talk = bound("chatml"), said("a", "b", "c", "d")
    assert trained(chat, talk, "last_assistant") == [["d<|im_end|>"]]
    (everything,) = trained(chat, talk, "all")
    assert everything == [chat.tokenizer.apply_chat_template(talk, tokenize=False).removesuffix("\n")]
    with pytest.raises(DataError, match="completion needs prompt"):
        trained(chat, talk, "completion")


def test_trainable_false_is_not_trained_and_not_shown_to_the_template():
    shows_keys = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.trainable is defined %}!{% endif %}")
    chat = Chat.bind(tiny_tokenizer(shows_keys))
    talk = said("a", "b", "c", "d")
    talk[1]["trainable"] = False
    assert trained(chat, talk) == [["d<|im_end|>"]]
    with pytest.raises(DataError, match="trainable: false"):
        trained(chat, talk, "all")


def test_nothing_wanted_gives_a_row_without_targets():
    (row,) = bound("chatml").conversation({"messages": said("only a question")}, loss_on="assistant")
    assert row.targets == 0


def test_notes():
    chat = bound("chatml")
    assert notes_of(chat, said("a", "b")) == {}
    assert set(notes_of(chat, said("x", "a", "b", first="assistant"))) == {"leading_assistant"}
    assert "message 0 (user)" in notes_of(chat, said("say <|im_end|>", "b"))["control_token"]
    assert trained(chat, said("a", "say <|im_end|> now")) == [["say <|im_end|> now<|im_end|>"]]
    reasoned = [*said("a"), {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    assert set(notes_of(chat, reasoned)) == {"reasoning_lost"}
    assert set(notes_of(chat, said("a", "b"), tools=[TOOL])) == {"tools_lost"}
    no_stop = Chat.bind(tiny_tokenizer(CHATML.replace("<|im_end|>", "")))
    assert trained(no_stop, said("a", "b")) == [["b"]]
    assert set(notes_of(no_stop, said("a", "b"))) == {"no_stop"}


def test_the_stop_may_open_the_next_message():
    """As in GLM: a turn has no end of its own; the next message's header is what generation stops on."""
    glm = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    glm += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = tiny_tokenizer(glm, eos="<|user|>", more=("<|user|>", "<|assistant|>"))
    assert trained(Chat.bind(tokenizer), said("a", "b", "c", "d")) == [["b<|user|>", "d"]]


def test_a_token_across_the_edge_is_not_trained():
    """The prompt ends in a space, which byte-level BPE joins to the answer's first word."""
    spaced = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    spaced += "{% if add_generation_prompt %}assistant: {% endif %}"
    chat = Chat.bind(tiny_tokenizer(spaced))
    assert trained(chat, said("a", "is it four")) == [[" it four<|im_end|>"]]
    assert set(notes_of(chat, said("a", "is it four"))) == {"straddling", "retokenised"}


def test_a_thinking_prompt_takes_the_setting_that_fits():
    opens = CHATML.replace("assistant\n{% endif %}", "assistant\n{% if enable_thinking is not defined or "
                           "enable_thinking %}<think>\n{% endif %}{% endif %}")  # fmt: skip
    chat = Chat.bind(tiny_tokenizer(opens))
    assert trained(chat, said("a", "b")) == [["b<|im_end|>"]]
    assert "enable_thinking: false" in notes_of(chat, said("a", "b"))["template_kwargs"]
    with pytest.raises(DataError, match="generation prompt"):
        trained(chat, said("a", "b"), chat_template_kwargs={"enable_thinking": True})


CALLS = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}")  # fmt: skip


@pytest.mark.parametrize("arguments", [{"a": 1, "b": "x"}, '{"a": 1, "b": "x"}'])
def test_tool_calls(arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    talk = [*said("add"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert trained(Chat.bind(tiny_tokenizer(CALLS)), talk) == [['<call>add {"a": 1, "b": "x"}</call><|im_end|>']]
    with pytest.raises(DataError, match="loses the tool calls of message 1"):
        trained(bound("chatml"), talk)


def test_content_as_parts_where_the_template_wants_parts():
    parts = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    chat = Chat.bind(tiny_tokenizer(parts))
    assert trained(chat, said("a", "b")) == [["b<|im_end|>"]]
    assert "content as parts" in notes_of(chat, said("a", "b"))["message_form"]


def test_a_template_that_drops_a_message_is_refused():
    silent = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(DataError, match=r"loses the content of message 0 \(system\)"):
        trained(Chat.bind(tiny_tokenizer(silent)), SYSTEM)


def test_a_turn_that_ends_unlike_others_of_its_kind_is_refused():
    ends = CHATML.replace("<|im_end|>\n", "<|im_end|>{% if '!' in m.content %}</s>{% endif %}\n")
    chat = Chat.bind(tiny_tokenizer(ends))
    assert trained(chat, said("a", "b")) == [["b<|im_end|>"]]
    with pytest.raises(DataError, match="message 1 ends unlike other turns"):
        trained(chat, said("a", "b!"))


def test_no_template():
    with pytest.raises(DataError, match="no chat template"):
        trained(Chat.bind(tiny_tokenizer(None)), said("a", "b"))


def test_completion_of_messages_trains_the_completion_only():
    row = {"prompt": said("a", "b", "c"), "completion": [{"role": "assistant", "content": "d"}]}
    chat = bound("chatml")
    for loss_on, expected in (("completion", ["d<|im_end|>"]), ("assistant", ["b<|im_end|>", "d<|im_end|>"])):
        (found,) = chat.completion(row, loss_on=loss_on)
        assert trained_texts(chat.tokenizer, found) == expected


def test_completion_of_text():
    chat = bound("chatml")
    row = {"prompt": "Q: two?\nA:", "completion": " four"}
    for loss_on, expected in (("completion", " four<|im_end|>"), ("all", "Q: two?\nA: four<|im_end|>")):
        (found,) = chat.completion(row, loss_on=loss_on)
        assert trained_texts(chat.tokenizer, found) == [expected]
    with pytest.raises(DataError, match="needs messages"):
        chat.completion(row, loss_on="assistant")


def test_prompt():
    chat, talk = bound("chatml"), said("a", "b", "c", "d")
    found = chat.prompt({"messages": talk}, "messages")
    assert found is not None
    assert found.text == chat.tokenizer.apply_chat_template(talk[:3], tokenize=False, add_generation_prompt=True)
    assert chat.tokenizer.decode(found.ids) == found.text
    assert found.answer == "d"
    assert chat.prompt({"text": "a"}, "text") is None
    plain = chat.prompt({"prompt": "Q", "completion": "A"}, "completion")
    assert plain is not None
    assert (plain.text, plain.answer) == ("Q", "A")


def test_forms_begin_with_the_messages_as_they_are():
    talk = said("a", "b")
    assert next(forms(talk)) == ("", talk)


def test_lost():
    assert lost({"role": "user", "content": " a b "}, "x a b") == set()
    assert lost({"role": "user", "content": "a"}, "b") == {"content"}
    assert lost({"role": "assistant", "content": "<think>hm</think>a"}, "a") == {"reasoning"}
    assert lost({"role": "tool", "content": '{"a": 12345}'}, '{"a":12345}') == set()


MARKED = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and m.content != 'no' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}",
)


def test_generation_blocks_say_which_turns_are_trained_and_not_where_they_end():
    chat = Chat.bind(tiny_tokenizer(MARKED))
    assert trained(chat, said("a", "b", "c", "no", "e", "f")) == [["b<|im_end|>", "f<|im_end|>"]]
    assert "message 3" in notes_of(chat, said("a", "b", "c", "no"))["unmarked"]
    assert notes_of(chat, said("a", "b")) == {}


def test_no_content_beside_tool_calls_becomes_empty_text_where_the_template_needs_one():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = [*said("add"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    strict = CALLS.replace("{{ m.content }}", "{{ m.content.strip() }}")
    assert trained(Chat.bind(tiny_tokenizer(strict)), talk) == [['<call>add {"a": 1}</call><|im_end|>']]


@pytest.mark.parametrize("name", ["header", "truncates", "window"])
def test_templates_that_change_what_was_said_are_refused(name):
    template = {
        "header": "<n={{ messages | length }}>" + CHATML,
        "truncates": CHATML.replace("m.content", "m.content[:12]"),
        "window": CHATML.replace("in messages", "in messages[-2:]"),
    }[name]
    reason = {"header": "rewrites the history", "truncates": "loses the content", "window": "loses the content"}[name]
    with pytest.raises(DataError, match=reason):
        trained(Chat.bind(tiny_tokenizer(template)), said("one", "a rather long answer", "three", "four"))


def test_llama_2_and_the_text_that_it_puts_around_an_answer():
    """The space before the answer is generated, as is the one before the stop; BOS opens every exchange."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    chat = Chat.bind(tiny_tokenizer(template, bos="<s>", eos="</s>"))
    assert trained(chat, said("a", "b", "c", "d")) == [[" b </s>", " d </s>"]]


def test_a_template_that_shows_python_lists_gets_text():
    talk = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in said("a", "b")]
    chat = bound("chatml")
    assert trained(chat, talk) == [["b<|im_end|>"]]
    assert "content as text" in notes_of(chat, talk)["message_form"]


def test_rows_with_tools_are_for_the_template_that_is_named_for_them():
    tokenizer = tiny_tokenizer()
    add = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    plain, shown = said("one", "two"), "{{ '<|im_start|>tools ' + tools[0].function.name + '<|im_end|>\n' }}" + CHATML
    for named, wanted in (({"default": CHATML, "tool_use": shown}, True), ({"default": CHATML}, False)):
        tokenizer.chat_template = named
        chat = Chat.bind(tokenizer)
        (bare,) = chat.conversation({"messages": plain}, loss_on="assistant")
        (row,) = chat.conversation({"messages": plain, "tools": add}, loss_on="assistant")
        assert ("tools add" in tokenizer.decode(row.branches[0].ids)) is wanted
        assert "tools add" not in tokenizer.decode(bare.branches[0].ids)
        assert trained_texts(tokenizer, row) == trained_texts(tokenizer, bare) == ["two<|im_end|>"]
    tokenizer.chat_template = {"rag": CHATML, "tool_use": shown}
    with pytest.raises(DataError, match="the chat templates rag, tool_use and none is the default"):
        Chat.bind(tokenizer)


def test_the_prompt_is_that_of_the_last_turn_that_is_trained():
    row = {"messages": [*said("one", "two", "three"), {"role": "assistant", "content": "x", "trainable": False}]}
    assert bound("chatml").prompt(row, "messages").answer == "two"
