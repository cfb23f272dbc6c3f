"""Two machines as two network namespaces, each with an address of its own, and a cable between them that is pulled.

Needs root and `ip`; skipped elsewhere, and where FAULT_POINTS is not set (`make faults` sets it).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune_cli.engine import manifest
from tests.helpers import journal, questions, write_recipe, write_rows

STEPS, SAVED = 400, 50
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not int(os.environ.get("FAULT_POINTS", "0")), reason="run by make faults")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """The names of two namespaces that a cable joins: 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip")
    names = [f"ft{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for number, name in enumerate(names, start=1):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", name)
            ip("-n", name, "link", "set", name, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr!r}")
    yield names
    for name in names:
        ip("netns", "del", name)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("machines")
    return write_recipe(
        folder / "recipe.yaml",
        model=str(tiny_model_folder),
        data={"train": str(write_rows(folder / "train.jsonl", questions(24)))},
        train={"max_steps": STEPS, "global_batch_size": 8, "per_device_train_batch_size": 4},
        eval={"eval_strategy": "no", "sample_prompts": 0},
        save={"save_steps": SAVED, "save_total_limit": None},
        launch={"num_processes": 1},
    )


def start(recipe: Path, run: Path, namespace: str | None, rank: int, *more: str) -> "subprocess.Popen[str]":
    inside = [] if namespace is None else ["ip", "netns", "exec", namespace]
    place = ["num_machines=2", f"machine_rank={rank}", "main_process_ip=10.77.0.1"] if namespace else []
    options = [part for value in (f"output_dir={run}", *place) for part in ("--set", value)]
    command = [*inside, sys.executable, "-m", "finetune_cli", "run", str(recipe), *options, *more]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=env, cwd=recipe.parent, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def both(recipe: Path, run: Path, machines: list[str], *more: str) -> None:
    started = [start(recipe, run, name, rank, *more) for rank, name in enumerate(machines)]
    for process in started:
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 0, said


def assert_same(one: Path, other: Path) -> None:
    a, b = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    apart = sum(float((a[name] - b[name]).square().sum()) for name in b)
    assert (apart / sum(float(w.square().sum()) for w in b.values())) ** 0.5 < 1e-4
    losses = [[line["loss"] for line in journal(run) if line["event"] == "train"][:20] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.fixture(scope="module")
def whole(recipe: Path, machines: list[str]) -> Path:
    run = recipe.parent / "whole"
    both(recipe, run, machines)
    return run


def test_two_machines_train_what_one_trains(recipe, whole):
    alone = start(recipe, recipe.parent / "alone", None, 0)
    assert alone.wait(timeout=200) == 0
    assert_same(whole, recipe.parent / "alone")


def test_the_cable_is_pulled_mid_run(recipe, machines, whole):
    run = recipe.parent / "pulled"
    started = [start(recipe, run, name, rank) for rank, name in enumerate(machines)]
    while not (run / f"checkpoint-{SAVED}" / "manifest.json").exists():
        assert all(process.poll() is None for process in started)
        time.sleep(0.02)
    ip("-n", machines[1], "link", "set", machines[1], "down")
    pulled = time.monotonic()
    try:
        said = [process.communicate(timeout=60)[1] for process in started]
    finally:
        ip("-n", machines[1], "link", "set", machines[1], "up")
    assert time.monotonic() - pulled < 60
    assert [process.returncode for process in started] == [4, 4]
    assert all("machine" in text and "silent for 30 seconds" in text for text in said), said
    assert "Traceback" not in "".join(said)
    kept = manifest.newest_whole(run)
    assert kept is not None
    assert json.loads((kept / "manifest.json").read_text())["step"] < STEPS
    both(recipe, run, machines, "--resume")
    assert_same(run, whole)
