"""Real short trainings in processes of their own, and ways to break them.

Processes are forked from a server that has torch imported, so that a run takes about a second. A run is the `finetune`
command as under a launcher: everything in one process. It can be told to die by SIGKILL at the n-th call, of Python or
C, that it makes in a stage: a step, an evaluation, a save, the end; or that it makes to the disk in the last two.
"""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from finetune_cli.engine import manifest
from tests.helpers import journal, model_folder, questions, said, write_recipe, write_rows

STAGES = ("step", "eval", "save", "end")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers", "peft", "accelerate", "datasets", "tests.faults.preload"])
DISK = {"open", "write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "save_file", "close"}
"""Calls before and after which the folder is another: a stage of its own, across saves and the end."""
TIMES = ("seconds", "tokens_per_second", "memory_gib")
"""Keys of metrics that no two runs share."""


@dataclass(frozen=True)
class Fault:
    """What happens at the `call`-th call within `stage`; -1 counts calls and does nothing."""

    stage: str = ""
    call: int = -1
    kind: str = "kill"
    """kill | fill (the disk, but for `room` bytes) | limit (files to `room` bytes) | storm (of signals)"""
    room: int = 0


@dataclass
class Outcome:
    """How a process ended."""

    code: int
    said: str
    calls: dict[str, int] = field(default_factory=dict)


class Caller:
    """Counts the calls of each stage in this process, and strikes at one."""

    def __init__(self, fault: Fault, run: Path) -> None:
        self.fault, self.run = fault, run
        self.stage: str | None = None
        self.calls: Counter[str] = Counter()

    def within(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, self.stage = self.stage, stage
            try:
                return function(*args, **kwargs)
            finally:
                self.stage = before

        return wrapped

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if self.stage is None:
            return
        stages = [self.stage]
        if event.startswith("c_") and getattr(argument, "__name__", "") in DISK and self.stage in ("save", "end"):
            stages.append("disk")
        for stage in stages:
            self.calls[stage] += 1
            if stage == self.fault.stage and self.calls[stage] == self.fault.call:
                self.strike()

    def strike(self) -> None:
        sys.setprofile(None)
        if self.fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fault.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.fault.room, resource.RLIM_INFINITY))
        elif self.fault.kind == "fill":
            fill(self.run.parent / "ballast", leave=self.fault.room)
        elif self.fault.kind == "storm":
            for number in [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1] * 20:
                os.kill(os.getpid(), number)


