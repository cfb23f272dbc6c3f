"""Measures the peak of live tensor bytes of real training steps, and compares it with what the plan estimates.

    python scripts/measure_memory.py                 the grid, into benchmarks/memory-<hardware>.json
    python scripts/measure_memory.py --only lora     the configurations whose name holds a word
    python scripts/measure_memory.py --table         what was measured, in Markdown

Every configuration is a process of its own that builds a job from a recipe as a run does and takes two optimiser steps.
Weights are random, shapes are real, rows are of exactly the length that is asked for.
"""

import argparse
import gc
import json
import platform
import random
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
    },
    "smollm2-360m": {
        **LLAMA, "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
        "num_key_value_heads": 5, "vocab_size": 49152, "max_position_embeddings": 8192,
    },
    "qwen2.5-0.5b": {
        **QWEN2, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "tie_word_embeddings": True,
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "max_position_embeddings": 32768,
        "sliding_window": 512, "query_pre_attn_scalar": 256,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
    "llama-3.2-1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
}  # fmt: skip
"""The configurations of published models, as far as memory knows them."""


@dataclass(frozen=True)
class Case:
    """One configuration of the grid."""

    shape: str
    kind: str = "lora"
    """lora | qlora | qlora8 | full"""
    batch: int = 2
    length: int = 256
    checkpointing: bool = False
    method: str = "sft"
    precision: str = "bf16"
    accumulation: int = 1
    more: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further keys, by section."""

    @property
    def name(self) -> str:
        parts = [self.shape, self.method, self.kind, self.precision, f"{self.batch}x{self.length}"]
        parts += ["checkpointed"] if self.checkpointing else []
        parts += [f"accumulate {self.accumulation}"] if self.accumulation > 1 else []
        parts += [f"{k}={v}" for section in self.more.values() for k, v in section.items()]
        return " ".join(parts)


BESIDE = "another model"
"""Stands for a folder of the same shape: a reference, or a classifier for `ppo`."""


def grid() -> Iterator[Case]:
    small, mid, qwen, llama = (Case(s) for s in ("smollm2-135m", "smollm2-360m", "qwen2.5-0.5b", "llama-3.2-1b"))
    for batch, length in ((1, 256), (4, 256), (1, 1024), (4, 512)):
        yield replace(small, batch=batch, length=length)
    for case in (small, mid, qwen):
        yield replace(case, checkpointing=True, batch=4)
        yield replace(case, kind="qlora", batch=2)
        yield replace(case, kind="full", batch=2)
        yield replace(case, kind="full", batch=4, checkpointing=True)
    yield replace(mid, batch=2, length=512)
    yield qwen
    yield replace(llama, batch=1)
    yield replace(llama, kind="qlora", batch=2, length=128)
    yield replace(llama, kind="qlora", batch=2, checkpointing=True)
    yield replace(small, kind="qlora8")
    yield replace(small, precision="fp32")
    yield replace(small, kind="full", precision="fp32", accumulation=2)
    yield replace(small, method="dpo")
    yield replace(small, method="dpo", checkpointing=True, batch=4)
    yield replace(small, method="dpo", kind="full")
    yield replace(mid, method="dpo", kind="qlora", more={"method": {"precompute_ref_log_probs": False}})
    yield replace(small, more={"lora": {"r": 128}})
    yield replace(small, more={"lora": {"target_modules": ["q_proj", "v_proj"]}})
    yield replace(small, kind="full", more={"train": {"optim": "adamw_8bit"}})
    yield Case("qwen3-0.6b")
    yield Case("qwen3-0.6b", kind="qlora", checkpointing=True)
    yield Case("gemma-3-270m")
    yield Case("gemma-3-270m", kind="full")
    yield replace(small, method="orpo")
    yield replace(small, method="orpo", kind="full", checkpointing=True, batch=4)
    yield replace(small, method="reward")
    yield replace(small, method="reward", kind="full")
    yield replace(mid, method="reward", kind="qlora", checkpointing=True)
    yield replace(small, method="dpo", more={"method": {"ref_model": "start"}, "lora": {"use_dora": True}})
    yield replace(small, method="dpo", more={"method": {"ref_model": BESIDE}})
    yield replace(small, method="ppo")
    yield replace(small, method="ppo", checkpointing=True, batch=4)
    yield replace(small, method="ppo", kind="full")
    yield replace(mid, method="ppo", kind="qlora", more={"method": {"reward": BESIDE}})
    yield replace(small, method="ppo", more={"method": {"num_generations": 4}})
    yield replace(small, more={"lora": {"trainable_token_indices": [7, 201]}})
    yield replace(small, more={"lora": {"rank_pattern": {"down_proj": 64}, "layers_to_transform": [*range(10)]}})


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, by the operations that make them and the collector that takes
    them. `peak` is the most there was at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def adopt(self, job: Any) -> None:
        """What a job holds before its first step: weights, buffers, what quantisation keeps beside them."""
        modules = list(job.policy.modules()) + (list(job.reference.role.modules()) if job.reference else [])
        held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        for weight in list(held):
            state = getattr(weight, "quant_state", None)
            nested = [state, getattr(state, "state2", None)]
            held += [v for one in nested if one is not None for v in vars(one).values() if torch.is_tensor(v)]
            held += [v for name in ("CB", "SCB") if torch.is_tensor(v := getattr(weight, name, None))]
        for tensor in [*held, *(job.reference.copies if job.reference else [])]:
            self.see(tensor)
        copies = {id(c): c for m in modules if (c := m.__dict__.get("packed")) is not None}  # they show no storage
        laid = [t for c in copies.values() for t in (c.forward, c.backward) if t is not None]
        self.bytes += sum(t.numel() * t.element_size() for t in laid)

    def see(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known[key] = weakref.ref(storage, lambda _: self._gone(key)), size
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _gone(self, key: int) -> None:
        self.bytes -= self._known.pop(key)[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def write_model(folder: Path, config: Mapping[str, Any], *, scores: bool = False) -> Path:
    """A model folder with random weights in bfloat16, and a tokenizer with a token for each byte; `scores`: of a
    classifier with one label."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        GenerationConfig,
        PreTrainedTokenizerFast,
    )

    specials = ["<|endoftext|>", "<|im_end|>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *specials]
    own = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, pad_token=specials[0], eos_token=specials[1])
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    rest = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **rest, **ids)
    torch.manual_seed(0)
    made.num_labels = 1 if scores else 2
    model = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_config(
        made, dtype=torch.bfloat16
    )
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def row(method: str, length: int, draw: random.Random) -> dict[str, Any]:
    """A row of exactly `length` tokens, a pair of a prompt and two answers of a third each; two thirds are trained."""
    ids = [draw.randrange(200) for _ in range(length)]
    prompt, half = length // 3, (length - length // 3) // 2
    if method == "ppo":
        return {"prompt": "".join(draw.choice("abcdefgh ") for _ in range(prompt))}
    if method in ("dpo", "orpo", "reward"):
        chosen, rejected = ids[prompt : prompt + half], ids[prompt + half :]
        return {
            "input_ids_chosen": [*ids[:prompt], 201, *chosen[1:]],
            "input_ids_rejected": [*ids[:prompt], 202, *rejected[1:]],
        }
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def recipe(case: Case, model: Path, work: Path) -> Path:
    draw = random.Random(case.name)
    count = case.batch * case.accumulation * 2
    rows = work / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(case.method, case.length, draw)) + "\n" for _ in range(count)))
    told: dict[str, Any] = {
        "method": {"name": case.method}, "output_dir": str(work / "run"), "model": {"name_or_path": str(model)},
        "data": {"train": str(rows), "max_length": case.length},
        "train": {
            "max_steps": 2, "per_device_train_batch_size": case.batch, "precision": case.precision,
            "gradient_accumulation_steps": case.accumulation, "gradient_checkpointing": case.checkpointing,
        },
        "eval": {"eval_strategy": "no", "sample_prompts": 0}, "logging": {"report_to": "none"},
    }  # fmt: skip
    if case.method == "ppo":
        (work / "worth.py").write_text("def worth(prompts, responses, rows):\n    return [1.0] * len(prompts)\n")
        told["method"]["reward"] = f"{work / 'worth.py'}:worth"
        told["generation"] = {"max_new_tokens": case.length - case.length // 3, "temperature": 1.0}
    told |= {"lora": {"r": 16}} if case.kind != "full" else {}
    bits = {"qlora": "load_in_4bit", "qlora8": "load_in_8bit"}.get(case.kind)
    told |= {"quantization": {bits: True}} if bits else {}
    for section, keys in case.more.items():
        own = {key: beside(model, case) if value == BESIDE else value for key, value in keys.items()}
        told[section] = {**told.get(section, {}), **own}
    path = work / "recipe.yaml"
    path.write_text(json.dumps(told, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def beside(model: Path, case: Case) -> str:
    """The folder of a second model."""
    folder = model.with_name(f"{case.shape}-{case.method}")
    if not (folder / "config.json").exists():
        write_model(folder, SHAPES[case.shape], scores=case.method == "ppo")
    return str(folder)


def measure(path: Path) -> dict[str, Any]:
    """Live bytes before the first step, the peak over two steps, and what was estimated for them; GiB."""
    from finetune_cli import commands
    from finetune_cli.data.rows import load_rows
    from finetune_cli.engine import finish, loop, prepare

    plan, _, _ = commands.planned(path, ())
    plan.run.mkdir(parents=True, exist_ok=True)
    words = prepare.bind(plan.recipe, plan.facts)
    job, _ = prepare.build(plan, words, load_rows(plan.recipe, words.chat), lambda _: None, resume=None)
    job.policy.train()
    live = Live()
    live.adopt(job)
    for thing in gc.get_objects():  # reward models are in no module of the job
        if issubclass(type(thing), torch.nn.Module):
            for weight in (*thing._parameters.values(), *thing._buffers.values()):
                if weight is not None:
                    live.see(weight)
    before = live.bytes
    with live:
        for step in range(job.total_steps):
            loop.optimiser_step(job, step, measure=True, sums=loop.Sums())
    made = finish.estimated(job)
    assert made is not None
    lines = {line.what: round(line.bytes / GIB, 4) for line in made.lines}
    return {
        "measured_gib": round(live.peak / GIB, 4), "estimated_gib": round(made.gib, 4),
        "off": round(made.peak / live.peak - 1, 4), "moment": made.moment, "lines": lines,
        "tokens": made.rows.tokens, "trained": sum(p.numel() for p in job.trained),
        "before_gib": round(before / GIB, 4),
    }  # fmt: skip


def work_on(case: Case, models: Path) -> dict[str, Any]:
    """In a process of its own: what one case leaves behind is no other's."""
    folder = models / case.shape
    if not (folder / "config.json").exists():
        write_model(folder, SHAPES[case.shape])
    with TemporaryDirectory() as work:
        return {"case": case.name, **asdict(case), **measure(recipe(case, folder, Path(work)))}


def hardware() -> str:
    """As `scripts/bench.py` names it."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import bench

    return str(bench.hardware("cpu")["name"])


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| configuration | live, GiB | estimated | off | peak |", "| --- | ---: | ---: | ---: | --- |"]
    for one in cases:
        numbers = f"{one['measured_gib']:.2f} | {one['estimated_gib']:.2f} | {one['off']:+.1%}"
        lines.append(f"| {one['case']} | {numbers} | {one['moment']} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name holds all of these words")
    parser.add_argument("--models", type=Path, help="keep the random models in this folder")
    parser.add_argument("--table", action="store_true", help="show what was measured, as a table")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="file to write")
    asked = parser.parse_args(argv)
    cases = list(grid())
    if asked.case is not None:
        print(json.dumps(work_on(cases[asked.case], asked.models)))
        return 0
    output = asked.output or ROOT / "benchmarks" / f"memory-{hardware()}.json"
    if asked.table:
        print(table(json.loads(output.read_text(encoding="utf-8"))["cases"]))
        return 0
    known = json.loads(output.read_text(encoding="utf-8"))["cases"] if asked.only and output.exists() else []
    found = {one["case"]: one for one in known}
    with TemporaryDirectory() as folder:
        for number, case in enumerate(cases):
            if all(word in case.name for word in (asked.only or "").split()):
                command = [sys.executable, __file__, "--case", str(number), "--models", str(asked.models or folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    print(f"{case.name}: failed\n{done.stderr[-2000:]}")
                    continue
                one = json.loads(done.stdout.splitlines()[-1])
                found[case.name] = one
                print(
                    f"{one['off']:+7.1%}  {one['measured_gib']:7.3f} {one['estimated_gib']:7.3f}  {case.name}",
                    flush=True,
                )
    ordered = [found[case.name] for case in cases if case.name in found]
    about = {
        "date": datetime.now(UTC).date().isoformat(), "torch": torch.__version__, "python": platform.python_version(),
        "largest": max(abs(one["off"]) for one in ordered),
    }  # fmt: skip
    output.write_text(json.dumps({**about, "cases": ordered}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(ordered)} configurations, the largest error {about['largest']:.1%}; written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
