"""Times a step of PPO, ours beside the last TRL that has it (1.12.0), on the same prompts, in turns.

    pip install --no-deps --target FOLDER trl==1.12.0
    python scripts/bench_ppo.py --trl FOLDER

Each side is a process of its own that stays; only TRL's sees FOLDER. A step is all that PPO does with one batch of
prompts: answers drawn, scored by four models, and learned from in four passes. What is compared: benchmarks/README.md.
"""

import argparse
import gc
import json
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import bench
from bench import LORA, ROOT, SEED, SIDES, Pipe, Record, Worker, clock, memory, ready

from finetune_cli.errors import FinetuneError, TrainError

WARM_UP = 1
"""Rounds that are run and not counted."""
KNOBS: Record = {
    "kl_coef": 0.05, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95,
    "num_ppo_epochs": 4, "num_mini_batches": 1, "whiten_rewards": False,
}  # fmt: skip
"""Under the same names on both sides."""
LEARNING_RATE = 1e-5
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Settings:
    """What the workers are told."""

    model: str
    """A folder."""
    rows: str
    """Prompts, a JSONL file."""
    steps: int
    batch: int
    """Prompts of a step, one answer each."""
    new_tokens: int
    """Of every answer: nothing ends one early."""
    precision: str
    folder: str
    """Where a worker may write."""
    stop_token: str
    """One that the model never says; ours must have one."""
    measure: bool = False
    """Ours also measures entropy at every update, as TRL always does."""
    device: str = "cpu"

    @property
    def dtype(self) -> str:
        return {"bf16": "bfloat16", "fp32": "float32"}[self.precision]

    @property
    def judge(self) -> str:
        """The reward model as an adapter on the same base."""
        return f"{self.folder}/judge"

    @property
    def merged(self) -> str:
        """The same as a model of its own."""
        return f"{self.folder}/merged"


PROMPT_TOKENS = (38, 40, 51, 65, 93, 112, 117)
"""Tokens of the prompts of 59 conversations of up to 128, in the chat format of SmolLM2, at `bench.QUANTILES`."""


def prompts(count: int, *, scale: float = 1.0) -> list[Record]:
    """Texts with the lengths of real prompts, at `scale` 1."""
    draw = random.Random(f"prompts {SEED}")
    return [{"prompt": bench.sentence(draw, round(bench.words(draw, PROMPT_TOKENS) * scale))} for _ in range(count)]


def prompt_row(raw: Record) -> Record:
    """{prompt} of a row that has one as a text, or is in Alpaca's columns. Raises DataError for any other."""
    return {"prompt": raw["prompt"] if isinstance(raw.get("prompt"), str) else bench.completion_row(raw)["prompt"]}


