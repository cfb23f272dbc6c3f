"""Tokens as text, and the message that each belongs to."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from finetune_cli.data.chat import Chat
from finetune_cli.data.turns import BY_TEMPLATE, read, texts, turns
from tests.helpers import CHATML, LLAMA3, MISTRAL, said, tiny_tokenizer

CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    "text", ["one two  three\n\n", "🙂 日本 é \u200b x", "<|im_start|>user\n🙂<|im_end|>", "\ufffd?"]
)
def test_texts_of_tokens_make_the_text(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    found = list(texts(tokenizer, ids))
    assert "".join(piece for piece, _ in found) == text
    assert sum(count for _, count in found) == len(ids)


def test_bytes_of_one_character_come_together():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a é")["input_ids"] + tokenizer("\u2603")["input_ids"]
    found = dict(texts(tokenizer, ids))
    assert found["\u2603"] == 3
    broken = list(texts(tokenizer, ids[:-1]))
    assert sum(count for _, count in broken) == len(ids) - 1


def test_spaces_that_a_decoder_takes_away_at_the_beginning():
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    own.train_from_iterator(["one two three"] * 9, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own)
    ids = tokenizer("one two three")["input_ids"]
    assert tokenizer.decode(ids[1:2]) == "two"
    assert [piece for piece, _ in texts(tokenizer, ids)] == ["one", " two", " three"]


def turns_of(template, messages, *, bos=None, eos="<|im_end|>", trained=()):
    tokenizer = tiny_tokenizer(template, bos=bos, eos=eos)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    chat = Chat.bind(tokenizer)
    ids = chat.encoder.one(text)
    mask = [any(a <= at < b for a, b in trained) for at in range(len(ids))]
    found = turns(read(chat, ids, mask), messages, chat)
    assert "".join(piece.text for turn in found for piece in turn.pieces) == text
    return [(turn.role, "".join(piece.text for piece in turn.pieces)) for turn in found]


def test_turns_end_where_their_stop_does():
    head = "<|im_start|>system\nBe brief.<|im_end|>\n"
    messages = said("a", "user", "a", "b <|im_end|> c")
    assert turns_of(head + CHATML, messages) == [
        (BY_TEMPLATE, head),
        ("user", "<|im_start|>user\na<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nuser<|im_end|>\n"),
        ("user", "<|im_start|>user\na<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\nb <|im_end|> c<|im_end|>\n"),
    ]


def test_turns_of_a_template_that_trims():
    found = turns_of(LLAMA3, said(" one ", "two"), bos="<s>", eos="<|eot_id|>")
    assert [role for role, _ in found] == ["user", "assistant"]
    assert found[1][1].startswith("<|start_header_id|>assistant")


def test_a_turn_without_a_header_begins_where_training_does():
    tokenizer = tiny_tokenizer(MISTRAL, bos="<s>", eos="</s>")
    messages = said("one", "two")
    before = len(Chat.bind(tokenizer).encoder.one("<s>[INST] one [/INST]"))
    found = turns_of(MISTRAL, messages, bos="<s>", eos="</s>", trained=[(before, 99)])
    assert found == [("user", "<s>[INST] one [/INST]"), ("assistant", " two</s>")]


def test_calls_of_tools_are_turns():
    messages = [*said("one"), CALL, {"role": "tool", "content": "3"}, *said("three", first="assistant")]
    assert [role for role, _ in turns_of(TOOLS, messages)] == ["user", "assistant", "tool", "assistant"]
