"""Reward models: on the policy's own weights, beside them, and with words of their own."""

import json
import math
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from finetune_cli.data.rows import raws_of
from finetune_cli.engine import reference
from finetune_cli.engine.judge import Answers, closed, shares, text_for
from finetune_cli.engine.loop import train
from finetune_cli.engine.update import Sums
from finetune_cli.errors import ModelError
from finetune_cli.recipe.load import load
from finetune_cli.types import Branch, Row
from tests.helpers import questions, said, tiny_tokenizer, write_recipe, write_rows


@pytest.fixture(scope="module")
def prompts():
    return [{"prompt": row["messages"][:1]} for row in questions(6)]


@pytest.fixture
def ppo(recipe_of, prompts):
    def make(reward, **sections):
        return recipe_of(
            rows=prompts,
            method={"name": "ppo", "reward": str(reward), "num_generations": 2},
            generation={"max_new_tokens": 5, "temperature": 1.0},
            **{"eval": {"eval_strategy": "no"}, **sections},
        )

    return make


@pytest.fixture
def reward_model(tmp_path, tiny_model_folder, job_of):
    """The folder of a run of `method: reward`, one step far from its start."""

    def make(**sections):
        pair = {"prompt": said("What is two plus two?"), "chosen": said("It is four.", first="assistant")}
        rows = [{**pair, "rejected": said(f"It is {n}.", first="assistant")} for n in range(8)]
        path = write_recipe(
            tmp_path / "reward.yaml",
            method="reward",
            model={"name_or_path": str(tiny_model_folder)},
            data={"train": str(write_rows(tmp_path / "pairs.jsonl", rows))},
            output_dir=str(tmp_path / "judge"),
            eval={"eval_strategy": "no"},
            **{"train": {"max_steps": 2, "learning_rate": 1e-3}, **sections},
        )
        job, progress = job_of(path)
        train(job, progress)
        return job.plan.run / "checkpoint-2"

    return make


def stock_scores(folder, base, rows, tail):
    """What plain transformers (and peft) say of the same tokens, one sequence at a time."""
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, folder)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    model.config.pad_token_id = AutoTokenizer.from_pretrained(folder).pad_token_id
    found = []
    for row in rows:
        for branch in row.branches:
            ids = [*row.prefix, *branch.ids, *(tail if branch.ids[-1] == model.config.eos_token_id else [])]
            with torch.no_grad():
                found.append(model(input_ids=torch.tensor([ids])).logits[0, 0].item())
    return found


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None], ids=["on the same weights", "beside them"])
def test_scores_are_those_of_stock_transformers(ppo, job_of, reward_model, tiny_model_folder, lora):
    """An adapter on the policy's base needs no second model; the policy is as it was, and trains no part of it."""
    folder = reward_model(lora=lora, **({} if lora else {"train": {"max_steps": 2, "learning_rate": 1e-5}}))
    job, _ = job_of(ppo(folder))
    actor = job.experience.actor
    assert list(actor.score_heads) == (["judge_0"] if lora else [])
    trained = {name for name, p in actor.named_parameters() if p.requires_grad}
    assert not [name for name in trained if "judge" in name]
    updates = list(job.experience.updates(0, Sums()))
    assert {name for name, p in actor.named_parameters() if p.requires_grad} == trained
    rows = [row for rows in updates[0].forwards for row in rows]
    newline = job.tokenizer.encode("\n", add_special_tokens=False)
    wanted = stock_scores(folder, tiny_model_folder, rows, newline)
    assert [score for each in job.experience.scores(rows, "train") for score in each] == pytest.approx(wanted, abs=1e-4)
    assert len({round(score, 4) for score in wanted}) > 3


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["adapter", "whole"])
def test_a_model_beside_the_policy_scores_in_bfloat16(ppo, job_of, reward_model, tiny_model_folder, lora, tmp_path):
    folder = reward_model(lora=lora, **({} if lora else {"train": {"max_steps": 2, "learning_rate": 1e-5}}))
    if lora:  # of another base, so that it is a model of its own
        shutil.copytree(tiny_model_folder, tmp_path / "other")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": str(tmp_path / "other")})
        )
    AcceleratorState._reset_state(reset_partial_state=True)  # the reward model's own run was in float32
    job, _ = job_of(ppo(folder, train={"precision": "bf16"}))
    assert not list(job.experience.actor.score_heads)
    rows = [row for update in job.experience.updates(0, Sums()) for rows in update.forwards for row in rows]
    assert all(math.isfinite(score) for each in job.experience.scores(rows, "train") for score in each)


