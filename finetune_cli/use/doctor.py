"""What this machine offers, tried rather than believed; and each thing that is wrong with the command that mends it."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from packaging.requirements import Requirement

from finetune_cli import __version__
from finetune_cli.data.batches import Segment, Segments
from finetune_cli.data.builtin import cache_root
from finetune_cli.engine.attention import segments_attention
from finetune_cli.errors import MachineError
from finetune_cli.plan import machine
from finetune_cli.plan.machine import Machine

PROJECT = "finetune-recipes"
OPTIONAL = ("flash-attn", "liger-kernel", "wandb")
LEAST_DISK_GIB = 5.0
NEAR = 2e-2
"""What bfloat16 kernels may differ by from float32 on numbers of size one."""


class Trouble(NamedTuple):
    """Something that is wrong, and what mends it."""

    what: str
    command: str


@dataclass
class Findings:
    """What was found, by heading, and what is wrong."""

    facts: dict[str, str] = field(default_factory=dict)
    troubles: list[Trouble] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        troubles = [{"what": one.what, "command": one.command} for one in self.troubles]
        return {"ok": not self.troubles, "facts": self.facts, "troubles": troubles}


def examine() -> Findings:
    """Everything, in the order in which it is shown."""
    found, here = Findings(), machine.look()
    found.facts["finetune"] = f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    for look in (packages, processor, graphics, arithmetic, attention, disk, hub):
        look(found, here)
    return found


def packages(found: Findings, _: Machine) -> None:
    """Versions beside what this version of finetune needs."""
    for requirement in needed():
        has = installed(requirement.name)
        if has is None:
            found.troubles.append(Trouble(f"{requirement.name} is not installed", f'pip install "{requirement}"'))
        elif not requirement.specifier.contains(has, prereleases=True):
            what = f"{requirement.name} {has} is installed, {requirement.specifier} is needed"
            found.troubles.append(Trouble(what, f'pip install -U "{requirement.name}{requirement.specifier}"'))
        found.facts[requirement.name] = has or "missing"
    for name in OPTIONAL:
        found.facts[name] = installed(name) or "not installed (optional)"


def needed() -> list[Requirement]:
    """What pip was told that this package needs, on this system; nothing where it runs uninstalled."""
    try:
        told = [Requirement(line) for line in requires(PROJECT) or []]
    except PackageNotFoundError:
        told = [Requirement(name) for name in ("torch", "transformers", "peft", "accelerate", "datasets")]
    return [one for one in told if one.marker is None or one.marker.evaluate({"extra": ""})]


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor(found: Findings, here: Machine) -> None:
    memory = psutil.virtual_memory()
    found.facts["CPU"] = f"{here.cpus} cores, bfloat16 in hardware: {'yes' if here.cpu_bf16 else 'no'}"
    found.facts["memory"] = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"


def graphics(found: Findings, here: Machine) -> None:
    """The GPUs that the driver sees, and whether torch sees them too."""
    build = f"torch is built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}"
    if not here.gpus:
        found.facts["GPU"] = f"none; {build}"
        return
    for number, gpu in enumerate(here.gpus):
        free = ""
        if torch.cuda.is_available():
            free = f", {torch.cuda.mem_get_info(number)[0] / 2**30:.1f} GiB free"
        found.facts[f"GPU {number}"] = f"{gpu.name}, {gpu.memory_gib:.1f} GiB{free}, sm {gpu.compute_capability}"
    found.facts["driver"] = f"{driver()}; {build}"
    if not torch.cuda.is_available():
        found.troubles.append(
            Trouble("the driver sees a GPU, torch does not", "pip install --upgrade --force-reinstall torch")
            if torch.version.cuda is None
            else Trouble(f"torch (CUDA {torch.version.cuda}) cannot use the driver {driver()}", "nvidia-smi")
        )


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.splitlines()[0].strip() if told.strip() else "unknown"


def arithmetic(found: Findings, here: Machine) -> None:
    """A product in bfloat16 on the device that a run would take."""
    device = device_of(here)
    where = here.gpus[0].name if device == "cuda" else "CPU"
    said = attempt(lambda: product(device))
    slow = "" if here.bf16 else " in software: train.precision auto is " + ("fp16" if here.gpus else "fp32")
    found.facts["bf16"] = f"works on {where}{slow}" if said is None else f"fails on {where}: {said}"


def device_of(here: Machine) -> str:
    return "cuda" if here.gpus and torch.cuda.is_available() else "cpu"


def product(device: str) -> None:
    x = torch.randn(16, 16, device=device)
    near((x.bfloat16() @ x.bfloat16()).float() / 16, x @ x / 16)


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    off = float((got - wanted).abs().max())
    if not off < NEAR:
        raise ArithmeticError(f"wrong by {off:.3g}")


def attention(found: Findings, here: Machine) -> None:
    """Every backend on a row with a shared prefix and two branches, beside the same in float32."""
    device = device_of(here)
    for backend in ("sdpa", "varlen", "flash_attention_2"):
        said = unfit(backend, device) or attempt(lambda name=backend: segments(name, device))  # type: ignore[misc]
        found.facts[f"attention {backend}"] = said or f"works on {device}"
    if found.facts["attention sdpa"] != f"works on {device}":
        trouble = Trouble("attention by sdpa, which every run can fall back on, fails", "pip install --upgrade torch")
        found.troubles.append(trouble)
    elif installed("flash-attn") and device == "cuda" and "works" not in found.facts["attention flash_attention_2"]:
        command = "pip install --no-build-isolation --force-reinstall --no-deps flash-attn"
        found.troubles.append(Trouble("flash-attn is installed and does not work", command))


def unfit(backend: str, device: str) -> str | None:
    if backend == "flash_attention_2" and installed("flash-attn") is None:
        return "not installed (optional)"
    return "needs a GPU" if backend != "sdpa" and device == "cpu" else None


def segments(backend: str, device: str) -> None:
    """Attention of 2 heads of 64 over a prefix of 5 and branches of 3 and 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 64, generator=generator).to(device) for _ in range(3))
    spans = [Segment(0, 5), Segment(5, 8, 0, 5), Segment(8, 12, 0, 5)]
    mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)

    def run(name: str, dtype: torch.dtype) -> torch.Tensor:
        layout = Segments(spans, name)
        out, _ = segments_attention(torch.nn.Identity(), q.to(dtype), k.to(dtype), v.to(dtype), mask, layout=layout)
        return out.float()

    near(run(backend, torch.bfloat16) / 4, run("sdpa", torch.float32) / 4)


