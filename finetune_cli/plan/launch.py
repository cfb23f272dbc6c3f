"""Starting the workers: one process directly, several through PyTorch's launcher."""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune_cli.plan.resolve import Plan


def inside(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process. WORLD_SIZE alone says nothing: plain pods of a cluster carry it."""
    return "LOCAL_RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment


def world(environment: Mapping[str, str] = os.environ) -> int:
    return int(environment.get("WORLD_SIZE", "1"))


def argv(plan: Plan, plan_file: Path, options: Sequence[str]) -> list[str]:
    """The command of the worker(s)."""
    worker = ["-m", "finetune_cli.worker", str(plan_file), *options]
    if plan.resolved.num_processes == 1:
        return [sys.executable, *worker]
    port = plan.recipe.launch.main_process_port or free_port()
    launcher = ["-m", "finetune_cli.engine.launcher", "--nproc_per_node", str(plan.resolved.num_processes)]
    return [sys.executable, *launcher, "--master_addr", "127.0.0.1", "--master_port", str(port), *worker]


def environment(plan: Plan) -> dict[str, str]:
    """The processes share the cores; the launcher's own default is one thread each."""
    threads = max(1, plan.machine.cpus // plan.resolved.num_processes)
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if plan.resolved.num_processes > 1:
        quiet["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return {**os.environ, **quiet}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
