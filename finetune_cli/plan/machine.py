"""What this machine has, found without importing torch."""

import os
import platform
import subprocess
from pathlib import Path

from finetune_cli.spec import Spec

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


class Gpu(Spec):
    """One graphics processor."""

    name: str
    memory_gib: float
    compute_capability: float


class Machine(Spec):
    """Processors, memory, and whether bfloat16 arithmetic is done in hardware."""

    cpus: int
    memory_gib: float | None
    gpus: list[Gpu]
    cpu_bf16: bool

    @property
    def bf16(self) -> bool:
        return all(gpu.compute_capability >= 8 for gpu in self.gpus) if self.gpus else self.cpu_bf16

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def look() -> Machine:
    return Machine(cpus=_cpus(), memory_gib=_memory(), gpus=_gpus(), cpu_bf16=bool(BF16_FLAGS & _cpu_flags()))


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not a POSIX system
        return None


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {"bf16"} if platform.machine() == "arm64" else set()
    for line in info.read_text(errors="replace").splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return set()


def _gpus() -> list[Gpu]:
    """GPUs by nvidia-smi, those that CUDA_VISIBLE_DEVICES leaves; none where there is no nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in out.splitlines() if line.count(",") == 2]
    gpus = [Gpu(name=n, memory_gib=_gpu_memory(m), compute_capability=float(c)) for n, m, c in rows]
    if visible is None:
        return gpus
    names = [name.strip() for name in visible.split(",")]
    if not all(name.isdecimal() for name in names):  # by UUID
        return gpus[: len(names)]
    return [gpus[int(name)] for name in names if int(name) < len(gpus)]


def _gpu_memory(mib: str) -> float:
    """A GPU that shares the machine's memory reports [N/A]."""
    return round(float(mib) / 1024, 1) if mib.replace(".", "").isdecimal() else _memory() or 0.0
