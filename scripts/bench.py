"""Times a training step of ours beside TRL's trainer, on the same rows, in turns, each side in a process of its own.

    python scripts/bench.py sft                 a small model on the CPU; dpo, orpo and reward likewise
    python scripts/bench.py sft --gpu           the shape of a 7B model with random weights on one GPU

The parent imports no torch (a process inherits its parent's peak memory on Linux) and speaks to the workers over pipes,
so that while one side computes the other waits. What is compared and what is left out: benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import accumulate, cycle, islice, pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Self

from finetune_cli.errors import DataError, FinetuneError, MachineError, ModelError, TrainError

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "trl")
WARM_UP = 2
"""Rounds that are run and not counted."""
LORA: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LEARNING_RATE = 2e-4
SEED = 42
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "flash-attn")
BUSY = 0.5
"""Load average per core from which the machine is called busy."""
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
    "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": False,
}  # fmt: skip
"""The configuration of Qwen2.5-7B, as far as speed knows it."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What both workers are told."""

    set: str
    model: str
    """A folder."""
    rows: str
    """A JSONL file in the shape of the set."""
    steps: int
    batch: int
    precision: str
    max_length: int
    device: str
    folder: str
    """Where a worker may write."""
    gradient_checkpointing: bool = False
    packing: bool = False
    measure: bool = False
    """Ours also measures entropy and accuracy at every step, as TRL always does."""
    random_weights: bool = False
    """Weights are drawn on the device; the folder has the configuration and the tokenizer alone."""

    @property
    def dtype(self) -> str:
        return {"bf16": "bfloat16", "fp32": "float32"}[self.precision]


# ── rows ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

COMMON = """
the of and to in is that for it as was with be by on not he this are or his from at which but have an had they
you were their one all we can her has there been if more when will would who so no about into some than them
only other time new these two may then do first any my now such like our over man even most made after also
did many before must through back years where much your way well down should because each just those people
how too little state good very make world still own see men work long get here between both life being under
never day same another know while last might us great old year off come since against go came right used take
three small large water house number part place case point company group problem fact hand high school night
white body turn face
"""
WORDS = COMMON.split()
ASKS = "Explain Describe Summarise Compare List Rewrite Translate Continue Classify Answer"
TASKS = ASKS.split()
PROMPT = "### Instruction:\n{instruction}\n\n{input}### Response:\n"


def sentence(draw: random.Random, words: int) -> str:
    """English words in no order, with a full stop about every twelve."""
    drawn = [draw.choice(WORDS) + ("." if draw.random() < 1 / 12 else "") for _ in range(words)]
    return " ".join(drawn).capitalize() + "."


ASKED_TOKENS = (1, 3, 6, 11, 19, 37, 80)
ANSWER_TOKENS = (2, 7, 23, 97, 247, 388, 508)
"""Tokens of the instructions and answers of 500 rows in Alpaca's form, by SmolLM2's tokenizer, at these quantiles; the
words around an instruction, 15 tokens, left out."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def words(draw: random.Random, tokens: Sequence[int]) -> int:
    """The words of a text whose length in tokens has those quantiles; a word is 1.14 tokens."""
    u = draw.uniform(0, QUANTILES[-1])
    n = next(n for n, (_, b) in enumerate(pairwise(QUANTILES)) if u <= b)
    share = (u - QUANTILES[n]) / (QUANTILES[n + 1] - QUANTILES[n])
    return max(1, round((tokens[n] + share * (tokens[n + 1] - tokens[n])) / 1.14))


def short_rows(count: int, *, scale: float = 1.0) -> list[Record]:
    """Instructions and answers with the lengths of real ones, at `scale` 1."""
    draw = random.Random(f"rows {SEED}")
    rows = []
    for _ in range(count):
        asked = f"{draw.choice(TASKS)} {sentence(draw, round(words(draw, ASKED_TOKENS) * scale)).lower()}"
        answer = sentence(draw, round(words(draw, ANSWER_TOKENS) * scale))
        rows.append(completion_row({"instruction": asked, "output": answer}))
    return rows


def full_rows(count: int, *, tokens: int) -> list[Record]:
    """Rows of exactly `tokens` tokens for a tokenizer with a token for each byte: nothing to pad, nothing to pack."""
    draw = random.Random(f"full rows {SEED}")
    rows = []
    for _ in range(count):
        text = sentence(draw, tokens)[: tokens - 1]  # words are longer than one byte; the last token ends the row
        rows.append({"prompt": text[: tokens // 10], "completion": text[tokens // 10 :]})
    return rows


def completion_row(raw: Mapping[str, Any]) -> Record:
    """{prompt, completion} of a row in Alpaca's columns or already so. Raises DataError for any other."""
    if isinstance(raw.get("prompt"), str) and isinstance(raw.get("completion"), str):
        return {"prompt": raw["prompt"], "completion": raw["completion"]}
    if isinstance(raw.get("instruction"), str) and isinstance(raw.get("output"), str):
        context = f"### Input:\n{raw['input']}\n\n" if raw.get("input") else ""
        return {"prompt": PROMPT.format(instruction=raw["instruction"], input=context), "completion": raw["output"]}
    raise DataError(
        f"a row has the columns {', '.join(sorted(raw)) or 'none'}",
        "Give rows of instruction, input and output, or of prompt and completion, as texts.",
    )