def attempt(try_it: Callable[[], None]) -> str | None:
    """What went wrong, in a line; None where nothing did. A kernel may fail with anything, and that is the finding."""
    try:
        try_it()
    except Exception as error:  # noqa: BLE001
        return f"fails: {(str(error).splitlines() or [''])[0] or type(error).__name__}"
    return None


def disk(found: Findings, _: Machine) -> None:
    """Room where runs are written, and where models and prepared rows are kept."""
    for what, place, command in places():
        near_by = next(p for p in (place, *place.parents) if p.exists())
        free = shutil.disk_usage(near_by).free / 2**30
        found.facts[f"disk {what}"] = f"{free:.1f} GiB free at {place}"
        if free < LEAST_DISK_GIB:
            found.troubles.append(Trouble(f"{free:.1f} GiB of disk are free at {place}", command))
        if not os.access(near_by, os.W_OK):
            found.troubles.append(Trouble(f"{place} cannot be written", command))


def places() -> Iterator[tuple[str, Path, str]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    yield "for runs", Path.cwd(), "cd /a/folder/with/room"
    yield "for prepared rows", cache_root(), "export FINETUNE_CACHE=/a/folder/with/room"
    yield "for models", Path(HF_HUB_CACHE), "export HF_HOME=/a/folder/with/room"


def hub(found: Findings, _: Machine) -> None:
    """Who is logged in. Never the token; nothing is asked of the network where there is none."""
    from huggingface_hub import get_token, whoami
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        found.facts["hub"] = "offline, by HF_HUB_OFFLINE"
    elif get_token() is None:
        found.facts["hub"] = "not logged in (`hf auth login`, for gated models and for pushing)"
    else:
        names: list[str] = []
        said = attempt(lambda: names.append(str(whoami()["name"])))
        found.facts["hub"] = f"logged in as {names[0]}" if names else f"whoami {hidden(said or '')}"
        if not names and re.search("401|Invalid|expired", said or ""):
            found.troubles.append(Trouble("the hub does not take this token", "hf auth login"))


def hidden(text: str) -> str:
    """Without anything that looks like a token."""
    return re.sub(r"hf_\w+", "hf_...", text)


def block(found: Findings) -> str:
    """Plain text to paste into a report."""
    wide = max(map(len, found.facts))
    lines = [f"{name:{wide}}  {value}" for name, value in found.facts.items()]
    lines += ["", *(f"problem: {one.what}\n    {one.command}" for one in found.troubles)]
    home = str(Path.home())
    text = "\n".join(lines if found.troubles else [*lines, "nothing is wrong"])
    return text.replace(home, "~") if len(home) > 1 else text


def exit_code(found: Findings) -> int:
    return MachineError.exit_code if found.troubles else 0
