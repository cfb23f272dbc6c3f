"""Eight rows of one process are two processes of four, whoever starts them; through the command, as users do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import finetune, journal, questions, write_recipe, write_rows

pytestmark = pytest.mark.slow
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port")
ACCELERATE = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """17 rows in steps of 8, 8 and 1: the second process has no row of its own in the last. Three rows to evaluate."""
    folder = tmp_path_factory.mktemp("processes")
    return write_recipe(
        folder / "recipe.yaml",
        model=str(tiny_model_folder),
        data={
            "train": str(write_rows(folder / "train.jsonl", questions(17))),
            "eval_sets": str(write_rows(folder / "eval.jsonl", questions(3, first=17))),
        },
        train={"max_steps": None, "num_train_epochs": 1, "global_batch_size": 8, "per_device_train_batch_size": 4},
        eval={"metric": "exact_match", "metric_rows": 3, "eval_steps": 100},
    )


def run(recipe: Path, name: str, *options: str, launcher: tuple[str, ...] = ()) -> Path:
    """The run folder of a run that must succeed."""
    folder = recipe.parent / name
    done = finetune("run", str(recipe), "--set", f"output_dir={folder}", *options, launcher=launcher, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    return run(recipe, "alone", "--set", "num_processes=1", "--set", "per_device_train_batch_size=8")


def assert_same_run(one: Path, other: Path) -> None:
    keys = ("loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy", "epoch")
    keys += ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_exact_match")
    found, wanted = ([line for line in journal(run) if line["event"] in ("train", "eval")] for run in (one, other))
    assert [(line["event"], line["step"]) for line in found] == [
        ("eval", 0),
        *[("train", n) for n in (1, 2, 3)],
        ("eval", 3),
    ]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for key in set(keys) & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (mine["event"], mine["step"], key)
    after, before = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert after.keys() == before.keys()
    assert max(float((after[name] - before[name]).abs().max()) for name in after) < 1e-5
    assert max(float(w.abs().max()) for name, w in after.items() if "lora_B" in name) > 1e-4


def test_two_processes_of_four_equal_one_of_eight(recipe, alone):
    two = run(recipe, "two", "--set", "num_processes=2")
    assert_same_run(two, alone)
    assert (two / "checkpoint-3" / "rng_1.pt").exists()


def test_under_torchrun(recipe, alone):
    from finetune_cli.plan.launch import free_port

    assert_same_run(run(recipe, "torchrun", launcher=(*TORCHRUN, str(free_port()))), alone)


def test_under_torchrun_an_error_is_told(recipe):
    from finetune_cli.plan.launch import free_port

    rows = write_rows(recipe.parent / "bad.jsonl", [*questions(8), {"messages": [{"role": "user"}]}])
    told = ("--set", f"data.train={rows}", "--set", f"output_dir={recipe.parent / 'bad'}")
    done = finetune("run", str(recipe), *told, launcher=(*TORCHRUN, str(free_port())), cwd=recipe.parent)
    assert done.returncode != 0
    assert "bad.jsonl:9" in done.stderr


def test_under_accelerate_launch(recipe, alone):
    assert_same_run(run(recipe, "accelerate", launcher=ACCELERATE), alone)


OWN_ANSWERS = '''
"""A reward, and answers that are a function of the prompt, whichever process gives them."""
from finetune_cli.engine import rollout


def answer(self, prompts, *, temperature, seed):
    return [[(sum(prompt) * k) % 300 + 20 for k in range(1, 4 + len(prompt) % 3)] for prompt in prompts]


rollout.Local.__call__ = answer


def score(prompts, responses, rows):
    return [len(response) / 10 for response in responses]
'''


def test_roles_that_take_turns_are_the_same_in_two_processes(recipe, tiny_model_folder):
    """PPO's gradients are summed by hand: weights of policy and critic after three steps of two updates."""
    (recipe.parent / "reward.py").write_text(OWN_ANSWERS)
    rows = [{"prompt": row["messages"][:1]} for row in questions(17)]
    knobs = {"name": "ppo", "reward": "reward.py:score", "num_mini_batches": 2, "num_ppo_epochs": 1}
    path = write_recipe(
        recipe.parent / "ppo.yaml",
        method=knobs,
        model=str(tiny_model_folder),
        data={"train": str(write_rows(recipe.parent / "prompts.jsonl", rows))},
        train={"max_steps": None, "num_train_epochs": 1, "global_batch_size": 8, "per_device_train_batch_size": 2},
        eval={"eval_strategy": "no"},
    )
    one, two = (run(path, f"ppo{n}", "--set", f"num_processes={n}") for n in (1, 2))
    found, wanted = ([line for line in journal(folder) if line["event"] == "train"] for folder in (two, one))
    assert [line["step"] for line in found] == [1, 2, 3]
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for key in set(mine) - {"tokens_per_second", "memory_gib", "seconds", "event"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (mine["step"], key)
    critics = [torch.load(folder / "checkpoint-3" / "critic.pt", weights_only=True) for folder in (one, two)]
    policies = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    for a, b in (critics, policies):
        assert a.keys() == b.keys()
        assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-5
        assert max(float(w.abs().max()) for name, w in a.items() if "lora_B" in name or "value_head" in name) > 1e-4
