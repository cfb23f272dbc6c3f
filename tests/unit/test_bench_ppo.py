"""The benchmark of PPO: both sides on a tiny model, and how its rounds are summed up.

FINETUNE_TRL_PPO names the folder of TRL 1.12.0, the last with PPO; the installed one is tried where it is not set.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from finetune_cli.errors import DataError
from tests.helpers import model_folder

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
FOLDER = os.environ.get("FINETUNE_TRL_PPO")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("bench_ppo", SCRIPTS / "bench_ppo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_ppo", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("bench", None)


def step(seconds, **changes):
    return {
        "seconds": seconds, "episodes": 8, "prompt_tokens": 200, "answer_tokens": 512, "peak_gib": 2.0, **changes,
    }  # fmt: skip


def test_the_ratio_is_the_median_of_pairs_without_warm_up(script):
    seconds = [(9.0, 9.0), (10.0, 20.0), (10.0, 30.0), (20.0, 50.0)]
    rounds = [
        {"round": n, "warm_up": n < 1, "ours": step(mine), "trl": step(theirs, peak_gib=8.0)}
        for n, (mine, theirs) in enumerate(seconds)
    ]
    found = script.summary(rounds)
    assert found["ratio"] == {"median": 2.5, "lowest": 2.0, "highest": 3.0}
    assert found["ours"]["episodes_per_second"] == 0.8
    assert found["memory_share"] == 0.25
    assert found["same_tokens"]
    rounds[2]["trl"]["answer_tokens"] = 500
    assert not script.summary(rounds)["same_tokens"]


def test_rows_of_a_file_are_asked_again_from_its_beginning(script, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Say a."}\n{"instruction": "Say b.", "output": "b"}\n')
    first, second, third = (row["prompt"] for row in script.read(path, 3))
    assert first == third == "Say a."
    assert "Say b." in second
    with pytest.raises(DataError):
        script.prompt_row({"text": "Say a."})


def has_ppo():
    if FOLDER is not None:
        return True
    return importlib.util.find_spec("trl") is not None and importlib.util.find_spec("trl.experimental.ppo") is not None


@pytest.mark.slow
@pytest.mark.skipif(not has_ppo(), reason="needs TRL 1.12.0: FINETUNE_TRL_PPO names its folder")
def test_both_sides_do_the_same_on_a_tiny_model(script, tmp_path):
    """As many tokens; nothing is learned before the first step, so its divergence is zero on both sides."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in script.prompts(8, scale=0.15)))
    told = script.Settings(
        model=str(model_folder(tmp_path / "model", max_position_embeddings=512)), rows=str(rows), steps=2, batch=4,
        new_tokens=8, precision="fp32", folder=str(tmp_path), stop_token="<|User|>",
    )  # fmt: skip
    started, rounds = script.compare(told, work=tmp_path, trl_folder=FOLDER and Path(FOLDER), say=lambda _: None)
    assert started["ours"]["judges_on_the_base"] == ["judge_0"]
    assert script.summary([{**one, "warm_up": False} for one in rounds])["same_tokens"]
    for side in ("ours", "trl"):
        assert rounds[0][side]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
        assert rounds[1][side]["objective/kl"] != 0.0
        assert rounds[0][side]["policy/approxkl_avg"] > 0.0
