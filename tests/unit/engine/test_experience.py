"""Answers of a policy, what they are worth, and learning from them."""

import json
from collections import Counter

import pytest
import torch

from finetune_cli.engine import rewards
from finetune_cli.engine.actor import CRITIC, POLICY
from finetune_cli.engine.evaluate import evaluate
from finetune_cli.engine.experience import Experience
from finetune_cli.engine.loop import optimiser_step, train
from finetune_cli.engine.rollout import through_stop, without_stop
from finetune_cli.engine.update import Sums
from finetune_cli.errors import DataError, RecipeError, TrainError
from tests.helpers import questions

SHARE_OF_E = """
def share_of_digits(prompts, responses, rows):
    return [sum(c in "0123456789 " for c in response) / max(1, len(response)) for response in responses]
"""
PLAIN = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0, "learning_rate": 5e-4, "max_steps": 2}


@pytest.fixture
def ppo(recipe_of, tmp_path):
    """Write a PPO recipe of 12 prompts whose reward is the share of digits."""
    (tmp_path / "reward.py").write_text(SHARE_OF_E)

    def make(*, method=None, train=None, **sections):
        knobs = {"name": "ppo", "reward": "reward.py:share_of_digits", "num_ppo_epochs": 2, "num_generations": 2}
        rows = [{"prompt": row["messages"][:1], "answer": row["messages"][1]["content"]} for row in questions(12)]
        settings = {"per_device_train_batch_size": 8, "global_batch_size": 8, "max_steps": 2, **(train or {})}
        base = {"generation": {"max_new_tokens": 6, "temperature": 1.0}, "eval": {"eval_strategy": "no"}}
        return recipe_of(rows=rows, method=knobs | (method or {}), train=settings, **{**base, **sections})

    return make


def trained(job):
    return {name: p.detach().clone() for name, p in job.policy.named_parameters() if p.requires_grad}


