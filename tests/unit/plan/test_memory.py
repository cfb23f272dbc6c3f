"""The memory estimate: sizes of published models, bytes by hand, and the live bytes of real steps on tiny models."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from finetune_cli import commands
from finetune_cli.engine import finish, loop
from finetune_cli.plan import footprint, memory
from finetune_cli.plan.footprint import Rows, Setup, quantised_bytes
from finetune_cli.plan.shape import Linear, Shape, config_of
from finetune_cli.recipe.sections import Lora, Quantization
from finetune_cli.types import Branch, Row
from tests.helpers import finetune, model_folder

ROOT = Path(__file__).resolve().parents[3]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_memory", ROOT / "scripts" / "measure_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_memory"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("gemma-3-270m", 268_098_176),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_sizes_are_those_that_the_model_cards_tell(name, weights):
    shape = Shape.of(script.SHAPES[name])
    assert shape is not None
    assert shape.weights == weights
    assert shape.known


def test_what_is_no_decoder_has_no_shape():
    assert Shape.of({"model_type": "t5", "d_kv": 64}) is None
    known = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    assert Shape.of({"text_config": known}) is not None
    assert Shape.of({"text_config": {**known, "vocab_size": None}}) is None, "its default is not known"


def test_four_bits_by_hand():
    """128 x 64 weights: 4096 bytes, 128 constants for 64 each, and their own constant where they are quantised too."""
    linear = Linear("q_proj", 64, 128, "attention")
    double = Quantization(load_in_4bit=True)
    assert quantised_bytes(linear, double) == 4096 + 128 + 2 + 64 + 1024
    assert quantised_bytes(linear, double.model_copy(update={"bnb_4bit_use_double_quant": False})) == 4096 + 512 + 64
    assert quantised_bytes(linear, Quantization(load_in_8bit=True)) == 8192 + 512


def llama_8b(**other: Any) -> Setup:
    shape = Shape.of(
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        }
    )  # fmt: skip
    assert shape is not None
    given: dict[str, Any] = {
        "shape": shape, "rows": Rows(segments=[(2048, 0)], targets=2048), "device": "cuda", "lora": Lora(),
        "quantization": None, "frozen": 2, "compute": 2, "optim": "adamw_torch_fused", "checkpointing": True,
        "accumulates": True, "processes": 1, "sharded": False, "labels": None, "second": None, "attention": "varlen",
    }  # fmt: skip
    return Setup(**given | other)


def test_the_parts_of_an_8b_model():
    """8.03e9 weights; LoRA r16 on all linear layers trains 41,943,040."""
    assert footprint.trained_weights(llama_8b()) == 41_943_040
    found = {line.what: line.bytes for line in memory.estimate(llama_8b()).lines}
    assert found["frozen weights"] == 2 * 8_030_261_248
    assert found["optimiser state"] == 8 * 41_943_040
    full = {line.what: line.bytes for line in memory.estimate(llama_8b(lora=None)).lines}
    assert "frozen weights" not in full
    assert full["trained weights"] + full["gradients"] + full["optimiser state"] == 16 * 8_030_261_248


def test_copies_of_frozen_weights_are_those_that_there_is_room_for():
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)

    def copied(**other):
        return footprint.copied_bytes(llama_8b(**{"device": "cpu", "checkpointing": False, "room": 1e12} | other))

    head = 128256 * 4096
    assert copied() == 2 * 2 * (weights + head)
    assert copied(room=3.9 * weights) == 2 * weights + 2 * 2 * head
    assert copied(room=4 * weights + 3.9 * head) == 4 * weights + 2 * head
    assert copied(room=1.9 * weights) == 0
    assert copied(labels=1) == copied(tokens=3) == 2 * 2 * weights
    assert copied(lora=Lora(target_modules=["q_proj"])) == 2 * 2 * (32 * 4096 * 4096 + head)
    for other in (
        {"device": "cuda"}, {"checkpointing": True}, {"frozen": 4}, {"lora": None}, {"lora": Lora(use_dora=True)},
        {"quantization": Quantization(load_in_4bit=True)},
    ):  # fmt: skip
        assert copied(**other) == 0, other
    assert footprint.room_for_copies(64.0, 1) == 2 * footprint.GIB
    assert footprint.room_for_copies(8.0, 2) == footprint.GIB / 2
    assert footprint.room_for_copies(None, 1) == 0


def test_it_says_where_it_fits():
    assert 24 in memory.fits(memory.estimate(llama_8b()).gib)
    assert memory.fits(memory.estimate(llama_8b(quantization=Quantization(load_in_4bit=True))).gib)[0] == 12
    assert memory.fits(memory.estimate(llama_8b(lora=None)).gib)[0] == 180  # casts of a whole forward beside it all
    assert memory.fits(1000.0) == []


def test_knobs_save_what_the_estimate_says():
    before = llama_8b(checkpointing=False)
    best = memory.knobs(before)[0]
    assert best.setting == "train.gradient_checkpointing: true"
    assert best.saving == pytest.approx(memory.estimate(before).gib - memory.estimate(llama_8b()).gib)
    assert [k.saving for k in memory.knobs(before)] == sorted((k.saving for k in memory.knobs(before)), reverse=True)


def test_rows_as_memory_sees_them():
    pair = Row([1, 2, 3], (Branch([4, 5], [True, True]), Branch([6], [True])))
    alone = Row([1], (Branch([2, 3], [False, True]),))
    assert memory.extent([pair, alone], padded=False) == Rows(segments=[(3, 0), (2, 3), (1, 3), (3, 0)], targets=4)
    assert memory.extent([pair, alone], padded=True) == Rows(segments=[(5, 0)] * 3, targets=4, padded=True)


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-bf16": {"train": {"precision": "bf16"}},
    "checkpointed": {"train": {"gradient_checkpointing": True}},
    "full": {"lora": None, "train": {"learning_rate": "auto"}},
    "full-bf16": {"lora": None, "train": {"precision": "bf16", "learning_rate": "auto"}},
    "accumulated": {"lora": None, "train": {"gradient_accumulation_steps": 2, "learning_rate": "auto"}},
    "patterns": {"lora": {"rank_pattern": {"down_proj": 64}, "layers_to_transform": [0, 2]}},
    "tokens": {"lora": {"trainable_token_indices": [5, 7]}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_15_percent_of_the_live_bytes(case, recipe_of, job_of, tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 6}
    model = model_folder(tmp_path / "model", **sizes)
    rows = [{"input_ids": [(7 * n + i) % 600 for i in range(200)]} for n in range(4)]
    told = {key: dict(value) if value else value for key, value in CASES[case].items()}
    train = {"global_batch_size": None, "per_device_train_batch_size": 2, "max_steps": 2, **told.pop("train", {})}
    train = {**{k: v for k, v in train.items() if v is not None}}
    if "gradient_accumulation_steps" not in train:
        train["gradient_accumulation_steps"] = 1
    path = recipe_of(rows=rows, model={"name_or_path": str(model)}, data={"max_length": 256}, train=train, **told)
    job, _ = job_of(path, "global_batch_size=auto")
    job.policy.train()
    live = script.Live()
    live.adopt(job)
    with live:
        for step in range(2):
            loop.optimiser_step(job, step, measure=True, sums=loop.Sums())
    found = finish.estimated(job)
    assert found is not None
    assert found.rows.tokens == 400
    assert found.peak == pytest.approx(live.peak, rel=0.15), found


@pytest.mark.parametrize("lora", [{"r": 4, "lora_alpha": 8}, None], ids=["lora", "full"])
def test_so_is_that_of_a_method_with_a_critic_and_answers_of_its_own(lora, recipe_of, job_of, tmp_path):
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 6}
    model = model_folder(tmp_path / "model", **sizes)
    (tmp_path / "r.py").write_text("def f(prompts, responses, rows):\n    return [1.0] * len(responses)\n")
    path = recipe_of(
        rows=[{"prompt": "What is two plus two? " * 4}] * 4,
        method={"name": "ppo", "reward": "r.py:f", "num_generations": 3, "stop_token": "<|User|>"},
        model={"name_or_path": str(model)},
        data={"max_length": 64},
        lora=lora,
        train={"learning_rate": "auto", "max_steps": 2, "per_device_train_batch_size": 4},
        generation={"max_new_tokens": 40, "temperature": 1.0},
        eval={"eval_strategy": "no"},
    )
    job, _ = job_of(path)
    job.policy.train()
    live = script.Live()
    live.adopt(job)
    with live:
        for step in range(2):
            loop.optimiser_step(job, step, measure=True, sums=loop.Sums())
    found = finish.estimated(job)
    assert found is not None
    assert found.rows.targets == 4 * 3 * 40
    assert found.peak == pytest.approx(live.peak, rel=0.15), found


def test_reward_models_are_counted(tiny_model_folder, recipe_of, tmp_path, job_of):
    """An adapter on the policy's own base brings itself alone; a model of its own all its weights."""
    weights = Shape.of(config_of(str(tiny_model_folder)) or {})
    assert weights is not None
    for number, base in enumerate((str(tiny_model_folder), "nobody/has-this-model")):
        folder = tmp_path / f"judge-{number}"
        folder.mkdir()
        config = {"base_model_name_or_path": base, "r": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        path = recipe_of(method={"name": "ppo", "reward": str(folder)}, train={"learning_rate": "auto"})
        plan, _, _ = commands.planned(path, ())
        assert memory.judges(plan) == (4 * 2 * 4 * (32 + 32) if number == 0 else 0.0)  # what is not here is not known
    path = recipe_of(method={"name": "ppo", "reward": str(tiny_model_folder)}, train={"learning_rate": "auto"})
    plan, _, _ = commands.planned(path, ())
    assert memory.judges(plan) == 4 * (weights.weights - weights.head)


def test_the_plan_tells_it_without_torch(recipe_of, tmp_path):
    path = recipe_of()
    code = (
        "import sys; from pathlib import Path; from finetune_cli import commands\n"
        "commands.plan(Path(sys.argv[1]), [], as_json=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory of one process" in done.stdout
    assert "to need less:" in done.stdout


def test_a_report_has_estimate_and_measure_of_one_quantity(recipe_of, tmp_path):
    done = finetune("run", str(recipe_of()), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["estimated_memory_gib"] == pytest.approx(report["peak_memory_gib"], rel=0.3)


def test_configurations_are_found_without_loading_anything(tmp_path, tiny_model_folder):
    found = config_of(str(tiny_model_folder))
    assert found is not None
    assert found["hidden_size"] == 32
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert config_of(str(adapter), base=str(tiny_model_folder)) == found
    assert config_of(str(adapter)) is None
    assert config_of("nobody/has-this-model") is None
