"""doctor: what is wrong is named with the command that mends it, and nothing secret is told."""

import json

import pytest
import torch
from packaging.requirements import Requirement

from finetune_cli import using
from finetune_cli.plan.machine import Gpu, Machine
from finetune_cli.use import doctor
from finetune_cli.use.doctor import Findings, Trouble

CPU = Machine(cpus=2, memory_gib=8.0, gpus=[], cpu_bf16=True)


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)


def test_a_sound_machine(capsys):
    assert using.doctor(as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"]
    assert told["facts"]["torch"] == torch.__version__
    assert told["facts"]["attention sdpa"] == "works on cpu"
    assert told["facts"]["attention varlen"] == "needs a GPU"
    assert told["facts"]["hub"].startswith("not logged in")


def test_packages_that_are_missing_or_too_old(monkeypatch):
    wanted = [Requirement("torch>=99"), Requirement("no-such-package>=1"), Requirement("pydantic>=2")]
    monkeypatch.setattr(doctor, "needed", lambda: wanted)
    found = Findings()
    doctor.packages(found, CPU)
    assert found.troubles == [
        Trouble(f"torch {torch.__version__} is installed, >=99 is needed", 'pip install -U "torch>=99"'),
        Trouble("no-such-package is not installed", 'pip install "no-such-package>=1"'),
    ]


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    found = Findings()
    gpu = Gpu(name="A GPU", memory_gib=80.0, compute_capability=9.0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    doctor.graphics(found, CPU.model_copy(update={"gpus": [gpu]}))
    assert "A GPU, 80.0 GiB" in found.facts["GPU 0"]
    assert found.troubles == [
        Trouble("the driver sees a GPU, torch does not", "pip install --upgrade --force-reinstall torch")
    ]


def test_attention_that_computes_something_else_is_found(monkeypatch):
    real = doctor.segments_attention

    def wrong(*args, layout, **kwargs):
        out, _ = real(*args, layout=layout, **kwargs)
        return (out + 1, None) if args[1].dtype == torch.bfloat16 else (out, None)

    monkeypatch.setattr(doctor, "segments_attention", wrong)
    found = Findings()
    doctor.attention(found, CPU)
    assert found.facts["attention sdpa"].startswith("fails: wrong by 0.2")
    assert len(found.troubles) == 1


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LEAST_DISK_GIB", 1e9)
    monkeypatch.setattr(doctor, "places", lambda: iter([("for runs", tmp_path / "not" / "yet", "cd elsewhere")]))
    found = Findings()
    doctor.disk(found, CPU)
    assert [one.command for one in found.troubles] == ["cd elsewhere"]


def test_a_token_is_never_told(monkeypatch):
    def whoami():
        raise ValueError("401: Invalid token hf_secretsecret")

    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secretsecret")
    monkeypatch.setattr("huggingface_hub.whoami", whoami)
    found = Findings()
    doctor.hub(found, CPU)
    assert "secret" not in doctor.block(found)
    assert [one.command for one in found.troubles] == ["hf auth login"]
    assert doctor.exit_code(found) == 4


def test_the_block_is_plain_text():
    found = Findings({"torch": "2", "hub": "x"}, [Trouble("it is old", "pip install -U torch")])
    assert doctor.block(found) == "torch  2\nhub    x\n\nproblem: it is old\n    pip install -U torch"
    assert doctor.block(Findings({"a": "1"})).endswith("nothing is wrong")
