"""What a change of the recipe means for a run that goes on."""

import pytest

from finetune_cli.plan.changes import Change, compare, fingerprint

BEFORE = {
    "method.name": "sft", "method.packing": False, "train.learning_rate": 2e-4, "train.max_steps": None, "lora.r": 16,
    "quantization": None, "logging.logging_steps": 5, "data.train": [{"path": "a"}], "data.shuffle": True,
    "train.per_device_train_batch_size": 2, "train.lr_scheduler_kwargs": {}, "launch.main_process_port": 1,
    "launch.num_processes": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("logging.logging_steps", 1, "harmless"),
        ("launch.main_process_port", 2, "harmless"),
        ("data.train", [{"path": "b"}], "harmless"),  # the rows themselves are compared
        ("data.shuffle", False, "training"),
        ("train.per_device_train_batch_size", 1, "rounding"),
        ("train.max_steps", 7, "length"),
        ("train.learning_rate", 1e-4, "training"),
        ("method.packing", True, "training"),
        ("lora.r", 8, "training"),
        ("launch.num_processes", 2, "training"),
        ("method.name", "dpo", "impossible"),
    ],
)
def test_kind_of_a_change(key, value, kind):
    [change] = compare(BEFORE, {**BEFORE, key: value})
    assert (change.key, change.before, change.now, change.kind) == (key, BEFORE[key], value, kind)
    same = fingerprint(BEFORE) == fingerprint({**BEFORE, key: value})
    assert same == (kind in ("harmless", "rounding") and key != "data.train")


def test_a_section_that_comes_or_goes_is_one_change():
    quantised = {k: v for k, v in BEFORE.items() if k != "quantization"} | {
        "quantization.load_in_4bit": True, "quantization.bnb_4bit_quant_type": "nf4",
    }  # fmt: skip
    [change] = compare(BEFORE, quantised)
    assert (change.key, change.before, change.kind) == ("quantization", None, "training")
    [change] = compare(quantised, BEFORE)
    assert (change.key, change.now) == ("quantization", None)
    full = {k: v for k, v in BEFORE.items() if k != "lora.r"} | {"lora": None}
    assert [(c.key, c.kind) for c in compare(BEFORE, full)] == [("lora", "impossible")]
    kwargs = {k: v for k, v in BEFORE.items() if k != "train.lr_scheduler_kwargs"} | {
        "train.lr_scheduler_kwargs.num_cycles": 2
    }
    assert [c.key for c in compare(BEFORE, kwargs)] == ["train.lr_scheduler_kwargs"]


def test_a_key_that_only_one_version_knows_is_no_change():
    assert compare(BEFORE, {**BEFORE, "train.new": 1}) == []
    assert compare({**BEFORE, "train.old": 1}, BEFORE) == []


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("lora.lora_alpha", "adapter of the checkpoint"),
        ("train.optim", "empty state"),
        ("seed", "order of the rows"),
        ("train.weight_decay", "the new value holds from here on"),
    ],
)
def test_going_on_anyway_says_what_it_does(key, said):
    assert said in Change(key, 1, 2).consequence


def test_the_length_of_rows_is_training_where_it_is_the_size_of_a_bin():
    values = {**BEFORE, "data.max_length": 64}
    for packing, kind in ((False, "harmless"), (True, "training")):
        [change] = compare(
            {**values, "method.packing": packing}, {**values, "method.packing": packing} | {"data.max_length": 32}
        )
        assert change.kind == kind


def test_how_answers_are_drawn_is_training_where_they_are_learned_from():
    sft = {"method.name": "sft", "generation.temperature": 0.7}
    [change] = compare(sft, {**sft, "generation.temperature": 1.0})
    assert change.kind == "harmless"
    ppo = {**sft, "method.name": "ppo"}
    [change] = compare(ppo, {**ppo, "generation.temperature": 1.0})
    assert change.kind == "training"
    assert fingerprint(sft) == fingerprint({**sft, "generation.temperature": 1.0})
    assert fingerprint(ppo) != fingerprint({**ppo, "generation.temperature": 1.0})
