"""Every method for twenty steps in float32: 1 process x 1 row x 8 forwards is 2 processes x 4 rows, in every logged
number and in the weights; and a checkpoint of either goes on as the other."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_cli.plan.launch import free_port
from tests.helpers import questions, write_recipe, write_rows
from tests.parity.stock import EDGES, token_rows

pytestmark = pytest.mark.slow
STEPS, HALF = 20, 10
FLAT = {"lr_scheduler_type": "constant"}
ROOT = Path(__file__).parents[3]
UNLIKE = {"tokens_per_second", "memory_gib", "seconds", "event"}
CASES: dict[str, dict[str, Any]] = {
    "sft": {"lora": None, "rate": 2e-4},
    "dpo": {"rate": 9e-5},
    "dpo-full": {"lora": None, "rate": 4e-5, "method": {"precompute_ref_log_probs": False}},
    "orpo": {"rate": 5e-4},
    "reward": {"rate": 5e-4},
    "ppo": {"rate": 2e-4, "method": {"reward": "reward.py:score", "num_ppo_epochs": 1}},
}
"""Rates at the upper end of what passes for each method, so that weights move by much more than the bound."""
SPREAD = ("sft", "dpo", "dpo-full", "orpo", "reward")
THREE = ("sft", "dpo")
OWN_ANSWERS = '''
"""A reward, and answers that are a function of the prompt, whichever process gives them."""
from finetune_cli.engine import rollout


def answer(self, prompts, *, temperature, seed):
    return [[(sum(prompt) * k) % 300 + 20 for k in range(1, 4 + len(prompt) % 3)] for prompt in prompts]


rollout.Local.__call__ = answer


def score(prompts, responses, rows):
    return [len(response) / 10 for response in responses]
'''


def pairs() -> list[dict[str, Any]]:
    """24 pairs, prompts of every length."""
    longer = [([i, *asked], [i + 1, *said], other) for i in range(20, 400, 100) for asked, said, other in EDGES]
    return token_rows(longer)


def recipe(folder: Path, model: Path, case: str, *, name: str, launch: dict[str, Any], train: dict[str, Any]) -> Path:
    """21 rows to train on, in steps of 8, 8 and 5; an odd number to evaluate."""
    method, given = case.partition("-")[0], CASES[case]
    rows = pairs() if method in ("dpo", "orpo", "reward") else questions(24)
    if method == "ppo":
        rows = [{"prompt": row["messages"][:1]} for row in rows]
    (folder / "reward.py").write_text(OWN_ANSWERS, encoding="utf-8")
    return write_recipe(
        folder / f"{case}-{name}.yaml",
        method={"name": method, **given.get("method", {})},
        model=str(model),
        output_dir=str(folder / f"{case}-{name}"),
        data={
            "train": str(write_rows(folder / f"{case}.jsonl", rows[:21])),
            "eval_sets": str(write_rows(folder / f"{case}-eval.jsonl", rows[21:])),
        },
        lora=given.get("lora", {"r": 4, "lora_alpha": 8}),
        train={"max_steps": STEPS, "global_batch_size": 8, "learning_rate": given["rate"], **FLAT, **train},
        eval={"eval_steps": HALF, "sample_prompts": 2 if case == "dpo" else 0},
        save={"save_steps": HALF},
        launch=launch,
    )


def play(processes: int, *arguments: str, **environment: str) -> None:
    """Run recipes in that many processes of one launcher."""
    place = ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command = [sys.executable, "-m", "finetune_cli.engine.launcher", *place, "-m", "tests.several", *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def events(path: Path) -> list[dict[str, Any]]:
    """Of a recipe file: what its run said."""
    return [json.loads(line) for line in path.with_suffix(".events").read_text().splitlines()]


def lines(path: Path, *, after: int = 0) -> list[dict[str, Any]]:
    return [e for e in events(path) if e["event"] in ("train", "eval") and e["step"] > after]


def weights(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """What was trained, of policy and critic."""
    checkpoint = run / f"checkpoint-{step}"
    name = "adapter_model.safetensors" if (checkpoint / "adapter_config.json").exists() else "model.safetensors"
    found = load_file(checkpoint / name)
    critic = checkpoint / "critic.pt"
    return found | (torch.load(critic, weights_only=True) if critic.exists() else {})


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """|a - b| / |b|, all tensors as one."""
    assert a.keys() == b.keys()
    apart = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    return float((apart / sum(float(w.double().square().sum()) for w in b.values())) ** 0.5)


def assert_same(one: Path, other: Path, *, after: int = 0) -> None:
    """Of recipe files: the numbers that their runs logged, and the weights."""
    found, wanted = (lines(path, after=after) for path in (one, other))
    assert [(line["event"], line["step"]) for line in found] == [(line["event"], line["step"]) for line in wanted]
    assert sum(line["event"] == "train" for line in found) == STEPS - after
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.keys() == theirs.keys()
        for key in set(mine) - UNLIKE:
            near = pytest.approx(theirs[key], rel=1e-5 if "loss" in key else 1e-4, abs=1e-5)
            assert mine[key] == near, (mine["event"], mine["step"], key)
    assert distance(weights(one.with_suffix("")), weights(other.with_suffix(""))) < 1e-4


SPLIT: dict[str, Any] = {"rows": 4, "num_processes": 2}
Recipes = Callable[..., list[str]]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Recipes:
    """Arguments of `play`: recipes of some cases, from the checkpoints of their form `start` where it is given."""
    folder = tmp_path_factory.mktemp("same")

    def make(name: str, cases: Iterable[str], *, rows: int, start: str | None = None, **more: Any) -> list[str]:
        train, launch = {"per_device_train_batch_size": rows, **more.pop("train", {})}, more
        made = [recipe(folder, tiny_model_folder, case, name=name, launch=launch, train=train) for case in cases]
        if start is None:
            return [str(path) for path in made]
        places = [folder / f"{case}-{start}" / f"checkpoint-{HALF}" for case in cases]
        return [f"{path}={place}" for path, place in zip(made, places, strict=True)]

    return make


@pytest.fixture(scope="module")
def runs(recipes: Recipes) -> Path:
    """All cases in one process and in two, and the last half of each again from a checkpoint of the other."""
    one = recipes("one", CASES, rows=1, num_processes=1)
    play(1, *one)
    play(2, *recipes("two", CASES, **SPLIT), *recipes("one-then-two", CASES, **SPLIT, start="one"))
    play(1, *recipes("two-then-one", CASES, rows=1, num_processes=1, start="two"))
    return Path(one[0]).parent


@pytest.fixture(scope="module")
def spread(runs: Path, recipes: Recipes) -> Path:
    """The same with weights in pieces."""
    pieces = {**SPLIT, "strategy": "fsdp2"}
    play(
        2,
        *recipes("spread", SPREAD, **pieces),
        *recipes("checkpointed", SPREAD, **pieces, train={"gradient_checkpointing": True}),
        *recipes("one-then-spread", SPREAD, **pieces, start="one"),
    )
    play(1, *recipes("spread-then-one", SPREAD, rows=1, num_processes=1, start="spread"))
    three = {"rows": 2, "num_processes": 3, "strategy": "fsdp2"}  # no weight of the model divides by three
    play(3, *recipes("spread-then-three", THREE, **three, start="spread"))
    return runs


@pytest.mark.parametrize("case", CASES)
def test_eight_forwards_of_one_are_two_processes_of_four(case, runs):
    assert_same(runs / f"{case}-two.yaml", runs / f"{case}-one.yaml")


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_goes_on_in_another_number_of_processes(case, runs):
    for name in ("one-then-two", "two-then-one"):
        assert_same(runs / f"{case}-{name}.yaml", runs / f"{case}-one.yaml", after=HALF)


@pytest.mark.parametrize("form", ["spread", "checkpointed"])
@pytest.mark.parametrize("case", SPREAD)
def test_weights_in_pieces_learn_the_same(case, form, spread):
    made = next(line for line in events(spread / f"{case}-{form}.yaml") if line["event"] == "made")
    assert made["as"].startswith("FSDP")  # and not DistributedDataParallel, as accelerate makes it on a CPU
    assert made["pieces"] == made["weights"] > 20
    assert_same(spread / f"{case}-{form}.yaml", spread / f"{case}-one.yaml")


@pytest.mark.parametrize("case", SPREAD)
def test_a_checkpoint_goes_on_in_pieces_and_out_of_them(case, spread):
    for name in ("one-then-spread", "spread-then-one"):
        assert_same(spread / f"{case}-{name}.yaml", spread / f"{case}-one.yaml", after=HALF)


@pytest.mark.parametrize("case", THREE)
def test_a_checkpoint_in_pieces_goes_on_in_more_of_them(case, spread):
    assert_same(spread / f"{case}-spread-then-three.yaml", spread / f"{case}-one.yaml", after=HALF)


def test_each_process_writes_its_pieces_of_the_optimiser(spread):
    """Of a model that is trained whole: half of every moment each, and none of it in what the first writes of all."""
    folder = spread / "sft-spread" / f"checkpoint-{HALF}"
    rest, *pieces = (torch.load(folder / f"optimizer{end}.pt", weights_only=True) for end in ("", "_0", "_1"))
    wanted = torch.load(spread / "sft-one" / f"checkpoint-{HALF}" / "optimizer.pt", weights_only=True)["state"]
    moments = {f"{n}.{key}": v for n, held in wanted.items() for key, v in held.items() if v.dim()}
    assert [set(piece) for piece in pieces] == [set(moments)] * 2
    assert all(v is None or not v.dim() for held in rest["state"].values() for v in held.values())
    for name, whole in moments.items():
        torch.testing.assert_close(torch.cat([piece[name] for piece in pieces]), whole, rtol=1e-3, atol=1e-6)
        assert [len(piece[name]) for piece in pieces] == [len(half) for half in whole.chunk(2)]


@pytest.mark.parametrize("case", CASES)
def test_the_bounds_are_not_met_by_standing_still(case, runs):
    halfway, after = (weights(runs / f"{case}-one", step) for step in (HALF, STEPS))
    assert distance(after, halfway) > 3e-4
