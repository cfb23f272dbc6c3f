"""A disk that fills while a checkpoint is written costs that checkpoint, and nothing else."""

import os
import random
import subprocess
import sys

import pytest

from finetune_cli.engine import manifest
from tests.faults.harness import Fault, Training

POINTS = int(os.environ.get("FAULT_POINTS", "0"))


def stopped_for_room(training, name, outcome):
    assert outcome.code == 4, outcome.said
    assert "Traceback" not in outcome.said
    run = training.folder / name
    assert not list(run.glob("*.writing"))
    assert all(manifest.damage(folder) is None for folder in manifest.found(run))


@pytest.mark.parametrize("room", [0, 1000, 20_000])
def test_files_that_may_grow_no_longer(sft, room):
    """RLIMIT_FSIZE, from the middle of the saves on: at its first file, or in a large one."""
    name = f"limit-{room}"
    outcome = sft.start(name, fault=Fault("save", sft.calls["save"] // 2, "limit", room)).end()
    stopped_for_room(sft, name, outcome)
    assert manifest.found(sft.folder / name)
    sft.ends_as_if_undisturbed(name, at_most=1)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tmpfs")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_file_system_that_fills(small_disk, capsys):
    training = Training(small_disk / "training", "sft")
    draw, full = random.Random(6), 0
    for number in range(max(2, POINTS // 3)):
        name = f"full-{number}"
        stage = ("save", "step", "end", "eval")[number % 4]
        room = draw.choice([0, 4096, 40_000, 90_000])
        fault = Fault(stage, draw.randint(training.calls[stage] // 3, training.calls[stage]), "fill", room)
        outcome = training.start(name, fault=fault).end()
        (training.folder / "ballast").unlink()
        if outcome.code:
            full += 1
            stopped_for_room(training, name, outcome)
        training.ends_as_if_undisturbed(name)
        subprocess.run(["rm", "-r", str(training.folder / name)], check=True)
    with capsys.disabled():
        sys.stdout.write(
            f"\ndisk filled {number + 1} times, {full} of them stopped the run; all ended as they should\n"
        )
    assert full
