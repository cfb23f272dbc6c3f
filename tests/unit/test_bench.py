"""Tests of the benchmark: its rows, its arithmetic, who goes first, and one comparison on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from finetune_cli.errors import DataError, MachineError, ModelError, TrainError

ROOT = Path(__file__).resolve().parents[2]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", ROOT / "scripts" / "bench.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load_script()
TINY = {
    "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "vocab_size": 10,
}  # fmt: skip


def settings(tmp_path: Path, **changes: Any) -> Any:
    told = {
        "set": "sft", "model": str(tmp_path), "rows": str(tmp_path / "rows.jsonl"), "steps": 3, "batch": 2,
        "precision": "bf16", "max_length": 64, "device": "cpu", "folder": str(tmp_path),
    }  # fmt: skip
    return script.Settings(**{**told, **changes})


def step(seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "seconds": seconds, "loss": 2.0, "rows": 2, "tokens": 10, "trained_tokens": 4, "lengths": [4, 6],
        "peak_gib": 1.0, **changes,
    }  # fmt: skip


def rounds(*seconds: tuple[float, float], **theirs: Any) -> list[dict[str, Any]]:
    return [
        {"round": n, "warm_up": n < 2, "ours": step(mine), "trl": step(other, **theirs)}
        for n, (mine, other) in enumerate(seconds)
    ]


def test_synthetic_rows_are_the_same_each_time_and_as_long_as_they_say() -> None:
    rows = script.short_rows(200)
    assert rows == script.short_rows(200)
    assert rows[:5] == script.short_rows(5)
    answered = sorted(len(row["completion"].split()) for row in rows)
    wanted = [tokens / 1.14 for tokens in script.ANSWER_TOKENS]
    assert wanted[0] - 1 <= answered[0]
    assert answered[-1] <= wanted[-1] + 1
    assert abs(answered[100] - wanted[3]) < 40  # the median of 200 draws


def test_full_rows_leave_room_for_one_end_of_sequence_token() -> None:
    assert {len(row["prompt"] + row["completion"]) for row in script.full_rows(3, tokens=100)} == {99}


def test_alpaca_columns_become_prompt_and_completion() -> None:
    row = script.completion_row({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert row == {
        "prompt": "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
        "completion": "3",
    }
    assert script.completion_row({"prompt": "a", "completion": "b", "id": 1}) == {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match="columns messages"):
        script.completion_row({"messages": []})


def test_a_short_file_is_read_again_from_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}\n')
    asked = script.arguments_of(["sft", "--rows", str(file)])
    assert [row["prompt"] for row in script.chosen_rows(asked, 5)] == ["a", "c", "a", "c", "a"]


def test_operations_of_a_step_by_hand() -> None:
    shape = script.Shape.of(TINY)
    # q 8x8, k and v 8x4, o 8x8, gate, up and down 8x16: 64 + 32 + 32 + 64 + 3 x 128 = 576 a layer
    assert shape.linear_weights == 2 * 576
    # rows of A and B: 16 (q 16 + k 12 + v 12 + o 16 + 3 x 24) = 16 x 128 a layer
    assert shape.lora_weights(16) == 2 * 16 * 128
    assert script.sft_flops(shape, [2, 3], 4) == {
        "linear": 4 * 1152 * 5,
        "lora": 6 * 4096 * 5,
        "attention": 12 * 8 * (3 + 6) * 2,  # 3 pairs of a row of two tokens, 6 of three; heads x head_dim is 8
        "head": 4 * 10 * 8 * 4,
    }


def test_weights_are_those_of_the_real_shape() -> None:
    qwen = script.Shape.of(script.QWEN_7B)
    assert qwen.linear_weights + 2 * qwen.vocabulary * qwen.hidden == pytest.approx(7.615e9, rel=1e-3)
    assert script.Shape.of({**TINY, "num_local_experts": 8}) is None
    assert script.Shape.of({"n_embd": 8}) is None


def test_ratio_is_the_median_of_pairs_without_warm_up(tmp_path: Path) -> None:
    found = script.summary(
        rounds((1.0, 99.0), (1.0, 99.0), (1.0, 2.0), (2.0, 6.0), (1.0, 8.0), loss=2.5, peak_gib=1.5),
        [{"bf16": {"small": 1.0, "large": 4.0}, "fp32": {"small": 100.0}}],
        settings(tmp_path),
        script.Shape.of(TINY),
    )
    assert found["ratio"] == {"median": 3.0, "lowest": 2.0, "highest": 8.0}
    assert found["ours"]["rows_per_second"] == 2.0
    assert found["trl"]["tokens_per_second"] == pytest.approx(10 / 6)
    assert found["peak_ratio"] == 1.5
    assert found["loss_difference"] == pytest.approx(0.2)
    assert found["same_tokens"]
    work = sum(script.sft_flops(script.Shape.of(TINY), [4, 6], 4).values()) / 1e9
    assert found["ours"]["share_of_matrix_rate"] == pytest.approx(work / 4.0)


def test_a_whole_run_is_its_start_and_all_of_its_steps() -> None:
    started = {"ours": {"seconds": 2.0}, "trl": {"seconds": 3.0}, "first": {"seconds": 50.0}}
    found = script.whole_run(started, rounds((1.0, 4.0), (1.0, 5.0)))
    assert found == {"ours": 4.0, "trl": 12.0, "ratio": 3.0, "steps": 2}


def test_unequal_work_is_said(tmp_path: Path) -> None:
    found = script.summary(
        rounds((1, 1), (1, 1), (1, 1), trained_tokens=5), [{"bf16": {"one": 1.0}}], settings(tmp_path), None
    )
    assert not found["same_tokens"]
    assert "NOT ON THE SAME TOKENS" in "\n".join(script.summary_lines(found))


def test_sides_take_turns_to_go_first() -> None:
    assert [script.order(n) for n in range(3)] == [("ours", "trl"), ("trl", "ours"), ("ours", "trl")]


def test_what_a_batch_of_trl_holds() -> None:
    padded = {
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[-100, 5, 6], [7, 8, -100]]),  # the 7 has no predictor
    }
    assert script.sft_held(padded) == ([3, 2], 3)
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "labels": torch.tensor([[-100, 5, 6, 7, 8]])}
    assert script.sft_held(packed) == ([3, 2], 3)


def test_gpu_set_on_a_machine_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert script.main(["sft", "--gpu", "--output", str(tmp_path / "out")]) == MachineError.exit_code
    assert "--gpu needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["sft", "--packing"], ["sft", "--rounds", "0"], ["sft", "--gpu", "--rows", "x"]])
def test_options_that_do_not_go_together(argv: list[str]) -> None:
    with pytest.raises(SystemExit):
        script.arguments_of(argv)


def test_file_names_of_hardware() -> None:
    assert script.slug("AMD EPYC 9R14 (x86_64)") == "amd-epyc-9r14-x86-64"
    assert script.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder with a config\.json"):
        script.model_folder(str(tmp_path), settings(tmp_path), work=tmp_path)


def test_last_words_of_a_worker_that_fails(tmp_path: Path) -> None:
    env = script.environment("cpu", tmp_path)
    with (
        script.Worker("rate", settings(tmp_path, model="/nowhere"), work=tmp_path, env=env) as worker,
        pytest.raises(TrainError, match=r"'rate' ended with exit code 1(.|\n)*/nowhere/config\.json"),
    ):
        worker.step(0)


def test_the_parent_imports_no_torch() -> None:
    """Or its own peak would be the least that a worker could report."""
    import subprocess

    heavy = "{'torch', 'transformers', 'datasets'}"
    code = f"import sys; sys.path.insert(0, 'scripts'); import bench; print(sorted({heavy} & set(sys.modules)))"
    code = code.replace("import bench;", "import bench; bench.hardware('cpu'); bench.commit(); bench.versions();")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_both_sides_do_the_same_on_random_weights(tmp_path: Path, packing: bool) -> None:
    """What --gpu runs, on the CPU and with a small shape."""
    small = {**script.QWEN_7B, **TINY, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 300}
    model = script.write_shape(tmp_path / "model", small)
    rows = script.short_rows(30, scale=0.1) if packing else script.full_rows(6, tokens=64)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = settings(
        tmp_path, model=model, precision="fp32", random_weights=True, gradient_checkpointing=True, packing=packing,
        max_length=256 if packing else 64,
    )  # fmt: skip
    started, found = script.compare(asked, work=tmp_path, say=lambda _: None)
    assert started["ours"]["padded_because"] is None
    assert [one["first"] for one in found] == ["ours", "trl", "ours"]
    if packing:
        return
    for one in found:
        assert one["ours"]["lengths"] == one["trl"]["lengths"] == [64, 64]
        assert one["ours"]["trained_tokens"] == one["trl"]["trained_tokens"] == 2 * 58
        assert one["ours"]["loss"] == pytest.approx(one["trl"]["loss"], rel=1e-5)


def test_pairs_in_the_shapes_people_have() -> None:
    rows = script.chat_pairs(3, scale=0.1)
    assert rows == script.chat_pairs(3, scale=0.1)
    assert all(script.pair_row(row) == row for row in rows)
    talk = {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"value": "b"},
    }
    assert script.pair_row(talk) == {"prompt": "### human:\nHi\n\n### gpt:\n", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="text"):
        script.pair_row({"text": "x"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "dpo-warm", "orpo", "reward"])
def test_both_sides_do_the_same_on_pairs(tmp_path: Path, kind: str) -> None:
    """On random weights: the same tokens, and for the first step the same loss (each side draws its own adapters)."""
    small = {**script.QWEN_7B, **TINY, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 300}
    model = script.write_shape(tmp_path / "model", small)
    rows = script.chat_pairs(6, scale=0.05)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = settings(tmp_path, set=kind, model=model, precision="fp32", random_weights=True, max_length=400)
    started, found = script.compare(asked, work=tmp_path, say=lambda _: None)
    assert ("first" in started) == (kind == "dpo-warm")
    for one in found:
        assert one["ours"]["rows"] == one["trl"]["rows"] == 2
        assert one["ours"]["lengths"] == one["trl"]["lengths"]
    if kind != "reward":  # whose head is drawn anew by each side
        assert found[0]["ours"]["loss"] == pytest.approx(found[0]["trl"]["loss"], rel=1e-4)
