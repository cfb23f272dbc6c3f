"""What a run takes is told beforehand: its steps, tokens and, by real steps, its time."""

import json

import pytest

from finetune_cli import commands
from finetune_cli.engine import calibrate
from finetune_cli.engine.loop import train
from tests.helpers import finetune, questions


@pytest.mark.parametrize("packing", [False, True])
def test_steps_and_tokens_are_those_of_the_run(packing, recipe_of, job_of):
    """12 rows, 4 a step, two epochs: 6 steps and every token twice; packed, fewer."""
    method = {"name": "sft", "packing": packing}
    train_ = {"max_steps": None, "num_train_epochs": 2}
    path = recipe_of(rows=questions(12), method=method, train=train_, eval={"eval_strategy": "no"})
    path.write_text(path.read_text().replace("  max_steps: null\n", ""))
    plan, _, _ = commands.planned(path, ())
    job, progress = job_of(path)
    told = calibrate.length(plan, job.data.rows)
    done = train(job, progress)
    assert told["steps"] == done.step
    assert told["tokens"] == done.num_tokens
    assert (done.step == 6) is not packing


def test_calibrate_times_real_steps_and_leaves_nothing(recipe_of, tmp_path):
    done = finetune("validate", str(recipe_of()), "--calibrate", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)["run"]
    assert run["steps"] == 3
    assert run["seconds"] == pytest.approx(run["seconds_per_step"] * 3)
    assert run["peak_memory_gib"] > 0.1
    assert run["estimated_memory_gib"] > 0.1
    assert not (tmp_path / "run").exists()


def test_fast_and_calibrate_exclude_each_other(recipe_of, tmp_path):
    done = finetune("validate", str(recipe_of()), "--calibrate", "--fast", cwd=tmp_path)
    assert done.returncode == 2
    assert "exclude each other" in done.stderr