def read(path: Path, count: int) -> list[Record]:
    """`count` prompts of a file in order; a short one is read again from its beginning."""
    return list(islice(cycle(map(prompt_row, bench.read_rows(path))), count))


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def make(settings: Settings, pipe: Pipe) -> None:
    """A reward model that nobody trained: an adapter that changes the base, a head, and both merged for TRL."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(SEED)
    tokenizer = bench.tokenizer_of(settings)  # type: ignore[arg-type]  # it asks for the folder alone
    dtype = getattr(torch, settings.dtype)
    base = AutoModelForSequenceClassification.from_pretrained(settings.model, num_labels=1, dtype=dtype)
    base.config.pad_token_id = tokenizer.pad_token_id
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **LORA))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=1e-3)
    model.save_pretrained(settings.judge)
    model.merge_and_unload().save_pretrained(settings.merged)
    for folder in (settings.judge, settings.merged):
        tokenizer.save_pretrained(folder)
    pipe.report({"rewards": "made"})


def ours(settings: Settings, pipe: Pipe) -> None:
    """The pieces of a run, as `finetune_cli/worker.py` puts them together."""
    from finetune_cli import commands
    from finetune_cli.data.rows import load_rows
    from finetune_cli.engine import finish, loop, prepare  # noqa: F401  finish: a run imports it too

    plan, _, _ = commands.planned(recipe(settings), ())
    plan.run.mkdir(parents=True)
    words = prepare.bind(plan.recipe, plan.facts)
    said: list[Record] = []
    job, _ = prepare.build(plan, words, load_rows(plan.recipe, words.chat), said.append, resume=None)
    job.policy.train()
    assert job.experience is not None
    record = {**ready(settings), "judges_on_the_base": list(job.experience.actor.score_heads)}  # type: ignore[arg-type]
    for step in range(settings.steps):
        pipe.turn(record, expect=step)
        sums = loop.Sums()
        started = clock(settings)  # type: ignore[arg-type]
        loop.optimiser_step(job, step, measure=settings.measure, sums=sums)
        seconds = clock(settings) - started  # type: ignore[arg-type]
        means = sums.means(job)
        rows = job.rows_of(job.schedule.step(step))
        record = done(settings, seconds, sum(len(row.prefix) for row in rows), means)
        record |= {"answer_tokens": round(means["completions/mean_length"] * settings.batch)}
        record |= {"health": [event["message"] for event in said if event["event"] == "health"]}
    pipe.report(record)
    sys.stdin.readline()  # as TRL's process does


def done(settings: Settings, seconds: float, prompt_tokens: int, numbers: Mapping[str, float]) -> Record:
    """The report of one step."""
    kept = ("objective/scores", "objective/kl", "policy/approxkl_avg", "loss/policy_avg", "loss/value_avg")
    return {
        "seconds": seconds, "episodes": settings.batch, "prompt_tokens": prompt_tokens,
        **{name: float(numbers[name]) for name in kept}, **memory(settings),  # type: ignore[arg-type]
    }  # fmt: skip


def recipe(settings: Settings) -> Path:
    """A recipe with everything that `trl` tells TRL."""
    told = {
        "method": {"name": "ppo", "reward": settings.judge, "stop_token": settings.stop_token, **KNOBS},
        "model": {"name_or_path": settings.model, "dtype": settings.dtype},
        "output_dir": f"{settings.folder}/ours",
        "seed": SEED,
        "lora": LORA,
        "data": {"train": settings.rows, "max_length": 1024, "shuffle": False},
        "train": {
            "max_steps": settings.steps, "per_device_train_batch_size": settings.batch,
            "global_batch_size": settings.batch, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
            "warmup_steps": 0, "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "precision": settings.precision,
            "gradient_checkpointing": False,
        },
        "generation": {"max_new_tokens": settings.new_tokens, "temperature": TEMPERATURE},
        "eval": {"eval_strategy": "no", "sample_prompts": 0},
        "logging": {"report_to": "none"},
    }  # fmt: skip
    path = Path(settings.folder) / "recipe.yaml"
    path.write_text(json.dumps(told, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def trl(settings: Settings, pipe: Pipe) -> None:
    """TRL's own `train()`; a callback waits before the first step and after each."""
    import torch
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        """TRL calls nothing at the beginning of a step; it begins where the one before has ended."""

        started = 0.0
        logged: Record = {}
        record: Record = {}

        def wait(self, record: Record, step: int) -> None:
            pipe.turn(record, expect=step)
            self.started = clock(settings)  # type: ignore[arg-type]

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.wait(ready(settings), 0)  # type: ignore[arg-type]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
            self.logged = dict(logs)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            seconds = clock(settings) - self.started  # type: ignore[arg-type]
            made = self.trainer.drawn
            record = done(settings, seconds, int(made["attention_mask"].sum()), self.logged)
            record |= {"answer_tokens": settings.batch * settings.new_tokens}  # it stops for nothing
            self.record = record
            if state.global_step < settings.steps:
                self.wait(record, state.global_step)

        trainer: Any = None

    torch.manual_seed(SEED)
    turns = Turns()
    turns.trainer = trainer(settings, turns)
    gc.collect()
    turns.trainer.train()
    pipe.report(turns.record)
    sys.stdin.readline()  # what ends with this process would run beside the other side's last step