def read_rows(path: Path) -> list[Record]:
    """The rows of a .json or .jsonl file."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", "--rows takes a .json list or a .jsonl file.") from error
    if not rows:
        raise DataError(f"{path} has no rows", "Name another file.")
    return list(rows)


# ── arithmetic ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shape:
    """A decoder as far as its operations are counted."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """None where the layers are not the plain seven matrices (experts, other names): then nothing is counted."""
        needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        if any(key not in config for key in needed) or any("expert" in key for key in config):
            return None
        hidden, layers, heads, intermediate, vocabulary = (int(config[key]) for key in needed)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        return cls(hidden, layers, heads, kv_heads, head_dim, intermediate, vocabulary)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the matrices of one layer: q, k, v, o, gate, up, down."""
        d, q, kv, i = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        return [(d, q), (d, kv), (d, kv), (q, d), (d, i), (d, i), (i, d)]

    @property
    def linear_weights(self) -> int:
        return self.layers * sum(a * b for a, b in self.linears)

    def lora_weights(self, r: int) -> int:
        return self.layers * sum(r * (a + b) for a, b in self.linears)


def sft_flops(shape: Shape, lengths: Sequence[int], trained: int) -> dict[str, float]:
    """Floating-point operations that one LoRA step needs, whatever else a program computes (pads, recomputation).

    A product with a weight is 2 operations a token. Frozen: forward and the gradient of its input. Adapters: those and
    the gradient of the weight. Attention: scores and values of the tokens before, backward twice the forward. Head:
    logits of the supervised positions, and the gradient of their states.
    """
    tokens, pairs = sum(lengths), sum(n * (n + 1) / 2 for n in lengths)
    return {
        "linear": 4.0 * shape.linear_weights * tokens,
        "lora": 6.0 * shape.lora_weights(LORA["r"]) * tokens,
        "attention": 3 * 4.0 * shape.heads * shape.head_dim * pairs * shape.layers,
        "head": 4.0 * shape.vocabulary * shape.hidden * trained,
    }


# ── the sets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Set:
    """One method as it is compared: its rows, the trainer of TRL that does the same, and how its work is counted."""

    method: Record
    """Of the recipe."""
    synthetic: Callable[..., list[Record]]
    row: Callable[[Mapping[str, Any]], Record]
    """A row of --rows in the shape that both sides take."""
    trainer: Callable[[Settings, list[Any]], Any]
    """TRL's trainer, ready to train, with some callbacks."""
    held: Callable[[Mapping[str, Any]], tuple[list[int], int]]
    """(lengths of the rows, supervised tokens) of a batch of TRL's."""
    flops: Callable[[Shape, Sequence[int], int], dict[str, float]] | None
    """None where the work is not counted."""
    sequences: int = 1
    """Sequences that TRL makes of a row."""
    warm: bool = False
    """Ours has run on these rows before: what it keeps on disk is there."""


def arguments(settings: Settings) -> Record:
    """Arguments that every trainer of TRL shares; those of ours are in `recipe`."""
    cpu = settings.device == "cpu"
    return {
        "output_dir": f"{settings.folder}/trl", "max_steps": settings.steps, "seed": SEED,
        "per_device_train_batch_size": settings.batch, "gradient_accumulation_steps": 1,
        "max_length": settings.max_length, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
        "warmup_steps": 0, "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "weight_decay": 0.0,
        "bf16": settings.precision == "bf16", "fp16": False, "use_cpu": cpu, "dataloader_pin_memory": not cpu,
        "gradient_checkpointing": settings.gradient_checkpointing, "train_sampling_strategy": "sequential",
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        **({} if settings.random_weights else {"model_init_kwargs": {"dtype": settings.dtype}}),
    }  # fmt: skip


