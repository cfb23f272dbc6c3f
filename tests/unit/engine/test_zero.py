"""DeepSpeed's ZeRO-3 in two processes against one process that holds everything: each method for twenty steps in
float32, and checkpoints that go on as the other."""

from pathlib import Path

import pytest

from tests.unit.engine import test_same_gradients as same
from tests.unit.engine.test_same_gradients import HALF, SPLIT, SPREAD, Recipes, assert_same, events, play

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed")
recipes = same.recipes
ZERO = {**SPLIT, "strategy": "deepspeed-zero3"}
SAVED = ("sft", "dpo-full", "reward")
"""All weights, a reference that is a copy in pieces, adapters beside a head that is trained whole."""


@pytest.fixture(scope="module")
def folder(recipes: Recipes) -> Path:
    one = recipes("one", SPREAD, rows=1, num_processes=1)
    play(1, *one)
    play(2, *recipes("zero", SPREAD, **ZERO))
    play(2, *recipes("checkpointed", ["sft", "dpo"], **ZERO, train={"gradient_checkpointing": True}))
    play(2, *recipes("zero-then-zero", SAVED, **ZERO, start="zero"))
    play(2, *recipes("one-then-zero", SAVED, **ZERO, start="one"))
    play(2, *recipes("chunked", ["sft"], **ZERO), CHUNK_LOGITS="1")
    play(2, *recipes("fsdp2", ["sft"], **{**ZERO, "strategy": "fsdp2"}))
    play(2, *recipes("fsdp2-then-zero", ["sft"], **ZERO, start="fsdp2"))
    play(1, *recipes("zero-then-one", SAVED, rows=1, num_processes=1, start="zero"))
    return Path(one[0]).parent


@pytest.mark.parametrize("case", SPREAD)
def test_weights_in_pieces_of_deepspeed_learn_the_same(case, folder):
    made = next(line for line in events(folder / f"{case}-zero.yaml") if line["event"] == "made")
    assert made["as"] == "DeepSpeedEngine"
    assert made["pieces"] == made["weights"] > 20
    assert_same(folder / f"{case}-zero.yaml", folder / f"{case}-one.yaml")


@pytest.mark.parametrize("case", ["sft", "dpo"])
def test_layers_that_are_computed_again_in_backward(case, folder):
    assert_same(folder / f"{case}-checkpointed.yaml", folder / f"{case}-one.yaml")


def test_processes_may_call_a_trained_head_for_unequal_numbers_of_chunks(folder):
    assert_same(folder / "sft-chunked.yaml", folder / "sft-one.yaml")


@pytest.mark.parametrize("name", ["zero-then-zero", "zero-then-one", "one-then-zero"])
@pytest.mark.parametrize("case", SAVED)
def test_a_checkpoint_goes_on_in_pieces_and_out_of_them(case, name, folder):
    assert_same(folder / f"{case}-{name}.yaml", folder / f"{case}-one.yaml", after=HALF)


def test_what_each_process_of_fsdp2_wrote_is_put_together(folder):
    assert_same(folder / "sft-fsdp2-then-zero.yaml", folder / "sft-one.yaml", after=HALF)
