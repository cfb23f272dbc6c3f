"""Tokens: the mask is proved by pieces where they fit, and by offsets, without the tokens in between, where not."""

import pytest

from finetune_cli.data.tokens import Encoder, proved, widened
from finetune_cli.errors import DataError
from tests.helpers import tiny_tokenizer


@pytest.fixture(scope="module")
def encoder():
    return Encoder.bind(tiny_tokenizer())


def shown(encoder, tokens):
    return encoder.tokenizer.decode([i for i, t in zip(tokens.ids, tokens.trained, strict=True) if t])


def test_proved_by_pieces():
    found = proved([1, 2, 3, 4, 5], [[1], [2], [3]], [5])
    assert found is not None
    assert found.trained == [False, True, False, True, False]
    assert proved([1, 2, 3], [[9]], []) is None
    assert proved([1, 2, 3], [[1]], [9]) is None
    assert proved([1, 2], [[1]], [2]) is None  # nothing is left for the span itself


@pytest.mark.parametrize("text", ["What is two?", "äöü 日本 🙂", "", "<|im_start|>user\nTwo<|im_end|>\n"])
def test_ids_are_the_tokenizers_own(encoder, text):
    assert encoder.one(text) == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_several_spans(encoder):
    text = "<|im_start|>one<|im_end|>\n<|im_start|>two<|im_end|>\n"
    spans = [(text.index("two"), len(text) - 1), (text.index("one"), text.index("<|im_end|>") + len("<|im_end|>"))]
    tokens = encoder.spans(text, spans)
    assert shown(encoder, tokens) == "one<|im_end|>two<|im_end|>"
    assert (tokens.straddling, tokens.retokenised) == (0, 0)


def test_no_span(encoder):
    tokens = encoder.spans("one two", [])
    assert len(tokens.ids) == len(tokens.trained)
    assert not any(tokens.trained)


def test_a_token_across_an_edge_is_not_trained(encoder):
    text = "It is four."
    assert " is" in [encoder.tokenizer.decode([i]) for i in encoder.one(text)]
    tokens = encoder.spans(text, [(3, len(text))])  # between the space and "is"
    assert shown(encoder, tokens) == " four."
    assert (tokens.straddling, tokens.retokenised) == (1, 1)


def test_spaces_that_offsets_leave_out_belong_to_the_next_token():
    assert list(widened([(0, 2), (3, 5), (5, 5), (6, 8)])) == [(0, 2), (2, 5), (5, 5), (5, 8)]


def test_bytes_of_one_character_share_its_fate(encoder):
    text = "It is 🙂 four"
    tokens = encoder.by_offsets(text, encoder.one(text), [(5, 7)])
    assert shown(encoder, tokens) == " 🙂"


def with_bos_and_eos(*, eos: bool):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(bos="<s>", eos="</s>")
    names = [("<s>", 1), ("</s>", 2)]
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>"]) == [1, 2]
    ends = "<s> $A </s>" if eos else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=ends, special_tokens=names)
    return tokenizer


@pytest.mark.parametrize("eos", [False, True])
def test_plain_text_gets_what_the_tokenizer_adds_and_one_eos(eos):
    tokenizer = with_bos_and_eos(eos=eos)
    encoder = Encoder.bind(tokenizer)
    assert (encoder.lead, encoder.trail) == ((1,), (2,) if eos else ())
    tokens = encoder.closed("It is four", len("It is"))
    assert tokens.ids == tokenizer("It is four")["input_ids"] + ([] if eos else [2])
    assert shown(encoder, tokens) == " four</s>"
    assert all(encoder.closed("It is", 0).trained)
    assert encoder.closed("It is</s>", 0).ids.count(2) == (2 if eos else 1)


def test_no_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence"):
        Encoder.bind(tokenizer).closed("a", 0)