def fill(ballast: Path, *, leave: int) -> None:
    """Fill the file system of `ballast` but for about `leave` bytes."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    with ballast.open("r+b") as file:
        file.truncate(max(0, ballast.stat().st_size - leave))


def child(argv: list[str], run: str, fault: Fault, environment: dict[str, str], out: Any) -> None:
    """In the forked process: the command, with its words into the pipe `out`."""
    from finetune_cli import cli
    from finetune_cli.engine import finish, loop
    from finetune_cli.engine.job import Job

    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    os.environ.update(environment)
    caller = Caller(fault, Path(run))
    loop.forward = caller.within("step", loop.forward)  # type: ignore[assignment]
    loop.evaluate = caller.within("eval", loop.evaluate)  # type: ignore[attr-defined]
    Job.save = caller.within("save", Job.save)  # type: ignore[method-assign]
    finish.finish = caller.within("end", finish.finish)  # type: ignore[assignment]
    sys.argv = ["finetune", *argv]
    code: Any = 0
    if fault.stage:
        sys.setprofile(caller)
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.setprofile(None)
    os.write(1, f"\ncalls {json.dumps(caller.calls)}\n".encode())
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


@dataclass(frozen=True)
class Kind:
    """What a method is tried on."""

    rows: Callable[..., list[dict[str, Any]]]
    learning_rate: float
    knobs: dict[str, Any] = field(default_factory=dict)


class Training:
    """A recipe in a folder, how it ends undisturbed, and runs of it that are disturbed."""

    def __init__(self, folder: Path, method: str) -> None:
        self.folder, self.method = folder, method
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "ACCELERATE_MIXED_PRECISION": "no",  # as under `accelerate launch`: no process of its own for the worker
            "FINETUNE_CACHE": str(folder / "cache"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        model_folder(folder / "model")
        kind = KINDS.get(method, PAIRS)
        write_rows(folder / "train.jsonl", kind.rows(22))
        write_rows(folder / "eval.jsonl", kind.rows(4, first=50))
        (folder / "reward.py").write_text(REWARD)
        self.recipe = write_recipe(
            folder / "recipe.yaml",
            method={"name": method, **kind.knobs},
            model={"name_or_path": str(folder / "model")},
            data={"train": str(folder / "train.jsonl"), "eval_sets": str(folder / "eval.jsonl"), "max_length": 64},
            lora={"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            train={"max_steps": 9, "learning_rate": kind.learning_rate},
            eval={"eval_steps": 3, "sample_prompts": 1},
            save={"save_steps": 2, "save_total_limit": 2},
            logging={"logging_steps": 2, "report_to": "tensorboard"},
            ignore=[],
        )
        undisturbed = self.start("whole", fault=Fault("none")).end()
        assert undisturbed.code == 0, undisturbed.said
        self.calls = undisturbed.calls
        self.wanted = result(self.folder / "whole")

    def start(self, name: str, *options: str, fault: Fault | None = None) -> "Running":
        run = self.folder / name
        argv = ["run", str(self.recipe), "--set", f"output_dir={run}", *options]
        return Running(argv, run, fault or Fault(), self.environment)

    def checked(self, name: str) -> dict[str, Any]:
        """The result of a run that has ended, after what must hold of its folder."""
        run = self.folder / name
        assert not [p.name for p in run.iterdir() if p.name.endswith((".writing", ".removed", ".replaced", ".lock"))]
        assert all(manifest.damage(folder) is None for folder in manifest.found(run))
        return result(run)

    def ends_as_if_undisturbed(self, name: str, *, at_most: int = 3) -> Outcome:
        """Resume until it is finished: the same bits, lines and report."""
        for _ in range(at_most):
            outcome = self.start(name, "--resume").end()
            assert "Traceback" not in outcome.said, outcome.said
            if outcome.code == 0:
                break
        assert outcome.code == 0, outcome.said
        found = self.checked(name)
        assert found.keys() == self.wanted.keys()
        for key, wanted in self.wanted.items():
            assert found[key] == wanted, key
        return outcome


class Running:
    """A process that runs."""

    def __init__(self, argv: list[str], run: Path, fault: Fault, environment: dict[str, str]) -> None:
        self.out, into = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=child, args=(argv, str(run), fault, environment, into))
        self.process.start()
        into.close()

    def end(self) -> Outcome:
        """Wait for it."""
        said = b""
        while part := os.read(self.out.fileno(), 65536):
            said += part
        self.process.join(60)
        text = said.decode(errors="replace")
        calls = [line for line in text.splitlines() if line.startswith("calls {")]
        assert self.process.exitcode is not None
        return Outcome(self.process.exitcode, text, json.loads(calls[-1][6:]) if calls else {})


def pairs(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Preference rows of unequal lengths."""
    return [
        {
            "prompt": said(f"What is {i} plus one?"),
            "chosen": said(f"It is {i} and one, " + "as I said. " * (i % 3), first="assistant"),
            "rejected": said("No, " * (1 + i % 4), first="assistant"),
        }
        for i in range(first, first + count)
    ]


REWARD = """
def score(prompts, responses, rows):
    return [len(set(response)) / 10 for response in responses]
"""
PAIRS = Kind(pairs, 2e-5)
KINDS = {
    "sft": Kind(questions, 1e-4, {"neftune_noise_alpha": 5, "packing": True}),
    "ppo": Kind(
        questions, 5e-5, {"reward": "reward.py:score", "num_generations": 2, "num_ppo_epochs": 2, "num_mini_batches": 2}
    ),
}


def result(run: Path) -> dict[str, Any]:
    """What must be the same of two runs: weights bit by bit, metrics, TensorBoard's points, the report's counts."""
    report = json.loads((run / "report.json").read_text())
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in journal(run)]
    return {
        **{name: tensor.numpy().tobytes() for name, tensor in load_file(run / "adapter_model.safetensors").items()},
        "lines": [line for line in lines if line["event"] not in ("checkpoint", "health")],
        "points": sorted(points(run)),
        "report": {key: report[key] for key in ("steps", "tokens", "result", "fingerprint", "data_fingerprint")},
        "last": manifest.found(run)[-1].name,
    }


def points(run: Path) -> Iterator[tuple[str, int]]:
    """(name, step) of every scalar in TensorBoard's files, as often as it is there."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for file in (run / "tensorboard").rglob("events.out.tfevents.*"):
        for event in LegacyEventFileLoader(str(file)).Load():
            yield from ((value.tag, event.step) for value in event.summary.value)
