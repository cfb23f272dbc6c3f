"""Starting the workers: one process directly, several through our launcher, on each of the machines."""

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.sections import Launch


def inside(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process. WORLD_SIZE alone says nothing: plain pods of a cluster carry it."""
    return "LOCAL_RANK" in environment or "ACCELERATE_MIXED_PRECISION" in environment


def world(environment: Mapping[str, str] = os.environ) -> int:
    return int(environment.get("WORLD_SIZE", "1"))


RANKS = ("SLURM_NODEID", "SKYPILOT_NODE_RANK", "JOB_COMPLETION_INDEX", "GROUP_RANK", "RANK")
"""Where schedulers say which machine this is: Slurm, SkyPilot, an indexed job of Kubernetes, its PyTorchJob."""
PORT = 29500


class Place(NamedTuple):
    """This machine among the machines of a run."""

    machines: int = 1
    rank: int | None = 0
    address: str | None = "127.0.0.1"
    port: int = PORT


def place(launch: Launch, environment: Mapping[str, str] = os.environ) -> Place:
    """From the recipe, and what it does not say from the environment; None for what neither does. That there are
    several machines, the recipe says: a job on one machine may run where a scheduler has several."""
    if launch.num_machines == 1:
        return Place()
    known = [environment[name] for name in RANKS if environment.get(name, "").isdecimal()]
    rank = launch.machine_rank if launch.machine_rank is not None else int(known[0]) if known else None
    nodes = environment.get("SKYPILOT_NODE_IPS", "").split()
    address = launch.main_process_ip or environment.get("MASTER_ADDR") or (nodes[0] if nodes else None)
    port = launch.main_process_port or int(environment.get("MASTER_PORT", PORT))
    return Place(launch.num_machines, rank, address, port)


def first(plan: Plan) -> bool:
    """Whether this is the machine that keeps the run folder."""
    return place(plan.recipe.launch).rank == 0


def argv(plan: Plan, plan_file: Path, options: Sequence[str]) -> list[str]:
    """The command of the worker(s) of this machine."""
    worker = ["-m", "finetune_cli.worker", str(plan_file), *options]
    if plan.resolved.num_processes == 1:
        return [sys.executable, *worker]
    at = place(plan.recipe.launch)
    port = at.port if at.machines > 1 else plan.recipe.launch.main_process_port or free_port()
    here = plan.resolved.num_processes // at.machines
    launcher = ["-m", "finetune_cli.engine.launcher", "--nproc_per_node", str(here)]
    launcher += ["--master_addr", str(at.address), "--master_port", str(port)]
    if at.machines > 1:
        launcher += ["--nnodes", str(at.machines), "--node_rank", str(at.rank)]
        launcher += ["--error_file", str(plan.run / "error.json")]
    return [sys.executable, *launcher, *worker]


def environment(plan: Plan) -> dict[str, str]:
    """The processes share the cores; the launcher's own default is one thread each."""
    here = plan.resolved.num_processes // plan.recipe.launch.num_machines
    threads = max(1, plan.machine.cpus // max(1, here))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if plan.resolved.num_processes > 1:
        quiet["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    return {**os.environ, **quiet}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