def sft_trainer(settings: Settings, callbacks: list[Any]) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    attention = "flash_attention_2" if settings.device == "cuda" and find_spec("flash_attn") else "sdpa"
    return watched(SFTTrainer)(
        model=random_model(settings, attention=attention) if settings.random_weights else settings.model,
        args=SFTConfig(**arguments(settings), packing=settings.packing),
        train_dataset=Dataset.from_list(read_rows(Path(settings.rows))),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        processing_class=tokenizer_of(settings) if settings.random_weights else None,
        callbacks=callbacks,
    )


def sft_held(inputs: Mapping[str, Any]) -> tuple[list[int], int]:
    """The first token of a row is nobody's target; without an attention mask rows lie end to end."""
    labels = inputs["labels"]
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum(1).tolist(), int((labels[:, 1:] != -100).sum())
    starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
    lengths = [b - a for a, b in pairwise([*starts, labels.shape[1]])]
    return lengths, int((labels[0] != -100).sum()) - int((labels[0][starts] != -100).sum())


# ── pairs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


PAIR_ANSWER_TOKENS = (1, 22, 120, 320, 451, 641, 909)
"""Tokens of the 300 answers of 150 real pairs of conversations, by SmolLM2's tokenizer, at `QUANTILES`."""
WHOLE = 890
"""Words of a prompt with an answer that are fewer than 1024 tokens."""


def chat_pairs(count: int, *, scale: float = 1.0) -> list[Record]:
    """Questions of 60 to 600 words with two answers, as texts, the answers as long as real ones are. Pairs that nobody
    need cut: of a longer one TRL's reward trainer learns nothing, and ours what is left of it."""
    draw = random.Random(f"pairs {SEED}")
    rows: list[Record] = []
    while len(rows) < count:
        asked = f"### Instruction:\n{sentence(draw, round(draw.randint(60, 600) * scale))}\n\n### Response:\n"
        lengths = [max(2, round(words(draw, PAIR_ANSWER_TOKENS) * scale)) for _ in range(2)]
        chosen, rejected = (sentence(draw, length) for length in lengths)
        if len(asked.split()) + max(lengths) <= WHOLE:
            rows.append({"prompt": asked, "chosen": chosen, "rejected": rejected})
    return rows


def pair_row(raw: Mapping[str, Any]) -> Record:
    """{prompt, chosen, rejected} as texts, of a row already so or of a conversation with two answers. Raises DataError
    for any other."""
    if all(isinstance(raw.get(key), str) for key in ("prompt", "chosen", "rejected")):
        return {key: raw[key] for key in ("prompt", "chosen", "rejected")}
    turns, answers = raw.get("conversations"), [raw.get("chosen"), raw.get("rejected")]
    if isinstance(turns, list) and all(isinstance(answer, dict) and "value" in answer for answer in answers):
        asked = "".join(f"### {turn['from']}:\n{turn['value']}\n\n" for turn in turns) + "### gpt:\n"
        return {"prompt": asked, "chosen": answers[0]["value"], "rejected": answers[1]["value"]}
    raise DataError(
        f"a row has the columns {', '.join(sorted(raw)) or 'none'}",
        "Give rows of prompt, chosen and rejected as texts, or of conversations with two answers.",
    )


