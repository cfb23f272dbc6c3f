"""Runs that want the same folder, and signals that come in storms."""

import os
import random
import sys
from collections import Counter

import pytest

from tests.faults.harness import STAGES, Fault

POINTS = int(os.environ.get("FAULT_POINTS", "0"))


@pytest.mark.parametrize("number", range(max(1, POINTS // 3)))
def test_two_runs_race_for_a_folder(sft, number):
    name = f"race-{number}"
    racers = [sft.start(name, *options) for options in ([], ["--resume"], ["--overwrite"])]
    outcomes = [racer.end() for racer in racers]
    assert sorted(o.code for o in outcomes) == [0, 2, 2], [o.said for o in outcomes]
    assert not any("Traceback" in o.said for o in outcomes)
    for outcome in outcomes:
        assert outcome.code == 0 or "is writing to" in outcome.said
    assert sft.checked(name) == sft.wanted


def test_storms_of_signals(sft, capsys):
    draw, counts = random.Random(6), Counter()
    for number in range(max(3, POINTS)):
        stage = STAGES[number % len(STAGES)]
        name = f"storm-{number}"
        outcome = sft.start(name, fault=Fault(stage, draw.randint(1, sft.calls[stage]), "storm")).end()
        assert "Traceback" not in outcome.said, outcome.said
        if outcome.code == 0:  # it came when all the steps were done
            counts["finished"] += 1
            assert sft.checked(name) == sft.wanted
        else:
            assert outcome.code in (130, 143), outcome.said
            counts["saved" if "saved as checkpoint-" in outcome.said else "before the first step"] += 1
        sft.ends_as_if_undisturbed(name, at_most=1)
        counts[stage] += 1
    with capsys.disabled():
        sys.stdout.write(f"\nstorms of 60 signals: {dict(counts)}\n")
    assert counts["saved"]
