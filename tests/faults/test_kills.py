"""Killed at any moment, a run goes on and ends as if it had not been. FAULT_POINTS: kills for each method."""

import os
import random
import sys
from collections import Counter

import pytest

from finetune_cli.engine import manifest
from finetune_cli.methods import registry
from tests.faults.harness import STAGES, Fault, Training

POINTS = int(os.environ.get("FAULT_POINTS", "0"))
"""0: eight in all, for the ordinary suite."""
METHODS = list(registry())
FEW = {"sft": ["step", "disk", "save", "end"], "dpo": ["disk", "eval"], "ppo": ["step", "eval"]}


@pytest.fixture(scope="module")
def training(tmp_path_factory, request):
    return Training(tmp_path_factory.mktemp(request.param) / "training", request.param)


def chosen(method):
    """Stages of the kills: a save is where most can go wrong."""
    weighed = ["step", "eval", "save", "disk", "end", "disk"]
    return [weighed[i % len(weighed)] for i in range(POINTS)] if POINTS else FEW.get(method, [])


@pytest.mark.parametrize("training", METHODS if POINTS else list(FEW), indirect=True)
def test_killed_anywhere_nothing_is_lost(training, capsys):
    draw = random.Random(os.environ.get("FAULT_SEED", "6"))
    counts = Counter()
    assert set(training.calls) == {*STAGES, "disk"}
    for number, stage in enumerate(chosen(training.method)):
        name = f"killed-{number}"
        call = draw.randint(1, training.calls[stage])
        killed = training.start(name, fault=Fault(stage, call)).end()
        assert killed.code == -9, killed.said
        assert "Traceback" not in killed.said
        assert len(manifest.found(training.folder / name)) <= 4
        if draw.random() < 0.3:  # and again, where it went on
            again = training.start(
                name, "--resume", fault=Fault(stage, draw.randint(1, training.calls[stage] // 2))
            ).end()
            counts["killed again"] += again.code == -9
            assert "Traceback" not in again.said, again.said
        training.ends_as_if_undisturbed(name)
        counts[stage] += 1
    with capsys.disabled():
        sys.stdout.write(f"\n{training.method}: killed and ended with the same bits: {dict(counts)}\n")
    assert sum(counts[stage] for stage in (*STAGES, "disk")) == len(chosen(training.method))
