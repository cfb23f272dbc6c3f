"""Batched answers are those of one prompt at a time, in the order of the prompts, and cost no random number."""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetune_cli.engine import generate
from finetune_cli.engine.generate import Drawn, answers
from finetune_cli.engine.layout import use_tree
from finetune_cli.errors import TrainError
from finetune_cli.types import Prompt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def model(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.config.use_cache = False
    return model.train()


def prompts(tokenizer):
    texts = [
        "What is two plus two?",
        "And",
        "Here is a longer text with words that come again",
        "日本 🙂",
        "three three",
        "x" * 40,
    ]
    return [Prompt(tokenizer(text)["input_ids"], text, "") for text in texts]


def one_by_one(model, tokenizer, some, stops):
    """transformers' own greedy generation, a prompt at a time, no padding."""
    model.eval()
    texts = []
    for prompt in some:
        ids = torch.tensor([prompt.ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=stops,
            use_cache=True,
        )[0, ids.shape[1] :].tolist()
        end = next((n for n, token in enumerate(out) if token in stops), len(out))
        texts.append(tokenizer.decode(out[:end]))
    return texts


def a_stop_that_is_met(model, tokenizer, some):
    """The third token of the first prompt's answer, made a stop."""
    ids = torch.tensor([some[0].ids])
    return int(
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, ids.shape[1] + 2]
    )


@pytest.mark.parametrize("batch", [50, 4])
@pytest.mark.parametrize("layout", ["tree", "stock"])
def test_batched_greedy_equals_one_by_one(model, tokenizer, monkeypatch, batch, layout):
    some = prompts(tokenizer)
    stops = [a_stop_that_is_met(model.eval(), tokenizer, some)]
    wanted = one_by_one(model, tokenizer, some, stops)
    monkeypatch.setattr(generate, "BATCH", batch)
    if layout == "tree":
        assert use_tree(model) is None
    found = answers(model, tokenizer, some, stop_ids=stops, max_new_tokens=8)
    assert found == wanted
    assert len(tokenizer(found[0])["input_ids"]) <= 2
    assert len(set(found)) > 2  # the prompts matter


def test_order_is_that_of_the_prompts(model, tokenizer):
    some = prompts(tokenizer)
    one = answers(model, tokenizer, some, stop_ids=[4], max_new_tokens=6)
    other = answers(model, tokenizer, some[::-1], stop_ids=[4], max_new_tokens=6)
    assert other == one[::-1]


def test_draw_depends_on_its_seed_alone_and_the_run_is_left_as_it_was(model, tokenizer):
    some = prompts(tokenizer)
    torch.manual_seed(11)
    random.seed(11)
    states = torch.get_rng_state(), random.getstate()
    first = answers(model, tokenizer, some, stop_ids=[4], max_new_tokens=6, temperature=1.0, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.training
    assert model.config.use_cache is False
    torch.manual_seed(12)
    assert answers(model, tokenizer, some, stop_ids=[4], max_new_tokens=6, temperature=1.0, seed=3) == first
    assert answers(model, tokenizer, some, stop_ids=[4], max_new_tokens=6, temperature=1.0, seed=4) != first


def test_trained_weights_come_back_after_their_half_copies(tiny_model_folder, tokenizer):
    """Frozen bfloat16 and trained float32: generation runs in bfloat16, and the masters keep every bit."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
        if p.requires_grad:
            p.data = p.data.float() + 1e-5
    before = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad}
    answers(model, tokenizer, prompts(tokenizer), stop_ids=[], max_new_tokens=2)
    for p, pointer, values in before.values():
        assert p.dtype == torch.float32
        assert p.data_ptr() == pointer
        assert torch.equal(p, values)


def test_no_prompts_no_answers(model, tokenizer):
    assert answers(model, tokenizer, [], stop_ids=[4], max_new_tokens=6) == []


def test_the_head_never_gets_a_strided_piece(model, tokenizer):
    """For which PyTorch's product repeats the head's weight once a prompt."""
    seen = []
    real = type(model.lm_head).forward

    def forward(self, states):
        seen.append((states.shape[0], states.is_contiguous()))
        return real(self, states)

    model.lm_head.forward = forward.__get__(model.lm_head)
    answers(model, tokenizer, prompts(tokenizer), stop_ids=[], max_new_tokens=3)
    assert len(seen) == 3
    assert all(found == (6, True) for found in seen)
    assert not model.lm_head._forward_pre_hooks


def test_the_models_own_penalties_are_not_the_runs(model, tokenizer):
    """Greedy is greedy, and what is drawn is drawn from all tokens, whatever the model's generation_config says."""

    def told():
        more = {"stop_ids": [], "max_new_tokens": 12, "top_p": 1.0, "seed": 3}
        return [answers(model, tokenizer, prompts(tokenizer), temperature=t, **more) for t in (0.0, 5.0)]

    plain = told()
    model.generation_config = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=2)
    assert told() == plain
    assert model.generation_config.top_k == 2


def test_a_drawn_token_has_its_probability_and_an_impossible_one_never_comes():
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.0, 0.2, 0.3])
    for temperature in (1.0, 2.0):
        drawn = Drawn(temperature)(torch.empty(0), p.log().expand(100_000, 4)).argmax(-1)
        share = torch.bincount(drawn, minlength=4) / len(drawn)
        wanted = p ** (1 / temperature)
        torch.testing.assert_close(share, wanted / wanted.sum(), atol=0.008, rtol=0)
        assert share[1] == 0


def test_logits_that_are_no_numbers_are_told():
    with pytest.raises(TrainError, match="not finite"):
        Drawn(1.0)(torch.empty(0), torch.tensor([[0.0, 1.0], [math.nan, 0.0]]))
