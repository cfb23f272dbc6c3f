"""`validate --fix`: keys find their place; comments, order, quoting and values stay; the rest is left with a reason."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_cli.recipe import yaml
from finetune_cli.recipe.fix import comments, fix, values
from finetune_cli.recipe.names import MEANT, REMEDIES, RENAMED
from tests.unit.recipe.two_methods import GOOD, Two

HEAD = "# a recipe\nmethod: sft  # how\n"
REST = "model: org/m\ndata: train.jsonl\noutput_dir: 'runs/x'  # where\n"


def after(text):
    return fix(text, "r.yaml", root=Two)


@pytest.mark.parametrize(
    ("written", "fixed"),
    [
        # a name of another tool, in its section
        ("train:\n  num_epochs: 2  # two\n  # more\n  max_steps: 5\n",
         "train:\n  num_train_epochs: 2  # two\n  # more\n  max_steps: 5\n"),
        ("lora: {rank: 8, lora_alpha: 16.0}  # flow\n", "lora: {r: 8, lora_alpha: 16.0}  # flow\n"),
        # a typo
        ("train: {learning_rat: 2e-5, max_steps: 0x10}\n", "train: {learning_rate: 2e-5, max_steps: 0x10}\n"),
        ("train:\n  warmup_stesp: 5\n", "train:\n  warmup_steps: 5\n"),
        # a misplaced key, into a section that is there and one that is not
        ("train:\n  max_steps: 5\n  eval_steps: 2  # often\n\n# the end\n",
         "train:\n  max_steps: 5\n\n# the end\neval:\n  eval_steps: 2  # often\n"),
        ("learning_rate: 1e-5  # low\n# of the run\n\ntrain:\n  max_steps: 5\n# end\n",
         "# of the run\n\ntrain:\n  max_steps: 5\n  learning_rate: 1e-5  # low\n# end\n"),
        ("lr: 1e-5  # low\n", "train:\n  learning_rate: 1e-5  # low\n"),
        ("train: {seed: 7, max_steps: 5}\n", "train: {max_steps: 5}\nseed: 7\n"),
        ("train:\n  seed: 7\n", "seed: 7\n"),
        ("train.learning_rate: 1e-5\n", "train:\n  learning_rate: 1e-5\n"),
        # a section under another name, and what is in it
        ("training:\n  num_epochs: 3\n  lr: 1e-5\n", "train:\n  num_train_epochs: 3\n  learning_rate: 1e-5\n"),
        # a switch that is on and stands for a word
        ("train:\n  bf16: true  # fast\n  max_steps: 5\n", "train:\n  precision: bf16  # fast\n  max_steps: 5\n"),
        ("train: {fp16: True}\n", "train: {precision: fp16}\n"),
        ("lora: {r: 4, lora_target_linear: true}\n", "lora: {r: 4, target_modules: all-linear}\n"),
        # values stay as they are written
        ("train:\n  epochs: 3\n  max_steps: ~\n  learning_rate: 5E-5\n  gradient_checkpointing: True\n",
         "train:\n  num_train_epochs: 3\n  max_steps: ~\n  learning_rate: 5E-5\n  gradient_checkpointing: True\n"),
        ("seeed: 0o17\nlogging: {run_name: \"a # b\"}\n", "seed: 0o17\nlogging: {run_name: \"a # b\"}\n"),
    ],
)  # fmt: skip
def test_keys_find_their_place(written, fixed):
    found = after(HEAD + REST + written)
    assert found.text == HEAD + REST + fixed
    assert found.moves
    assert found.left == ()
    again = after(found.text)
    assert (again.text, again.moves) == (found.text, ())


def test_a_bare_value_gets_its_section():
    found = after(
        "method: sft  # how\nmodel: org/m\ndata: train.jsonl  # rows\noutput_dir: x\npacking: true\ncutoff_len: 9\n"
    )
    assert found.text == (
        "method:\n  name: sft  # how\n  packing: true\nmodel: org/m\ndata:\n  train: train.jsonl  # rows\n"
        "  max_length: 9\noutput_dir: x\n"
    )
    assert [(m.key, m.target) for m in found.moves] == [
        ("packing", "method.packing"), ("cutoff_len", "data.max_length")
    ]  # fmt: skip


def test_a_key_of_an_item():
    found = after(
        "method: sft\nmodel: m\noutput_dir: x\ndata:\n  train:\n    - path: a.jsonl\n      wieght: 2.0  # twice\n"
    )
    assert found.text.endswith("    - path: a.jsonl\n      weight: 2.0  # twice\n")
    assert [(m.key, m.target) for m in found.moves] == [("data.train[0].wieght", "data.train[0].weight")]


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("lr: 1e-5\nlearningrate: 2e-5\n", "lr, learningrate all stand for train.learning_rate; keep one"),
        ("lr: 1e-5\ntrain: {learning_rate: 2e-5}\n", "train.learning_rate is written already; keep one"),
        ("train: {bf16: true, fp16: true}\n", "train.bf16, train.fp16 all stand for train.precision; keep one"),
        ("train: {bf16: true, precision: fp32}\n", "train.precision is written already; keep one"),
        ("warmup: 100\n", "train.warmup_ratio does not take its value: expected a number from 0 to 1"),
        ("mix_probs: 0.5\n", "it is not certain which item of the list is meant"),
    ],
)
def test_what_is_not_certain_is_left(written, reason):
    text = HEAD + REST + written
    found = after(text)
    assert found.text == text
    assert found.moves == ()
    assert any(reason in why for _, why in found.left), found.left


@pytest.mark.parametrize(
    "written",
    [
        "bf16: false\n",
        "bf16: auto\n",
        "use_peft: true\n",
        "train: {per_device_batch: 1}\n",
        "zzz: 1\n",
        "train: {beta: 1}\n",
        "loss_typ: x\n",
    ],
)
def test_what_has_no_certain_place_is_not_touched(written):
    text = f"{HEAD}{REST}{written}\n"
    assert after(text).text == text


@pytest.mark.parametrize(
    "text", ["", "[", "a: [1\n", "- 1\n", "x", "a: 1\na: 2\nlr: 1\n", "method: !x sft\nlr: 1\n", "\x00"]
)
def test_what_is_no_recipe_stays_as_it_is(text):
    assert after(text).text == text


def test_a_recipe_without_fault_is_not_touched_whatever_its_form():
    text = "#  x\nmethod :   { name : sft ,packing: false}\nmodel:  'm'\n\n\ndata:\n    - a.jsonl\noutput_dir: x   #\n"
    assert after(text).text == text


LINES = [
    *(f"{name}: 1" for name in RENAMED),
    *(f"{name}: 1" for name in REMEDIES if name != "<<"),
    *(f"{name}: true" for name in MEANT),
]
SECTIONS = ["train:", "lora:", "eval: {eval_steps: 0.1}", "# a comment", "", "data: train.jsonl  # x", "  # deeper"]


@settings(max_examples=80, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(seed=st.integers(0, 2**32), count=st.integers(1, 9))
def test_whatever_is_written_values_and_comments_stay(seed, count):
    draw = random.Random(seed)
    lines = GOOD.splitlines()
    for n in range(count):
        line = draw.choice(LINES if draw.random() < 0.6 else SECTIONS)
        indent = "  " if lines and lines[-1].startswith(("train:", "lora:", "  ")) and draw.random() < 0.7 else ""
        lines.append(f"{indent}{line}" + (f"  # c{n}" if draw.random() < 0.5 and line and "#" not in line else ""))
    text = "\n".join(lines) + "\n"
    found = after(text)
    tree, wrong = yaml.parse(text, "r.yaml")
    if tree is None or wrong:
        assert found.text == text
        return
    now, wrong = yaml.parse(found.text, "r.yaml")
    assert now is not None
    assert not wrong
    words = [move.value for move in found.moves if move.value is not None]
    wanted = values(tree)
    for word in words:
        wanted[wanted.index("True")] = repr(word)
    assert values(now) == sorted(wanted)
    assert comments(found.text) == comments(text)
    assert after(found.text).text == found.text


def test_a_word_for_a_switch_is_a_section_in_full():
    found = after(
        "method: sft  # how\nmodel: org/m  # what\ndata: a\noutput_dir: x\ntrain_on_inputs: true\nflash_attn: on\n"
    )
    assert found.text == (
        "method:\n  name: sft  # how\n  loss_on: all\nmodel: org/m  # what\ndata: a\noutput_dir: x\nflash_attn: on\n"
    )  # `on` is a text in YAML 1.2
    assert found.to_json()["moved"] == [{"key": "train_on_inputs", "to": "method.loss_on: all"}]