def far(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def run(job_of, path, *overrides):
    events = []
    job, progress = job_of(path, *overrides, sink=events.append)
    before = trained(job)
    train(job, progress)
    return job, [e for e in events if e["event"] == "train"], events, before


def test_accumulation_layout_and_checkpointing_change_nothing(ppo, job_of):
    """Eight prompts in one forward, in 3 + 3 + 2, padded, and with layers recomputed in backward, where a switch of
    roles that came too early would give other gradients: the same weights of policy and critic after four updates."""
    path = ppo(train=PLAIN)
    whole, lines, _, before = run(job_of, path)
    after = trained(whole)
    assert far(after, before) > 1e-4
    assert any(CRITIC in name for name in after)
    for change in (
        "train.per_device_train_batch_size=3",
        "model.layout=padded",
        "train.gradient_checkpointing=true",
    ):
        other, same, _, start = run(job_of, path, change)
        assert far(start, before) == 0.0
        assert far(trained(other), after) < 1e-6, change
        assert same[0]["loss"] == pytest.approx(lines[0]["loss"], abs=1e-5), change


def test_the_first_update_goes_back_through_the_forwards_that_scored_the_answers(ppo, job_of, monkeypatch):
    """Two forwards fewer a step, and the same weights and numbers to the last bit; entropy is measured there, too."""
    asked = []
    usual = Experience.ask
    monkeypatch.setattr(Experience, "ask", lambda self, role, batch: asked.append(role) or usual(self, role, batch))
    path = ppo(train={"learning_rate": 5e-4}, logging={"logging_steps": 1})
    job, lines, _, _ = run(job_of, path)
    once = Counter(asked)
    asked.clear()
    monkeypatch.setattr(Experience, "scored_once", False)
    other, again, _, _ = run(job_of, path)
    assert once == {"policy": 4, "reference": 2, "value": 4}  # two steps of two updates
    assert Counter(asked) == {"policy": 6, "reference": 2, "value": 6}
    assert far(trained(job), trained(other)) == 0.0
    timed = ("tokens_per_second", "memory_gib", "seconds")
    numbers, others = ([{k: v for k, v in e.items() if k not in timed} for e in some] for some in (lines, again))
    assert numbers == others
    assert "policy/entropy_avg" in numbers[0]


@pytest.mark.parametrize(
    "change",
    [
        "train.per_device_train_batch_size=4", "train.per_device_train_batch_size=auto", "method.num_mini_batches=2",
        "train.gradient_checkpointing=true", "lora.lora_dropout=0.1",
    ],
)  # fmt: skip
def test_else_answers_are_scored_apart(ppo, job_of, change):
    job, _ = job_of(ppo())
    assert job.experience.scored_once
    job, _ = job_of(ppo(), change)
    assert not job.experience.scored_once
    assert all(update.said == {} for update in job.experience.updates(0, Sums()))


def test_minibatches_part_the_rows_of_a_step(ppo, job_of):
    job, _ = job_of(ppo(method={"num_mini_batches": 3, "num_ppo_epochs": 2}))
    updates = list(job.experience.updates(0, Sums()))
    assert len(updates) == 6
    rows = [Counter(row.source for rows in update.forwards for row in rows) for update in updates]
    for some in (rows[:3], rows[3:]):
        assert sum(some, Counter()) == Counter(job.schedule.step(0))
    assert [update.counts.rows for update in updates[:3]] == [sum(c.values()) for c in rows[:3]]


def test_a_run_that_goes_on_is_the_run_that_went_through(ppo, job_of):
    """Bit by bit: weights of policy and critic, and every number that is logged."""
    path = ppo(train={"max_steps": 4}, save={"save_steps": 2, "save_total_limit": None}, lora={"lora_dropout": 0.1})
    whole, lines, _, _ = run(job_of, path)
    events = []
    job, progress = job_of(path, resume=whole.plan.run / "checkpoint-2", sink=events.append)
    train(job, progress)
    assert far(trained(job), trained(whole)) == 0.0
    timed = ("tokens_per_second", "memory_gib", "seconds")
    again = [{k: v for k, v in e.items() if k not in timed} for e in events if e["event"] == "train"]
    assert again == [{k: v for k, v in line.items() if k not in timed} for line in lines[2:]]


def test_before_the_first_update_nothing_has_changed(ppo, job_of):
    """Ratio 1, nothing clipped, no divergence from the reference; dropout would break it and is named."""
    _, lines, events, _ = run(job_of, ppo(method={"num_ppo_epochs": 1}, train={"max_steps": 1}))
    (line,) = lines
    assert line["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert line["policy/approxkl_avg"] < 1e-10
    assert line["policy/clipfrac_avg"] == 0.0
    assert line["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert line["completions/mean_length"] <= 6
    assert 0 <= line["completions/clipped_ratio"] <= 1
    assert not [e for e in events if e["event"] == "health" and e["rule"] == "first_ratio"]
    _, _, events, _ = run(job_of, ppo(lora={"lora_dropout": 0.3}, train={"max_steps": 3, "learning_rate": 5e-4}))
    (found,) = [e for e in events if e["event"] == "health" and e["rule"] == "first_ratio"]
    assert "lora.lora_dropout: 0" in found["message"]


def test_log_probabilities_are_those_of_stock_transformers_at_the_temperature(ppo, job_of):
    job, _ = job_of(ppo(generation={"max_new_tokens": 6, "temperature": 0.5}))
    update = next(job.experience.updates(0, Sums()))
    job.actor = job.experience.actor
    for row in update.forwards[0]:
        for branch in row.branches:
            ids = torch.tensor([[*row.prefix, *branch.ids]])
            with torch.no_grad():
                logits = job.experience.actor.stock(input_ids=ids, use_cache=False).logits[0] / 0.5
            wanted = logits.log_softmax(-1)[len(row.prefix) - 1 : -1].gather(1, ids[0, len(row.prefix) :, None])[:, 0]
            assert branch.numbers["logps"] == pytest.approx(wanted.tolist(), abs=1e-4)


def test_answers_are_drawn_from_the_whole_distribution(ppo, job_of):
    """Frequencies of first tokens beside their probabilities; a top-k of 50 would lose a third of the mass here."""
    job, _ = job_of(ppo(generation={"max_new_tokens": 1, "temperature": 2.0}))
    prompt = job.units[0][0].prefix
    drawn = job.experience.generator([prompt] * 3000, temperature=2.0, seed=3)
    with torch.no_grad():
        logits = job.experience.actor.stock(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1] / 2.0
    p = logits.softmax(-1)
    beyond = set(p.argsort(descending=True)[50:].tolist())
    mass = float(p[list(beyond)].sum())
    assert mass > 0.1
    found = sum(ids[0] in beyond for ids in drawn) / len(drawn)
    assert found == pytest.approx(mass, abs=4 * (mass * (1 - mass) / 3000) ** 0.5)


def test_the_critic_is_kept_with_the_training_and_not_with_the_result(ppo, job_of):
    job, _, _, _ = run(job_of, ppo(train={"max_steps": 1}))
    folder = job.plan.run / "checkpoint-1"
    assert (folder / "critic.pt").exists()
    assert not (folder / CRITIC).exists()
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if CRITIC in name]  # noqa: SIM118  it is no dict
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_roles_leave_trained_what_is_trained(ppo, job_of):
    job, _ = job_of(ppo())
    actor = job.experience.actor
    names = {name for name, p in actor.named_parameters() if p.requires_grad}
    list(job.experience.updates(0, Sums()))
    for adapter in (CRITIC, POLICY):
        actor.switch(adapter)
        assert {name for name, p in actor.named_parameters() if p.requires_grad} == names
    assert {p.data_ptr() for p in actor.own()}.isdisjoint({p.data_ptr() for p in actor.beside().values()})


def test_all_weights_are_trained_where_there_is_no_adapter(ppo, job_of):
    """The critic is then a model of its own, and the reference a frozen copy."""
    path = ppo(lora=None, train={"learning_rate": 1e-5, "max_steps": 3})
    job, lines, _, before = run(job_of, path)
    after = trained(job)
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[2]["objective/kl"] != 0.0
    assert any(name.startswith("critic.") and (after[name] != before[name]).any() for name in after)
    assert any(name.startswith("model.") and (after[name] != before[name]).any() for name in after)
    assert not (job.plan.run / "checkpoint-3" / "adapter_config.json").exists()
    other, _, _, _ = run(job_of, path, "train.gradient_checkpointing=true", f"output_dir={job.plan.run}-again")
    assert far(trained(other), after) < 1e-6


def test_the_reference_of_an_adapter_is_where_it_started(ppo, job_of):
    first, _, _, _ = run(job_of, ppo(train={"max_steps": 2, "learning_rate": 5e-4}))
    path = ppo(
        lora=None,
        model={"name_or_path": str(first.plan.run / "checkpoint-2")},
        output_dir=str(first.plan.run.parent / "second"),
        save={"save_steps": 1, "save_total_limit": None},
    )
    job, lines, _, _ = run(job_of, path)
    assert job.reference_report["kind"] == "start"
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(lines[1]["objective/kl"]) > 1e-6
    events = []
    again, progress = job_of(path, resume=job.plan.run / "checkpoint-1", sink=events.append)
    train(again, progress)
    assert far(trained(again), trained(job)) == 0.0


def test_target_kl_ends_the_passes(ppo, job_of):
    path = ppo(method={"num_ppo_epochs": 4, "target_kl": 1e-12}, train={"learning_rate": 5e-4})
    job, _ = job_of(path)
    sums = Sums()
    _, counts, _ = optimiser_step(job, 0, measure=False, sums=sums)
    update = next(job.experience.updates(0, Sums()))
    # the second update is the first to find a difference
    assert counts.rows == 2 * 8
    assert counts.tokens == 2 * update.counts.tokens


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "gave 1 numbers for 3 responses"),
        ("return ['good'] * len(responses)", "gave 'good' (str) for the response"),
        ("return [None] * len(responses)", "gave None (NoneType)"),
        ("return [float('nan')] * len(responses)", "gave nan (float)"),
        ("return 3", "failed: TypeError"),
        ("return [rows[0]['nothing']]", "failed: KeyError: 'nothing' (reward.py:3)"),
    ],
)
def test_a_reward_is_tried_before_anything_is_trained(ppo, job_of, tmp_path, body, said):
    path = ppo()
    (tmp_path / "reward.py").write_text(f"\ndef share_of_digits(prompts, responses, rows):\n    {body}\n")
    with pytest.raises(TrainError) as caught:
        job_of(path)
    assert said in str(caught.value)