def pair_trainer(settings: Settings, callbacks: list[Any], kind: str) -> Any:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer, config = {
        "dpo": (DPOTrainer, DPOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
        "reward": (RewardTrainer, RewardConfig),
    }[kind]
    told = arguments(settings)
    model: Any = settings.model
    if kind == "orpo":  # an older trainer, which does not load a model in a given format
        told.pop("model_init_kwargs", None)
        model = model if settings.random_weights else stock_model(settings)
    if settings.random_weights:
        model = random_model(settings, attention="sdpa", labels=1 if kind == "reward" else None)
    return watched(trainer)(
        model=model,
        args=config(**told),
        train_dataset=Dataset.from_list(read_rows(Path(settings.rows))),
        peft_config=LoraConfig(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM", **LORA),
        processing_class=tokenizer_of(settings),
        callbacks=callbacks,
    )


def stock_model(settings: Settings) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(settings.model, dtype=getattr(torch, settings.dtype))


def pair_held(inputs: Mapping[str, Any]) -> tuple[list[int], int]:
    """Lengths of both sequences of each pair, and the tokens of their answers (of a reward pair, two)."""
    if "input_ids" not in inputs:  # ORPO's batch has its sides apart
        masks = [inputs[f"{side}_attention_mask"] for side in ("chosen", "rejected")]
        trained = sum(int((inputs[f"{side}_labels"] != -100).sum()) for side in ("chosen", "rejected"))
        return [n for mask in masks for n in mask.sum(1).tolist()], trained
    lengths = inputs["attention_mask"].sum(1).tolist()
    answers = inputs.get("completion_mask")
    return lengths, len(lengths) if answers is None else int(answers.sum())


def pair_set(kind: str, **knobs: Any) -> Set:
    return Set(
        {"name": kind, **knobs}, chat_pairs, pair_row, partial(pair_trainer, kind=kind), pair_held, None, sequences=2
    )


SETS = {
    "sft": Set({"name": "sft"}, short_rows, completion_row, sft_trainer, sft_held, sft_flops),
    "dpo": pair_set("dpo", precompute_ref_log_probs=False),  # the reference pass inside the step, as TRL has it
    "dpo-warm": replace(pair_set("dpo", precompute_ref_log_probs=True), warm=True),
    "orpo": pair_set("orpo"),
    "reward": pair_set("reward"),
}


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Pipe:
    """The worker's end: reports go to the real stdout, whatever libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def report(self, record: Mapping[str, Any]) -> None:
        print(json.dumps(record), file=self._out, flush=True)

    def turn(self, record: Mapping[str, Any], *, expect: int) -> None:
        """Report, then wait for `step <expect>`."""
        self.report(record)
        line = sys.stdin.readline()
        if not line:  # the parent is gone
            sys.exit(1)
        assert line.split() == ["step", str(expect)], line


def resident_gib() -> float:
    """Peak resident set of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def memory(settings: Settings) -> Record:
    """Peaks so far, GiB; what is compared is `peak_gib`: resident set on CPU, tensors on CUDA."""
    import torch

    if settings.device == "cuda":
        return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "resident_gib": resident_gib()}
    return {"peak_gib": resident_gib()}


def clock(settings: Settings) -> float:
    if settings.device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def ready(settings: Settings) -> Record:
    import torch

    return {"threads": torch.get_num_threads(), **memory(settings)}


def ours(settings: Settings, pipe: Pipe) -> None:
    """The pieces of a run, as `finetune_cli/worker.py` puts them together."""
    from finetune_cli import commands
    from finetune_cli.data.batches import counts_of
    from finetune_cli.data.rows import load_rows
    from finetune_cli.engine import finish, loop, models, prepare  # noqa: F401  finish: a run imports it too

    if settings.random_weights:
        models.load_stock = lambda plan, *_: random_model(
            settings, attention="sdpa", labels=plan.recipe.method.labels()
        )
    plan, _, _ = commands.planned(recipe(settings), ())
    plan.run.mkdir(parents=True, exist_ok=True)
    words = prepare.bind(plan.recipe, plan.facts)
    job, _ = prepare.build(plan, words, load_rows(plan.recipe, words.chat), lambda _: None, resume=None)
    job.policy.train()
    record = {**ready(settings), "padded_because": job.padded_because, "attention": plan.resolved.attn_implementation}
    for step in range(settings.steps):
        pipe.turn(record, expect=step)
        sums = loop.Sums()
        started = clock(settings)
        loop.optimiser_step(job, step, measure=settings.measure, sums=sums)
        seconds = clock(settings) - started
        rows = job.rows_of(job.schedule.step(step))
        lengths = [len(row.prefix) + len(branch.ids) for row in rows for branch in row.branches]
        held = lengths, counts_of(rows).tokens
        record = done(settings, seconds, sums.means(job)["loss"], held)
    pipe.report(record)


def recipe(settings: Settings) -> Path:
    """A recipe with everything that `arguments` tells TRL."""
    told = {
        "method": {**SETS[settings.set].method, **({"packing": True} if settings.packing else {})},
        "model": {"name_or_path": settings.model, "dtype": settings.dtype},
        "output_dir": f"{settings.folder}/ours",
        "seed": SEED,
        "lora": LORA,
        "data": {
            "train": settings.rows, "max_length": settings.max_length, "overlength": "truncate", "shuffle": False,
        },
        "train": {
            "max_steps": settings.steps, "per_device_train_batch_size": settings.batch, "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused", "max_grad_norm": 1.0,
            "precision": settings.precision, "gradient_checkpointing": settings.gradient_checkpointing,
        },
        "eval": {"eval_strategy": "no", "sample_prompts": 0},
        "logging": {"report_to": "none"},
    }  # fmt: skip
    path = Path(settings.folder) / "recipe.yaml"
    path.write_text(json.dumps(told, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def done(settings: Settings, seconds: float, loss: float, held: tuple[list[int], int]) -> Record:
    """The report of one step."""
    lengths, trained = held
    counted = {
        "rows": len(lengths) // SETS[settings.set].sequences,
        "tokens": sum(lengths),
        "trained_tokens": trained,
        "lengths": sorted(lengths),
    }
    return {"seconds": seconds, "loss": loss, **counted, **memory(settings)}


def trl(settings: Settings, pipe: Pipe) -> None:
    """TRL's own `train()`; a callback waits at the beginning of each step and reads the clock at its end."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """The next batch is fetched before a step is reported, so that no work is left while the other side runs."""

        record: Record = {}
        started = 0.0
        trainer: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            pipe.turn(self.record or ready(settings), expect=state.global_step)
            self.started = clock(settings)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            seconds = clock(settings) - self.started
            held = SETS[settings.set].held(self.trainer.seen)
            self.record = done(settings, seconds, float(self.trainer.loss), held)

    turns = Turns()
    turns.trainer = SETS[settings.set].trainer(settings, [turns])
    turns.trainer.train()
    pipe.report(turns.record)


def watched(kind: Any) -> Any:
    """The same trainer, which keeps its last batch and loss to be looked at after the clock has stopped."""

    class Watched(kind):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            self.seen = inputs
            self.loss = super().training_step(model, inputs, num_items_in_batch)
            return self.loss

    return Watched


def random_model(settings: Settings, *, attention: str, labels: int | None = None) -> Any:
    """The same random weights on both sides, drawn where they are used."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(settings.model)
    config.use_cache = False
    torch.manual_seed(SEED)
    with torch.device(settings.device):
        dtype = getattr(torch, settings.dtype)
        if labels is None:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        config.num_labels, config.pad_token_id = labels, 0
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype, attn_implementation=attention)


def tokenizer_of(settings: Settings) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(settings.model)


def rate(settings: Settings, pipe: Pipe) -> None:
    """GFLOP/s of `linear(x, w)` at the model's own shapes and at large square ones, in both precisions."""
    import torch

    shape = Shape.of(config_of(settings.model))
    d, i = (shape.hidden, shape.intermediate) if shape else (576, 1536)
    sizes = [(2048, d, i), (2048, i, d), (2048, 2048, 2048)]
    sizes += [(8192, 8192, 8192)] if settings.device == "cuda" else []
    pipe.report({
        name: {f"{m}x{k}x{n}": gemm(m, k, n, dtype=getattr(torch, dtype), device=settings.device) for m, k, n in sizes}
        for name, dtype in (("bf16", "bfloat16"), ("fp32", "float32"))
    })  # fmt: skip


def gemm(m: int, k: int, n: int, *, dtype: Any, device: str) -> float:
    """GFLOP/s of [m, k] x [k, n], median of half a second."""
    import torch
    from torch.utils.benchmark import Timer

    x, w = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
    timer = Timer("linear(x, w)", globals={"linear": torch.nn.functional.linear, "x": x, "w": w},
                  num_threads=torch.get_num_threads())  # fmt: skip
    timer.timeit(2)
    return float(2e-9 * m * k * n / timer.blocked_autorange(min_run_time=0.5).median)


def locate(settings: Settings, pipe: Pipe) -> None:
    """The folder of a builtin model; in a worker because a first conversion imports torch."""
    from finetune_cli.data import builtin

    pipe.report({"folder": str(builtin.resolve(settings.model, announce=lambda line: print(line, file=sys.stderr)))})


WORKERS: dict[str, Callable[[Settings, Pipe], None]] = {"ours": ours, "trl": trl, "rate": rate, "locate": locate}


# ── the parent ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Worker:
    """The parent's end of one process. What the process prints is kept for the case that it fails."""

    def __init__(
        self, name: str, settings: Any, *, work: Path, env: Mapping[str, str], script: Path = Path(__file__)
    ) -> None:
        """`settings`: a dataclass that `script --worker name` reads."""
        self.name = name
        self._log = work / f"{name}.log"
        told = work / f"{name}.json"
        told.write_text(json.dumps(asdict(settings)), encoding="utf-8")
        argv = [sys.executable, str(script.resolve()), "--worker", name, str(told)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env={**env}, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """A worker that has nothing left to do ends by itself; any other is ended."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def report(self) -> Record:
        """The next report. Raises TrainError where the process ended instead."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            last = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise TrainError(f"the worker {self.name!r} ended with exit code {code}; its last words:\n{last}")
        report: Record = json.loads(line)
        return report

    def step(self, number: int) -> Record:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: report() says so
            self._process.stdin.write(f"step {number}\n")
            self._process.stdin.flush()
        return self.report()


def environment(device: str, work: Path) -> dict[str, str]:
    """Both sides see the same: no network, caches of their own, and one device."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] if device == "cuda" else ""
    own = {"FINETUNE_CACHE": f"{work}/finetune", "HF_DATASETS_CACHE": f"{work}/datasets", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **own, "CUDA_VISIBLE_DEVICES": visible, "TOKENIZERS_PARALLELISM": "false"}


def order(number: int) -> tuple[str, ...]:
    """Who goes first changes each round."""
    return SIDES if number % 2 == 0 else SIDES[::-1]


def compare(settings: Settings, *, work: Path, say: Callable[[str], None] = print) -> tuple[Record, list[Record]]:
    """(what each side said when it was ready, all rounds, those of the warm-up marked)."""
    env = environment(settings.device, work)
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        started: Record = {}
        if SETS[settings.set].warm:
            with Worker("ours", settings, work=work, env=env) as before:
                started["first"] = timed(before.report)
                say(f"ours has run before, {started['first']['seconds']:.1f} s")
        for side in SIDES:  # one after the other, so that neither is loaded under the other's load
            workers[side] = stack.enter_context(Worker(side, settings, work=work, env=env))
            started[side] = timed(workers[side].report)
            say(f"{side} is ready, {started[side]['peak_gib']:.2f} GiB, {started[side]['seconds']:.1f} s")
        rounds = []
        for number in range(settings.steps):
            reports = {side: workers[side].step(number) for side in order(number)}
            rounds.append({"round": number, "warm_up": number < WARM_UP, "first": order(number)[0], **reports})
            say(round_line(rounds[-1]))
    return started, rounds


def timed(report: Callable[[], Record]) -> Record:
    started = time.perf_counter()
    found = report()
    return {**found, "seconds": time.perf_counter() - started}


def whole_run(started: Mapping[str, Record], rounds: Sequence[Record]) -> Record:
    """Seconds from the start of each process to the end of its last step, waiting left out."""
    seconds = {side: started[side]["seconds"] + sum(found[side]["seconds"] for found in rounds) for side in SIDES}
    return {**seconds, "ratio": seconds["trl"] / seconds["ours"], "steps": len(rounds)}


def round_line(found: Record) -> str:
    mine, theirs = found["ours"], found["trl"]
    return (
        f"round {found['round']}{' (warm-up)' if found['warm_up'] else ''}: ours {mine['seconds']:.3f} s, TRL "
        f"{theirs['seconds']:.3f} s; loss {mine['loss']:.4f}, {theirs['loss']:.4f}; {mine['tokens']} tokens"
    )


def measured_rates(settings: Settings, *, work: Path) -> Record:
    with Worker("rate", settings, work=work, env=environment(settings.device, work)) as worker:
        return worker.report()


def summary(rounds: Iterable[Record], rates: Sequence[Record], settings: Settings, shape: Shape | None) -> Record:
    """Medians over the counted rounds. The rate is the best that was measured: the share errs downwards."""
    counted = [found for found in rounds if not found["warm_up"]]
    ratios = [found["trl"]["seconds"] / found["ours"]["seconds"] for found in counted]
    peaks = {side: max(found[side]["peak_gib"] for found in counted) for side in SIDES}
    differences = [abs(found["ours"]["loss"] / found["trl"]["loss"] - 1) for found in counted]
    same = ("tokens", "trained_tokens", "lengths")
    best = max(value for measured in rates for value in measured[settings.precision].values())
    return {
        "ratio": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        **{side: side_summary(counted, side, settings, shape, best) for side in SIDES},
        "peak_ratio": peaks["trl"] / peaks["ours"],
        "same_tokens": all(found["ours"][key] == found["trl"][key] for found in counted for key in same),
        "loss_difference": max(differences),
        "gflops_matrix": best,
    }


def side_summary(counted: list[Record], side: str, settings: Settings, shape: Shape | None, best: float) -> Record:
    own = [found[side] for found in counted]
    seconds = [step["seconds"] for step in own]
    told: Record = {
        "seconds": median(seconds),
        "rows_per_second": median(step["rows"] / step["seconds"] for step in own),
        "tokens_per_second": median(step["tokens"] / step["seconds"] for step in own),
        "peak_gib": max(step["peak_gib"] for step in own),
    }
    count = SETS[settings.set].flops
    if shape is None or count is None:
        return told
    work = [count(shape, step["lengths"], step["trained_tokens"]) for step in own]
    gflops = median(sum(parts.values()) / s / 1e9 for parts, s in zip(work, seconds, strict=True))
    mean = {part: sum(parts[part] for parts in work) / len(work) / 1e9 for part in work[0]}
    return {**told, "gflop_of_a_step": mean, "gflops": gflops, "share_of_matrix_rate": gflops / best}


def summary_lines(found: Record) -> Iterator[str]:
    ratio = found["ratio"]
    yield f"TRL / ours, seconds of a step: {ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
    for side in SIDES:
        own = found[side]
        share = own.get("share_of_matrix_rate")
        yield (
            f"{side}: {own['seconds']:.3f} s, {own['rows_per_second']:.2f} rows/s, {own['tokens_per_second']:.0f} "
            f"tokens/s, {own['peak_gib']:.2f} GiB at the peak, "
            + ("operations not counted" if share is None else f"{share:.0%} of the matrix rate")
        )
    if "whole_run" in found:
        whole = found["whole_run"]
        yield (
            f"TRL / ours, from the start of the process: {whole['ratio']:.2f} "
            f"({whole['trl']:.0f} s to {whole['ours']:.0f} s, {whole['steps']} steps)"
        )
    yield f"TRL / ours, peak memory: {found['peak_ratio']:.2f}; matrix rate {found['gflops_matrix']:.0f} GFLOP/s"
    same = "on the same tokens" if found["same_tokens"] else "NOT ON THE SAME TOKENS: the two sides did unequal work"
    yield f"largest relative difference of the loss: {found['loss_difference']:.2%}, {same}"


# ── machine, model, files ─────────────────────────────────────────────────────────────────────────────────────────────


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def hardware(device: str) -> Record:
    """Raises MachineError where a GPU is asked for and there is none."""
    from finetune_cli.plan import machine

    found = machine.look()
    if device == "cuda" and not found.gpus:
        raise MachineError(
            "--gpu needs an NVIDIA GPU, and this machine shows none (nvidia-smi)", "Leave --gpu out to use the CPU."
        )
    name = f"gpu-{slug(found.gpus[0].name)}" if device == "cuda" else f"cpu-{slug(cpu_name())}-{found.cpus}c"
    return {"name": name, "cpu": cpu_name(), "platform": platform.platform(), **found.model_dump()}


def config_of(folder: str) -> Record:
    config: Record = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return config


def model_folder(name: str, settings: Settings, *, work: Path) -> str:
    """The folder of a model. Raises ModelError where there is none."""
    if name.startswith("builtin:"):
        with Worker("locate", settings, work=work, env=os.environ) as worker:
            return str(worker.report()["folder"])
    if not (Path(name) / "config.json").is_file():
        raise ModelError(f"{name} is no folder with a config.json", "--model takes builtin:NAME or a folder.")
    return str(Path(name).resolve())


def write_shape(folder: Path, config: Mapping[str, Any]) -> str:
    """A model folder without weights: a configuration, and a tokenizer with a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_end|>"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *specials]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    pad, eos = (tokens.index(name) for name in specials)
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": specials[0], "eos_token": specials[1]}
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {"pad_token_id": pad, "eos_token_id": eos, "bos_token_id": None}
    for name, value in {"tokenizer_config": told, "config": {**config, **ids}, "generation_config": ids}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return str(folder)


def chosen_rows(asked: argparse.Namespace, count: int) -> list[Record]:
    """`count` rows in order; a short file is read again from its beginning. To be packed: enough to fill the bins."""
    chosen = SETS[asked.set]
    if asked.rows is not None:
        return list(islice(cycle(map(chosen.row, read_rows(asked.rows))), count))
    if not asked.gpu:
        return chosen.synthetic(count)
    if not asked.packing:
        return full_rows(count, tokens=asked.max_length)
    rows = chosen.synthetic(count * asked.max_length // 40, scale=0.2)  # a row has at least 40 bytes
    filled = accumulate(len(row["prompt"]) + len(row["completion"]) for row in rows)
    enough = sum(size < 1.2 * count * asked.max_length for size in filled)
    return rows[: enough + 1]


def prepared(asked: argparse.Namespace, work: Path) -> Settings:
    """Model, rows and settings, written where the workers find them."""
    steps = WARM_UP + asked.rounds
    rows = work / "rows.jsonl"
    chosen = chosen_rows(asked, steps * asked.batch)
    rows.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    told: Record = {
        "set": asked.set, "model": asked.model, "rows": str(rows), "steps": steps, "batch": asked.batch,
        "precision": asked.precision, "max_length": asked.max_length, "device": "cuda" if asked.gpu else "cpu",
        "folder": str(work), "gradient_checkpointing": asked.gradient_checkpointing, "packing": asked.packing,
        "measure": asked.measure, "random_weights": asked.gpu,
    }  # fmt: skip
    if asked.gpu:
        return Settings(**{**told, "model": write_shape(work / "model", QWEN_7B)})
    return Settings(**{**told, "model": model_folder(asked.model, Settings(**told), work=work)})


def versions() -> Record:
    found: Record = {"python": platform.python_version()}
    for package in ("finetune-recipes", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit, marked where files differ from it; None outside a checkout."""
    git = ["git", "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return told.stdout.strip() or None


def bench(asked: argparse.Namespace, work: Path) -> Record:
    """The whole comparison; what is written to the file."""
    here = hardware("cuda" if asked.gpu else "cpu")
    load = os.getloadavg()[0]
    if load > BUSY * here["cpus"]:
        print(f"the machine is busy (load {load:.1f} on {here['cpus']} cores): its times mean little", file=sys.stderr)
    settings = prepared(asked, work)
    before = measured_rates(settings, work=work)
    started, rounds = compare(settings, work=work)
    rates = [before, measured_rates(settings, work=work)]
    shape = Shape.of(config_of(settings.model))
    name = asked.model if asked.model.startswith("builtin:") else Path(asked.model).resolve().name
    model = "random weights in the shape of Qwen2.5-7B" if asked.gpu else name
    source = "synthetic" if asked.rows is None else asked.rows.name
    paths = {"folder", "rows", "model"}
    told = {key: value for key, value in asdict(settings).items() if key not in paths}
    return {
        "hardware": here,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_before": load,
        "commit": commit(),
        "versions": versions(),
        "settings": {**told, "model": model, "rows": source, "lora": LORA, "learning_rate": LEARNING_RATE},
        "summary": {**summary(rounds, rates, settings, shape), "whole_run": whole_run(started, rounds)},
        "matrix_gflops": {"before": rates[0], "after": rates[1]},
        "ready": started,
        "rounds": rounds,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("set", choices=sorted(SETS), help="what is trained")
    made.add_argument("--gpu", action="store_true", help="a 7B shape with random weights on one GPU, rows of 2048")
    made.add_argument("--rounds", type=int, default=8, help=f"counted rounds, after {WARM_UP} of warm-up")
    made.add_argument("--model", default="builtin:smollm2-135m-instruct", help="builtin:NAME or a folder")
    made.add_argument("--rows", type=Path, help=".json or .jsonl instead of synthetic rows")
    made.add_argument("--batch", type=int, default=4, help="rows of a step")
    made.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    made.add_argument("--max-length", type=int, help="1024; 2048 with --gpu")
    made.add_argument("--packing", action="store_true", help="with --gpu: short rows, packed by each side itself")
    made.add_argument(
        "--measure", action="store_true", help="ours measures entropy and accuracy each step, as TRL does"
    )
    made.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="both sides; off, on with --gpu"
    )
    made.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the result")
    return made


def arguments_of(argv: Sequence[str]) -> argparse.Namespace:
    made = parser()
    asked = made.parse_args(argv)
    if asked.rounds < 1 or asked.batch < 1:
        made.error("--rounds and --batch are at least 1")
    if asked.packing and not asked.gpu:
        made.error("--packing goes with --gpu")
    if asked.gpu and asked.rows is not None:
        made.error("--rows has no meaning for the tokenizer of --gpu, which has a token for each byte")
    if asked.max_length is None:
        asked.max_length = 2048 if asked.gpu else 1024
    if asked.gradient_checkpointing is None:
        asked.gradient_checkpointing = asked.gpu
    return asked


def work_as(name: str, told: Path) -> int:
    pipe = Pipe()
    WORKERS[name](Settings(**json.loads(told.read_text(encoding="utf-8"))), pipe)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--worker"]:
        return work_as(argv[1], Path(argv[2]))
    asked = arguments_of(argv)
    try:
        with TemporaryDirectory(prefix="finetune-bench-") as work:
            found = bench(asked, Path(work))
    except FinetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for line in summary_lines(found["summary"]):
        print(line)
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"{asked.set}-{found['hardware']['name']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