def test_the_whole_chain_runs(ppo, job_of, reward_model):
    """PPO with a reward model on the policy's weights: policy and critic move, the judge does not."""
    folder = reward_model()
    job, progress = job_of(ppo(folder, train={"max_steps": 2, "gradient_checkpointing": True}))
    before = {name: p.detach().clone() for name, p in job.policy.named_parameters()}
    train(job, progress)
    moved = {name for name, p in job.policy.named_parameters() if (p != before[name]).any()}
    assert moved == {name for name, p in job.policy.named_parameters() if p.requires_grad and name in moved}
    assert any(".critic." in name for name in moved)
    assert any(".default." in name for name in moved)
    assert not any("judge" in name for name in moved)


def bert(folder, *, labels):
    """An encoder with a vocabulary of its own."""
    tokenizer = tiny_tokenizer(None, more=("<mine>",))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(3)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=labels, **size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_other_words_reads_the_text(ppo, job_of, tmp_path):
    folder = bert(tmp_path / "bert", labels=1)
    job, _ = job_of(ppo(folder))
    rows = [row for rows in next(job.experience.updates(0, Sums())).forwards for row in rows]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = []
    for row in rows:
        for branch in row.branches:
            ids = branch.ids[:-1] if branch.ids[-1] in job.stop_ids else branch.ids
            text = job.tokenizer.decode(row.prefix) + job.tokenizer.decode(ids)
            with torch.no_grad():
                wanted.append(model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item())
    assert [score for each in job.experience.scores(rows, "train") for score in each] == pytest.approx(wanted, abs=1e-4)


def test_a_model_with_two_labels_is_no_reward(ppo, job_of, tmp_path):
    with pytest.raises(ModelError) as caught:
        job_of(ppo(bert(tmp_path / "bert", labels=2)))
    assert "gives 2 scores" in str(caught.value)


TURN = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nsaid<|im_end|>\n"
ASKED_ROWS = {
    "conversations": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "instruction": {"instruction": "q", "output": "a"},
    "messages": {"messages": said("q", "a")},
    "one message": {"prompt": said("q")[0]},
    "prompt and completion": {"prompt": said("q"), "completion": said("a", first="assistant")},
}


@pytest.mark.parametrize("form", ASKED_ROWS)
def test_a_model_of_other_words_reads_question_and_answer(form, recipe_of):
    """Whatever the columns are called, as its own template writes them."""
    system = {"system": "Be brief."} if form in ("conversations", "instruction", "messages") else {}
    recipe = load(recipe_of(rows=[{**ASKED_ROWS[form], **system}], method={"name": "ppo", "reward": "x.py:f"})).recipe
    (given,) = raws_of(recipe, recipe.data.train).values()
    assert given.values == {**ASKED_ROWS[form], **system}
    tokenizer = tiny_tokenizer()
    text = tokenizer.decode(text_for(tokenizer, "unused", "said", given.row))
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n" if system else "") + TURN


def test_a_model_of_other_words_reads_plain_text_as_it_is(recipe_of):
    recipe = load(recipe_of(rows=[{"query": "Why? "}], method={"name": "ppo", "reward": "x.py:f"})).recipe
    (given,) = raws_of(recipe, recipe.data.train).values()
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(text_for(tokenizer, "unused", "Because.", given.row)) == "Why? Because."
    row = Row([5], (Branch([6, 7], [True, True]),))
    assert closed(Answers([row], ["Why? "], ["Because."], [given]), [8], {7}) == [row]


def test_a_reward_model_that_has_weights_of_its_own_is_loaded_beside(ppo, job_of, reward_model):
    """Saved whole with its adapter, they would take the place of the policy's."""
    folder = reward_model()
    job, _ = job_of(ppo(folder))
    assert list(job.experience.actor.score_heads)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["score", "norm"]}))
    location = reference.located(str(folder))
    assert not shares(location, job, job.experience.actor)


def test_the_critic_learns_its_own_rows_of_new_tokens(recipe_of, job_of, prompts, tmp_path):
    (tmp_path / "one.py").write_text("def worth(prompts, responses, rows):\n    return [1.0] * len(responses)\n")
    method = {"name": "ppo", "reward": f"{tmp_path}/one.py:worth"}
    path = recipe_of(rows=prompts, method=method, model={"new_tokens": ["<new>"]}, eval={"eval_strategy": "no"})
    job, _ = job_of(path)
    rows = [name for name in job.experience.actor.beside() if "trainable_tokens_delta" in name]
    assert [name.rpartition(".")[2] for name in rows] == ["critic"] * len(rows)
    assert rows
    trained = {id(p) for p in job.trained}
    assert all(id(p) in trained for p in job.experience.actor.beside().values())
