"""What the machine has, told by what it says of itself."""

import subprocess

import pytest

from finetune_cli.plan import machine
from finetune_cli.plan.machine import Gpu, Machine


def gpu(capability: float) -> Gpu:
    return Gpu(name="G", memory_gib=80.0, compute_capability=capability)


@pytest.mark.parametrize(
    ("capabilities", "cpu_bf16", "bf16", "device"),
    [
        ([], False, False, "cpu"),
        ([], True, True, "cpu"),
        ([8.0], False, True, "cuda"),
        ([9.0, 8.6], False, True, "cuda"),
        ([7.5], True, False, "cuda"),  # a T4 beside a modern processor
        ([9.0, 7.5], False, False, "cuda"),
    ],
)
def test_bfloat16_is_that_of_what_computes(capabilities, cpu_bf16, bf16, device):
    found = Machine(cpus=4, memory_gib=None, gpus=[gpu(c) for c in capabilities], cpu_bf16=cpu_bf16)
    assert (found.bf16, found.device) == (bf16, device)


@pytest.fixture
def smi(monkeypatch):
    """nvidia-smi that says this; None: there is none."""

    def say(text):
        def run(command, **kwargs):
            assert command[0] == "nvidia-smi"
            if text is None:
                raise FileNotFoundError(command[0])
            if text == "fails":
                raise subprocess.CalledProcessError(9, command)
            if text == "hangs":
                raise subprocess.TimeoutExpired(command, kwargs["timeout"])
            return subprocess.CompletedProcess(command, 0, text, "")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return say


TWO = "NVIDIA H100 80GB HBM3, 81559, 9.0\nTesla T4, 15360, 7.5\n"
H100 = Gpu(name="NVIDIA H100 80GB HBM3", memory_gib=79.6, compute_capability=9.0)
T4 = Gpu(name="Tesla T4", memory_gib=15.0, compute_capability=7.5)


def test_gpus_by_nvidia_smi(smi):
    smi(TWO)
    assert machine.look().gpus == [H100, T4]


@pytest.mark.parametrize(
    ("visible", "found"), [("", []), ("-1", []), ("0", [H100]), ("1", [T4]), ("1,0", [T4, H100]), ("0,1", [H100, T4])]
)
def test_gpus_that_are_hidden_do_not_count(smi, monkeypatch, visible, found):
    smi(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.look().gpus == found


@pytest.mark.parametrize("text", [None, "fails", "hangs", "", "No devices were found\n"])
def test_without_an_answer_there_is_no_gpu(smi, text):
    smi(text)
    assert machine.look().gpus == []


def test_a_gpu_that_shares_the_memory_of_the_machine(smi):
    """It reports no memory of its own."""
    smi("NVIDIA GB10, [N/A], 12.1\n")
    found = machine.look()
    assert found.gpus == [Gpu(name="NVIDIA GB10", memory_gib=found.memory_gib, compute_capability=12.1)]


def test_gpus_that_are_named_by_uuid_are_counted(smi, monkeypatch):
    smi(TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f3c")
    assert len(machine.look().gpus) == 1


def test_this_machine():
    found = machine.look()
    assert found.cpus >= 1
    assert found.memory_gib is None or found.memory_gib > 0.5