def test_rewards_see_prompts_responses_and_whole_rows(ppo, job_of, tmp_path):
    path = ppo(method={"reward": [{"source": "reward.py:one", "weight": 2.0}, "reward.py:length"]})
    seen = "import json, pathlib\n" + (
        "def one(prompts, responses, rows):\n"
        "    pathlib.Path(__file__).with_name('seen.json').write_text(json.dumps([prompts, responses, rows]))\n"
        "    return [True] * len(responses)\n"
        "def length(prompts, responses, rows):\n    return [len(r) for r in responses]\n"
    )
    (tmp_path / "reward.py").write_text(seen)
    job, _ = job_of(path)
    sums = Sums()
    list(job.experience.updates(0, sums))
    prompts, responses, rows = json.loads((tmp_path / "seen.json").read_text())
    assert len(prompts) == len(responses) == len(rows) == 16
    assert prompts[0] == prompts[1]  # answers to a prompt lie side by side
    assert all(
        row["answer"] and row["prompt"][0]["content"] in prompt for row, prompt in zip(rows, prompts, strict=True)
    )
    assert not any("<|im_end|>" in response for response in responses)
    means = sums.means(job)
    mean_length = sum(map(len, responses)) / 16
    assert means["rewards/one"] == 1.0
    assert means["rewards/length"] == pytest.approx(mean_length)
    assert means["objective/scores"] == pytest.approx(2.0 + mean_length)


def test_a_reward_that_is_not_there(ppo, job_of):
    with pytest.raises(DataError) as caught:
        job_of(ppo(method={"reward": "nothing.py:f"}))
    assert "nothing.py does not exist" in caught.value.problems[0].message
    with pytest.raises(RecipeError, match="has no function 'f'"):
        job_of(ppo(method={"reward": "reward.py:f"}))


