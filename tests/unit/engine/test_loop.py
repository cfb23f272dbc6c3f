"""The loop: a step is its rows, however they are split; every share is of the run; a bad step changes nothing."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_cli.data.batches import Schedule
from finetune_cli.engine import manifest
from finetune_cli.engine.loop import Progress, Sums, due, optimiser_step, total_steps, train
from finetune_cli.errors import TrainError
from tests.helpers import questions


def run(job_of, recipe):
    """(losses, gradient norms, final trained weights) of a run in this process."""
    events = []
    job, progress = job_of(recipe, sink=events.append)
    train(job, progress)
    lines = [event for event in events if event["event"] == "train"]
    return [e["loss"] for e in lines], [e["grad_norm"] for e in lines], weights(job)


def weights(job):
    return {n: p.detach().clone() for n, p in job.generator.named_parameters() if p.requires_grad}


def far(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


SGD = {"optim": "sgd", "learning_rate": 5e-4, "max_grad_norm": 0, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_batch_of_8_equals_8_accumulated(recipe_of, job_of, adapted, layout):
    """24 rows, three steps of eight. The rows are of unequal lengths: a mean of means would differ."""
    runs = []
    for size in (8, 3, 1):
        path = recipe_of(
            rows=questions(24),
            lora={} if adapted else None,
            model={"layout": layout},
            train={"per_device_train_batch_size": size, "global_batch_size": 8, "learning_rate": 5e-5},
            eval={"eval_strategy": "no"},
        )
        runs.append(run(job_of, path))
    for losses, norms, after in runs[1:]:
        assert len(losses) == 3
        assert losses == pytest.approx(runs[0][0], rel=1e-6)
        assert norms == pytest.approx(runs[0][1], rel=1e-5)
        assert far(after, runs[0][2]) < 1e-6


def test_training_changes_the_weights(recipe_of, job_of):
    """The bound of the test above is not met by standing still."""
    path = recipe_of(rows=questions(24), train={"learning_rate": 5e-5}, eval={"eval_strategy": "no"})
    before = weights(job_of(path)[0])
    assert far(run(job_of, path)[2], before) > 5e-5


def test_short_last_step_of_an_epoch_is_divided_by_its_own_counts(recipe_of, job_of):
    """Seven rows in steps of four: the second step has three. Its gradient is that of a step of exactly these three."""
    seven = questions(7)
    setting = {**SGD, "num_train_epochs": 1, "max_steps": None}
    path = recipe_of(rows=seven, data={"shuffle": False}, train=setting)
    job, _ = job_of(path)
    assert (job.schedule.steps_per_epoch, job.total_steps) == (2, 2)
    assert job.schedule.step(1) == [4, 5, 6]
    sums = Sums()
    norm, counts, _ = optimiser_step(job, 1, measure=False, sums=sums)
    loss = sums.means(job)["loss"]
    assert counts.rows == 3
    assert counts.tokens == sum(row.targets for row in job.data.rows[4:])

    path = recipe_of(rows=seven[4:], data={"shuffle": False}, train={**setting, "global_batch_size": 3})
    alone, _ = job_of(path)
    sums = Sums()
    wanted, _, _ = optimiser_step(alone, 0, measure=False, sums=sums)
    assert loss == pytest.approx(sums.means(alone)["loss"], rel=1e-6)
    assert norm == pytest.approx(wanted, rel=1e-5)


def test_logged_loss_is_of_all_steps_since_the_last_line(recipe_of, job_of):
    """Lines at steps 1, 2 and 4: the third covers two steps, by their tokens."""

    def losses(every):
        events = []
        path = recipe_of(
            train={"max_steps": 4},
            logging={"logging_steps": every},
            eval={"eval_strategy": "no"},
            save={"save_steps": 9},
        )
        job, progress = job_of(path, sink=events.append)
        train(job, progress)
        return job, {e["step"]: e["loss"] for e in events if e["event"] == "train"}

    job, each = losses(1)
    _, some = losses(2)
    tokens = {step: sum(r.targets for r in job.rows_of(job.schedule.step(step - 1))) for step in (3, 4)}
    assert list(some) == [1, 2, 4]
    wanted = (each[3] * tokens[3] + each[4] * tokens[4]) / (tokens[3] + tokens[4])
    assert some[4] == pytest.approx(wanted, rel=1e-6)


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    batch=st.integers(1, 17),
    size=st.integers(1, 5),
    world=st.integers(1, 4),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_rows_of_a_step_are_the_same_for_every_split(lengths, batch, size, world, seed, shuffle):
    one = Schedule(lengths, batch, 1, seed, shuffle)
    split = replace(one, per_device_batch_size=size, _orders={})
    assert one.steps_per_epoch == math.ceil(len(lengths) / batch)
    for epoch in (0, 1):
        seen = []
        for place in range(one.steps_per_epoch):
            step = epoch * one.steps_per_epoch + place
            windows = [list(split.window(step, rank=rank, world=world)) for rank in range(world)]
            assert len({len(window) for window in windows}) == 1  # as many forwards everywhere: collectives meet
            dealt = [row for window in windows for rows in window for row in rows]
            assert sorted(dealt) == sorted(one.step(step))
            assert all(len(rows) <= size for window in windows for rows in window)
            for own in ([i for rows in window for i in rows] for window in windows):  # alike rows together
                assert [lengths[i] for i in own] == sorted((lengths[i] for i in own), reverse=True)
            seen += one.step(step)
        assert sorted(seen) == list(range(len(lengths)))  # every row once an epoch


def test_schedule_is_a_function_of_seed_and_step():
    """Asked in any order, by another object; another seed and the next epoch have other orders."""
    lengths = list(range(1, 21))
    one, other = (Schedule(lengths, 4, 2, seed=5) for _ in range(2))
    forwards = [one.step(step) for step in range(15)]
    assert [other.step(step) for step in reversed(range(15))][::-1] == forwards
    assert forwards[:5] != forwards[5:10]
    assert Schedule(lengths, 4, 2, seed=6).step(0) != forwards[0]
    assert Schedule(lengths, 4, 2, seed=5, shuffle=False).step(6) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [
        (5, 12, [5, 10]),
        (0.25, 12, [3, 6, 9, 12]),
        (0.1, 4, [1, 2, 3, 4]),  # less than a step is every step
        (0.5, 5, [2, 4]),
        (1, 3, [1, 2, 3]),
        (100, 12, []),
    ],
)
def test_due(every, total, steps):
    assert [step for step in range(1, total + 1) if due(step, every, total)] == steps


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"), [(3, None, 15), (0.5, None, 3), (0.01, None, 1), (3, 7, 7), (1.2, None, 6)]
)
def test_total_steps(epochs, max_steps, total):
    assert total_steps(5, epochs, max_steps) == total


def test_progress_survives_json():
    progress = Progress(step=3, num_tokens=5, best=(-1.5, 2), first={"loss": 2.0}, last={"loss": 1.0})
    for one in (progress, Progress()):
        pending = [{"loss": [1.5, 3.0]}]
        text = json.dumps(one.to_json(pending))
        assert json.dumps(Progress.from_json(json.loads(text)).to_json(pending)) == text


@pytest.mark.parametrize("bad", [1, 3])
def test_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(recipe_of, job_of, bad):
    """Four steps of two forwards, saved after every second step; the second forward of one step is bad."""
    events = []
    path = recipe_of(train={"max_steps": 4}, save={"save_steps": 2}, eval={"eval_strategy": "no"})
    job, progress = job_of(path, sink=events.append)
    seen = {"forwards": 0}

    def spoil(role, args, out):
        seen["forwards"] += 1
        if seen["forwards"] == 2 * bad:
            seen["before"] = weights(job)
            out = out._replace(logps_N=out.logps_N * float("nan"))
        return out

    job.policy.register_forward_hook(spoil)
    with pytest.raises(TrainError) as caught:
        train(job, progress)
    rows = [row.source for row in job.rows_of(job.schedule.step(bad - 1))]
    assert f"step {bad} is not finite (rows {', '.join(map(str, rows))})" in caught.value.message
    assert far(weights(job), seen["before"]) == 0
    assert all(bool(torch.isfinite(w).all()) for w in weights(job).values())
    health = [e for e in events if e["event"] == "health"]
    assert [(e["step"], e["rule"], e["rows"]) for e in health] == [(bad, "nan", rows)]
    folders = manifest.found(job.plan.run)
    assert [folder.name for folder in folders] == ([] if bad == 1 else ["checkpoint-2"])
    for folder in folders:
        assert manifest.damage(folder) is None
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        assert all(bool(torch.isfinite(v).all()) for s in saved["state"].values() for v in s.values())


@pytest.mark.parametrize(("limit", "wanted"), [(1e-6, [1, 2]), (1e6, [])])
def test_gradient_norm_above_the_limit_is_reported_at_its_step(recipe_of, job_of, limit, wanted):
    events = []
    path = recipe_of(train={"max_steps": 2}, eval={"eval_strategy": "no"}, health={"max_grad_norm_warning": limit})
    job, progress = job_of(path, sink=events.append)
    train(job, progress)
    assert [(e["step"], e["rule"]) for e in events if e["event"] == "health"] == [(s, "grad_norm") for s in wanted]