def trainer(settings: Settings, callback: Any) -> Any:
    """As TRL's example has it: adapters on the policy, whose reference is the policy without them; value and reward
    models of their own, the first trained whole."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class InOrder(PPOTrainer):  # type: ignore[misc]
        """Prompts in the order of the file, and the last batch kept to be counted."""

        def see(self, batch: Any) -> Any:
            self.drawn = batch
            return batch

    dtype = getattr(torch, settings.dtype)
    tokenizer = bench.tokenizer_of(settings)  # type: ignore[arg-type]
    tokenizer.padding_side = "left"
    rows = bench.read_rows(Path(settings.rows))
    ids = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in rows]
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(settings.merged, num_labels=1, dtype=kind)
        for kind in (torch.float32, dtype)  # as ours: what is trained in float32, what is frozen in the precision
    )
    made = InOrder(
        args=PPOConfig(
            output_dir=f"{settings.folder}/trl", total_episodes=settings.steps * settings.batch, seed=SEED,
            per_device_train_batch_size=settings.batch, gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=settings.batch, response_length=settings.new_tokens, stop_token=None,
            temperature=TEMPERATURE, num_sample_generations=0, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0, weight_decay=0.0,
            bf16=settings.precision == "bf16", use_cpu=True, gradient_checkpointing=False, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False, kl_estimator="k1",
            **KNOBS,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype),
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_list(ids),
        eval_dataset=Dataset.from_list(ids[: settings.batch]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[callback],
    )  # fmt: skip
    collate = made.data_collator
    made.dataloader = DataLoader(
        made.train_dataset, batch_size=settings.batch, collate_fn=lambda some: made.see(collate(some))
    )
    return made


WORKERS: dict[str, Callable[[Any, Pipe], None]] = {"make": make, "ours": ours, "trl": trl, "locate": bench.locate}


# ── the parent ────────────────────────────────────────────────────────────────────────────────────────────────────────


def environments(work: Path, trl_folder: Path | None) -> dict[str, dict[str, str]]:
    """The older TRL is seen by its own worker alone."""
    plain = bench.environment("cpu", work)
    if trl_folder is None:
        return dict.fromkeys(("make", *SIDES), plain)
    path = os.pathsep.join(filter(None, (str(trl_folder.resolve()), os.environ.get("PYTHONPATH"))))
    return {"make": plain, "ours": plain, "trl": {**plain, "PYTHONPATH": path}}


def compare(
    settings: Settings, *, work: Path, trl_folder: Path | None, say: Callable[[str], None] = print
) -> tuple[Record, list[Record]]:
    """(what each side said when it was ready, all rounds, those of the warm-up marked)."""
    env, script = environments(work, trl_folder), Path(__file__)
    with Worker("make", settings, work=work, env=env["make"], script=script) as maker:
        maker.report()
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        started: Record = {}
        for side in SIDES:
            workers[side] = stack.enter_context(Worker(side, settings, work=work, env=env[side], script=script))
            started[side] = workers[side].report()
            say(f"{side} is ready, {started[side]['peak_gib']:.2f} GiB")
        rounds = []
        for number in range(settings.steps):
            order = bench.order(number)
            reports = {side: workers[side].step(number) for side in order}
            rounds.append({"round": number, "warm_up": number < WARM_UP, "first": order[0], **reports})
            say(f"round {number}: " + ", ".join(f"{side} {reports[side]['seconds']:.2f} s" for side in SIDES))
    return started, rounds


def summary(rounds: Sequence[Record]) -> Record:
    """Medians over the counted rounds."""
    counted = [found for found in rounds if not found["warm_up"]]
    ratios = [found["trl"]["seconds"] / found["ours"]["seconds"] for found in counted]
    sides = {
        side: {
            "seconds": median(found[side]["seconds"] for found in counted),
            "episodes_per_second": median(found[side]["episodes"] / found[side]["seconds"] for found in counted),
            "peak_gib": max(found[side]["peak_gib"] for found in counted),
        }
        for side in SIDES
    }
    keys = ("prompt_tokens", "answer_tokens")
    return {
        "ratio": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        **sides,
        "memory_share": sides["ours"]["peak_gib"] / sides["trl"]["peak_gib"],
        "same_tokens": all(found["ours"][key] == found["trl"][key] for found in rounds for key in keys),
    }


def summary_lines(found: Record) -> Iterator[str]:
    ratio = found["ratio"]
    yield f"TRL / ours, seconds of a step: {ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})"
    for side in SIDES:
        own = found[side]
        yield (
            f"{side}: {own['seconds']:.2f} s, {own['episodes_per_second']:.3f} episodes/s, "
            f"{own['peak_gib']:.2f} GiB at the peak"
        )
    yield f"ours / TRL, peak memory: {found['memory_share']:.2f}"
    yield "as many tokens on both sides" if found["same_tokens"] else "NOT AS MANY TOKENS: unequal work"


def measured(asked: argparse.Namespace, work: Path) -> Record:
    """The whole comparison; what is written to the file."""
    here, load = bench.hardware("cpu"), os.getloadavg()[0]
    if load > bench.BUSY * here["cpus"]:
        print(f"the machine is busy (load {load:.1f} on {here['cpus']} cores): its times mean little", file=sys.stderr)
    steps, rows = WARM_UP + asked.rounds, work / "prompts.jsonl"
    found = prompts(steps * asked.batch) if asked.rows is None else read(asked.rows, steps * asked.batch)
    rows.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    told: Record = {
        "rows": str(rows), "steps": steps, "batch": asked.batch, "new_tokens": asked.new_tokens, "precision": "bf16",
        "folder": str(work), "stop_token": asked.stop_token, "measure": asked.measure,
    }  # fmt: skip
    settings = Settings(model=model_folder(asked.model, told, work), **told)
    started, rounds = compare(settings, work=work, trl_folder=asked.trl)
    kept = {key: value for key, value in asdict(settings).items() if key not in ("folder", "rows", "model")}
    return {
        "hardware": here,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_before": load,
        "commit": bench.commit(),
        "versions": {**bench.versions(), "trl": version_in(asked.trl)},
        "settings": {
            **kept, "model": asked.model, "rows": "synthetic" if asked.rows is None else asked.rows.name, "lora": LORA,
            "learning_rate": LEARNING_RATE, "ppo": KNOBS,
        },
        "summary": summary(rounds),
        "ready": started,
        "rounds": rounds,
    }  # fmt: skip


def model_folder(name: str, told: Record, work: Path) -> str:
    """The folder of a model. Raises ModelError where there is none."""
    settings: Any = Settings(model=name, **told)
    if not name.startswith("builtin:"):
        return bench.model_folder(name, settings, work=work)
    with Worker("locate", settings, work=work, env=os.environ, script=Path(__file__)) as worker:
        return str(worker.report()["folder"])


def version_in(folder: Path | None) -> str | None:
    """TRL's version, of the folder where one is given."""
    if folder is None:
        return bench.versions().get("trl")
    found = sorted(folder.glob("trl-*.dist-info"))
    if not found:
        raise TrainError(f"{folder} has no trl", f"pip install --no-deps --target {folder} trl==1.12.0")
    return found[0].name.removeprefix("trl-").removesuffix(".dist-info")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--trl", type=Path, help="the folder that TRL 1.12.0 was installed to; else the installed TRL")
    made.add_argument("--rounds", type=int, default=3, help=f"counted rounds, after {WARM_UP} of warm-up")
    made.add_argument("--model", default="builtin:smollm2-135m-instruct", help="builtin:NAME or a folder")
    made.add_argument("--rows", type=Path, help=".json or .jsonl of prompts instead of synthetic ones")
    made.add_argument("--batch", type=int, default=8, help="prompts of a step")
    made.add_argument("--new-tokens", type=int, default=64, help="of each answer")
    made.add_argument("--stop-token", default="<file_sep>", help="a token that the model never says")
    made.add_argument("--measure", action="store_true", help="ours measures entropy at every update, as TRL does")
    made.add_argument("--output", type=Path, default=ROOT / "benchmarks", help="folder of the result")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--worker"]:
        WORKERS[argv[1]](Settings(**json.loads(Path(argv[2]).read_text(encoding="utf-8"))), Pipe())
        return 0
    asked = parser().parse_args(argv)
    try:
        with TemporaryDirectory(prefix="finetune-bench-") as work:
            found = measured(asked, Path(work))
    except FinetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for line in summary_lines(found["summary"]):
        print(line)
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"ppo-{found['hardware']['name']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
