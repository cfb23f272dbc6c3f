"""A policy learns what a function likes, from chance to nearly always. LEARNING_SEEDS: on how many seeds."""

import os

import pytest

from finetune_cli.engine.loop import train
from tests.helpers import questions

REWARD = """
def digits_and_spaces(prompts, responses, rows):
    return [sum(c in "0123456789 " for c in response) / max(1, len(response)) for response in responses]
"""


@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("LEARNING_SEEDS", "1"))))
def test_a_random_model_learns_to_say_digits_and_spaces(recipe_of, job_of, tmp_path, seed):
    """The mean reward of the 64 answers of a step. At temperature 1 a model whose logits are this small cannot be sure
    of anything."""
    (tmp_path / "reward.py").write_text(REWARD)
    path = recipe_of(
        rows=[{"prompt": row["messages"][:1]} for row in questions(12)],
        method={
            "name": "ppo",
            "reward": "reward.py:digits_and_spaces",
            "num_generations": 8,
            "kl_coef": 0.0,
            "lam": 1.0,
        },
        seed=seed,
        lora={"r": 8, "lora_alpha": 256},
        train={
            "max_steps": 60,
            "learning_rate": 5e-4,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 8,
            "global_batch_size": 8,
        },
        generation={"max_new_tokens": 6, "temperature": 0.7},
        eval={"eval_strategy": "no"},
    )
    events = []
    job, progress = job_of(path, sink=events.append)
    train(job, progress)
    scores = [event["objective/scores"] for event in events if event["event"] == "train"]
    assert scores[0] < 0.3
    assert scores[-1] > 0.9, scores