def test_a_stop_token_belongs_to_the_answer():
    assert through_stop([5, 2, 0, 0], [2]) == [5, 2]
    assert through_stop([5, 6, 7], [2]) == [5, 6, 7]
    assert without_stop([5, 2], [2]) == [5]
    assert without_stop([5, 6], [2]) == [5, 6]


def test_names_of_rewards():
    assert rewards.unique([rewards.name_of(s) for s in ("a/r.py:f", "b/r.py:f", "runs/judge")]) == [
        "f_0",
        "f_1",
        "judge",
    ]


def test_evaluation_says_what_answers_are_worth(ppo, job_of):
    events = []
    path = ppo(data={"eval_split": 0.25}, eval={"eval_strategy": "steps", "eval_steps": 2, "metric": "exact_match"})
    job, progress = job_of(path, sink=events.append)
    train(job, progress)
    evals = [e for e in events if e["event"] == "eval"]
    assert [e["step"] for e in evals] == [0, 2]
    assert 0 <= evals[0]["eval_objective/scores"] <= 1
    assert "eval_exact_match" in evals[0]
    samples = [e for e in events if e["event"] == "sample" and e["step"] == 0]
    assert {"prompt", "answer", "reward"} <= set(samples[0])


def test_an_answer_that_was_cut_pays_for_it_in_evaluations_too(ppo, job_of):
    """None of the answers of a random model ends: held-out rewards are those of training, the penalty taken off."""
    path = ppo(
        method={"missing_eos_penalty": 5.0, "stop_token": "<|User|>"},
        data={"eval_split": 0.25},
        eval={"eval_strategy": "steps"},
    )
    job, _ = job_of(path)
    numbers = evaluate(job, 0, final=False)
    assert -5 <= numbers["eval_objective/scores"] <= -4
    sums = Sums()
    list(job.experience.updates(0, sums))
    assert -5 <= sums.means(job)["objective/scores"] <= -4


def test_samples_are_judged_and_the_same_after_a_resume(ppo, job_of):
    """Without evaluation rows the first training rows are answered, before training and after."""
    path = ppo(
        train={"max_steps": 4},
        eval={"eval_strategy": "steps", "eval_steps": 2, "sample_prompts": 2},
        save={"save_steps": 2, "save_total_limit": None},
        generation={"max_new_tokens": 6, "temperature": 1.0},
    )
    whole, _, events, _ = run(job_of, path)
    samples = [e for e in events if e["event"] == "sample"]
    assert [e["step"] for e in samples] == [0, 0, 2, 2, 4, 4]
    assert [e["row"] for e in samples] == [0, 1] * 3
    for e in samples:
        digits = sum(c in "0123456789 " for c in e["answer"]) / max(1, len(e["answer"]))
        assert e["reward"] == pytest.approx(digits)
    again = []
    job, progress = job_of(path, resume=whole.plan.run / "checkpoint-2", sink=again.append)
    progress.looked = False  # the evaluation after the step was cut off
    train(job, progress)
    assert [e for e in again if e["event"] == "sample"] == samples[2:]


def test_rewards_are_of_drawn_answers_and_metrics_of_greedy_ones(ppo, job_of, monkeypatch):
    path = ppo(data={"eval_split": 0.25}, eval={"eval_strategy": "steps", "metric": "exact_match"})
    job, _ = job_of(path)
    asked, draw = [], type(job.experience.generator).__call__

    def watched(self, prompts, *, temperature, seed):
        asked.append((len(prompts), temperature, seed))
        return draw(self, prompts, temperature=temperature, seed=seed)

    monkeypatch.setattr(type(job.experience.generator), "__call__", watched)
    first = evaluate(job, 0, final=False)
    assert evaluate(job, 5, final=False) == first  # by the same draw, however late
    assert [(count, temperature) for count, temperature, _ in asked] == [(3, 1.0), (3, 0.0)] * 2
    greedy = {"eval_exact_match", "eval_objective/greedy_scores"}
    assert set(first) == {"eval_objective/scores", "eval_completions/mean_length", *greedy}


def test_the_critic_starts_from_the_mean_reward(ppo, job_of):
    """Else each early token of an answer would look worse than each late one, whatever the answer is worth."""
    job, _ = job_of(ppo(method={"missing_eos_penalty": 0.5}))
    sums = Sums()
    (update, *_) = job.experience.updates(0, sums)
    values = {x for rows in update.forwards for row in rows for b in row.branches for x in b.numbers["values"]}
    means = sums.means(job)
    assert list(values) == [pytest.approx(means["objective/scores"])]
    assert means["val/explained_variance"] == pytest.approx(0.0, abs=1e-4)
    bias = job.experience.actor.value_head.bias.item()
    list(job.experience.updates(1, Sums()))
    assert job.experience.actor.value_head.bias.item() == bias
