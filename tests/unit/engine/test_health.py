"""Every sign is raised by what it is a sign of, once, and by nothing in a healthy run."""

import json
import math
import random

import pytest
import torch

from finetune_cli.engine.health import AT_FIRST, GROUP, GROUPS, MAX_SKIPPED, Health, counted, deviation
from finetune_cli.engine.loop import train
from finetune_cli.errors import TrainError

HEALTHY = {"grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 1000.0}


def rules(lines, *, memory=1.0, health=None):
    """[(line number from 1, rule)] of lines; what a line does not say is healthy."""
    health = health or Health()
    return [
        (n, finding.rule)
        for n, line in enumerate(lines, 1)
        for finding in health.line(
            {"loss": 2.0, **HEALTHY, **line}, step=n, memory_gib=memory(n) if callable(memory) else memory
        )
    ]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_sign(seed):
    """Loss falling from 3 to 0.05 under noise with a heavy tail, gradient norms and speeds that vary by a third."""
    draw = random.Random(seed)
    lines = [
        {
            "loss": (0.05 + 3 * math.exp(-n / 60)) * math.exp(draw.gauss(0, 0.3)),
            "grad_norm": math.exp(draw.gauss(0, 0.4)),
            "tokens_per_second": 1000 * draw.uniform(0.7, 1.3),
        }
        for n in range(400)
    ]
    assert rules(lines, memory=lambda n: 2.0 - math.exp(-n / 15) + draw.uniform(-0.1, 0.1)) == []


def test_deviation_by_hand():
    """Median 3, distances 2 1 0 1 97, their median 1."""
    assert deviation([1, 2, 3, 4, 100]) == pytest.approx(1.4826)
    assert deviation([2.0] * 9) == pytest.approx(0.1)
    assert deviation([0.0] * 9) == 0.01


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_spike(name):
    """Ten robust deviations of at least 5%: above 1.5 times a flat curve. The first ten lines are too few to tell."""
    flat = [{name: 2.0}] * 10
    assert rules([{name: 2.0}] * 9 + [{name: 9.0}]) == []
    assert rules([*flat, {name: 2.99}]) == []
    assert rules([*flat, {name: 3.01}, {name: 2.0}, {name: 3.5}]) == [(11, f"{name}_spike"), (13, f"{name}_spike")]
    assert rules([*flat, {name: 0.1}]) == []
    assert rules([*flat, {name: math.nan}]) == []


def test_zero_learning_rate_is_told_when_it_lasts():
    """The first step of a warmup has none."""
    zero, some = {"learning_rate": 0.0}, {}
    assert rules([zero, some, zero, some]) == []
    assert rules([some, zero, zero, zero, some, zero, zero]) == [
        (3, "zero_learning_rate"),
        (7, "zero_learning_rate"),
    ]


def test_speed_that_falls_to_a_third_and_stays():
    slow = {"tokens_per_second": 300.0}
    assert rules([{}] * 20 + [slow]) == []
    assert rules([{}] * 20 + [slow] * 6) == [(22, "slow")]
    assert rules([{}] * 20 + [{"tokens_per_second": 400.0}] * 6) == []


def test_memory_that_grows_on():
    """By a thousandth a line. What grows at first and then stays is none."""
    long = AT_FIRST + GROUPS * GROUP
    assert rules([{}] * (long + 20), memory=lambda n: 1 + n / 500) == [(long, "memory_creep")]
    assert rules([{}] * (long + 20), memory=lambda n: 1 + min(n, AT_FIRST) / 50) == []
    assert rules([{}] * (long + 20), memory=lambda n: 1 + n / 5000) == []


def pair(chosen=0.0, rejected=0.0, accuracy=0.5, margin=0.0):
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    return dict(zip(names, (chosen, rejected, accuracy, margin), strict=True))


def test_preference_pairs_told_apart_before_training():
    sure = pair(1.0, -1.0, 1.0, 2.0)
    assert rules([sure] * 8) == [(5, "separated_from_the_start")]
    assert rules([pair(accuracy=1.0), *[sure] * 8]) == []  # a small first batch by luck: the margin is nothing
    assert rules([sure, pair(accuracy=0.9), *[sure] * 8]) == []
    assert rules([{}] * 8) == []


def test_both_answers_become_unlikely():
    falling = [pair(-0.2 * n, -0.3 * n, 0.8, 0.1 * n) for n in range(20)]
    assert [rule for _, rule in rules(falling)] == ["both_fall"]
    assert rules([pair(0.1 * n, -0.3 * n, 0.8, 0.4 * n) for n in range(20)]) == []  # as it should be
    assert rules([pair(-0.02 * n, -0.3 * n, 0.8, 0.3 * n) for n in range(20)]) == []  # a little is usual


def test_overfitting_by_hand():
    """Above the lowest by 5%, rising, with the gap to the training loss growing."""
    health = Health()
    seen = [(2.0, 2.0), (1.5, 1.4), (1.5, 1.2), (1.57, 1.0), (1.6, 0.8), (1.9, 0.5), (1.2, 0.5)]
    found = [[f.rule for f in health.evaluation(*pair)] for pair in seen]
    assert found == [[], [], [], [], ["overfitting"], [], []]


@pytest.mark.parametrize(
    ("losses", "told"),
    [((0.02, 0.0, 0.0), False), ((0.02, 0.0, 0.02), True), ((-1.0, -1.2, -1.19), False), ((-1.0, -1.2, -1.1), True)],
)
def test_losses_may_be_nothing_or_less(losses, told):
    """Hinge ends at 0, robust below it."""
    health = Health()
    found = [finding for loss in losses for finding in health.evaluation(loss, -2.0)]
    assert [finding.rule for finding in found] == ["overfitting"] * told


def test_a_resumed_run_judges_as_the_whole_one():
    draw = random.Random(3)
    lines = [{"loss": draw.lognormvariate(0, 1), "tokens_per_second": draw.lognormvariate(0, 2)} for _ in range(200)]
    whole = rules(lines)
    assert len(whole) > 2
    health = Health()
    first = rules(lines[:77], health=health)
    again = Health(**json.loads(json.dumps(vars(health))))
    assert first + [(n + 77, rule) for n, rule in rules(lines[77:], health=again)] == whole


def test_counts_by_rule():
    lines = [{"event": "health", "rule": r} for r in ("slow", "nan", "slow")] + [{"event": "train"}]
    assert counted(lines) == {"slow": 2, "nan": 1}


def spoiled(job_of, recipe, bad):
    """(job, events, error) of a run whose optimiser steps `bad` have a gradient that is not a number."""
    events, error, forwards = [], None, {"seen": 0}
    job, progress = job_of(recipe, sink=events.append)

    def spoil(role, args, out):
        forwards["seen"] += 1
        if (forwards["seen"] + 1) // 2 in bad:
            out = out._replace(logps_N=out.logps_N * float("nan"))
        return out

    job.policy.register_forward_hook(spoil)
    try:
        train(job, progress)
    except TrainError as caught:
        error = caught
    return job, progress, events, error


def test_steps_that_are_not_finite_are_passed_over_a_bounded_number_of_times(recipe_of, job_of):
    sections = {"eval": {"eval_strategy": "no"}, "health": {"on_nan": "skip"}}
    job, progress, events, error = spoiled(
        job_of, recipe_of(train={"max_steps": 6}, logging={"logging_steps": 2}, **sections), bad={2, 4, 5}
    )
    assert error is None
    assert progress.step == 6
    assert [(e["step"], e["rule"]) for e in events if e["event"] == "health"] == [(2, "nan"), (4, "nan"), (5, "nan")]
    lines = {e["step"]: e for e in events if e["event"] == "train"}
    assert sorted(lines) == [1, 2, 4, 6]
    assert "loss" not in lines[2]  # step 2 alone since the line before, and it was passed over
    assert all(math.isfinite(lines[step]["loss"]) for step in (1, 4, 6))
    assert job.scheduler.last_epoch == 3
    rows = [json.loads(line) for line in (job.plan.run / "bad_rows.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {2, 4, 5}
    wanted = sorted(job.data.rows[unit].source for unit in job.schedule.step(1))
    assert sorted(row["row"] for row in rows if row["step"] == 2) == wanted
    assert all("plus" in row["prefix"] + row["completion"] for row in rows)


def test_too_many_stop_the_run(recipe_of, job_of):
    sections = {"eval": {"eval_strategy": "no"}, "health": {"on_nan": "skip"}, "save": {"save_steps": 50}}
    path = recipe_of(train={"max_steps": 20}, logging={"logging_steps": 50}, **sections)
    _, progress, events, error = spoiled(job_of, path, bad=range(2, 30))
    assert error is not None
    assert progress.step == 2 + MAX_SKIPPED
    assert "bad_rows.jsonl" in error.hint
    assert len([e for e in events if e["event"] == "health"]) == MAX_SKIPPED + 1


@pytest.mark.parametrize("moves", [True, False])
def test_weights_that_do_not_move(recipe_of, job_of, monkeypatch, moves):
    events = []
    path = recipe_of(train={"max_steps": 5, "warmup_steps": 1}, eval={"eval_strategy": "no"})
    job, progress = job_of(path, sink=events.append)
    if not moves:
        monkeypatch.setattr(
            job.accelerator, "clip_grad_norm_", lambda trained, limit: sum(p.grad.zero_().sum() for p in trained)
        )
    train(job, progress)
    found = [(e["step"], e["rule"]) for e in events if e["event"] == "health"]
    assert found == ([] if moves else [(4, "nothing_changes")])  # three steps with a learning rate, after one without


def test_steps_that_were_passed_over_do_not_count_as_still(recipe_of, job_of, monkeypatch):
    events = []
    path = recipe_of(train={"max_steps": 3}, eval={"eval_strategy": "no"}, health={"on_nan": "skip"})
    job, progress = job_of(path, sink=events.append)
    norms = iter([float("nan"), float("inf"), 1.0])

    def clip(trained, limit):
        for p in trained:
            p.grad.zero_()
        return torch.tensor(next(norms))

    monkeypatch.setattr(job.accelerator, "clip_grad_norm_", clip)
    train(job, progress)
    assert [e["rule"] for e in events if e["event"] == "health"] == ["nan", "nan"]


def own_answers():
    usual = {"objective/kl": 1.0, "completions/distinct_ratio": 0.8, "completions/mean_length": 20.0}
    more = {"completions/clipped_ratio": 0.0, "learning_rate": 1e-5, "tokens_per_second": 100.0}
    return {**usual, **more}


@pytest.mark.parametrize(
    ("rule", "fine", "bad"),
    [
        ("kl_blow_up", {"objective/kl": 19.0}, {"objective/kl": 21.0}),
        ("one_answer", {"completions/distinct_ratio": 0.21}, {"completions/distinct_ratio": 0.19}),
        (
            "length_runaway",
            {"completions/mean_length": 41.0, "completions/clipped_ratio": 0.4},
            {"completions/mean_length": 41.0, "completions/clipped_ratio": 0.6},
        ),
    ],
)
def test_answers_that_earn_their_reward_the_wrong_way(rule, fine, bad):
    health = Health()

    def told(numbers, step):
        return [f.rule for f in health.line({**own_answers(), **numbers}, step=step, memory_gib=1.0)]

    assert not any(told({}, step) for step in range(1, 8))
    assert told(fine, 8) == []
    assert told(bad, 9) == [rule]
    assert told(bad, 10) == []  # it is told of when it begins
