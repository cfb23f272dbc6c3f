"""Rules on the recipe alone: each tripped once, each silent once."""

import pytest

from finetune_cli.plan.machine import Gpu, Machine


def test_a_healthy_recipe_is_told_nothing(says):
    assert says(train={"max_steps": 20}) == []


@pytest.mark.parametrize(
    ("lora", "rate", "severity"),
    [
        ({"r": 4}, 2e-5, None), ({"r": 4}, 5e-4, None), ({"r": 4}, 1.9e-5, "warning"), ({"r": 4}, 5.1e-4, "warning"),
        ({"r": 4}, 1.9e-6, "error"), ({"r": 4}, 5.1e-3, "error"), (None, 1e-6, None), (None, 5e-5, None),
        (None, 2e-4, "warning"), (None, 1e-3, "error"),
    ],
)  # fmt: skip
def test_ft016_learning_rate(of, lora, rate, severity):
    found = of("FT016", fast=True, lora=lora, train={"learning_rate": rate})
    assert [p.severity for p in found] == ([severity] if severity else [])
    assert all(p.key == "train.learning_rate" and p.line and f"{rate:g}" in p.message for p in found)


@pytest.mark.parametrize(
    ("gpus", "precision", "trips"),
    [
        ([], "fp16", True),
        ([], "bf16", False),
        ([7.5], "bf16", True),
        ([8.0, 7.5], "bf16", True),
        ([7.5], "fp16", False),
    ],
)
def test_ft021_number_formats(of, monkeypatch, gpus, precision, trips):
    cards = [Gpu(name="T4", memory_gib=15, compute_capability=c) for c in gpus]
    monkeypatch.setattr(
        "finetune_cli.plan.machine.look", lambda: Machine(cpus=2, memory_gib=8, gpus=cards, cpu_bf16=False)
    )
    found = of("FT021", fast=True, train={"precision": precision})
    assert [p.severity for p in found] == ["error"] * trips


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"train": {"max_steps": 20}}, []),
        ({"train": {"max_steps": 19}}, ["train.max_steps"]),
        ({"train": {"max_steps": 30, "warmup_steps": 30}}, ["train.warmup_steps"]),
        ({"train": {"max_steps": 30, "warmup_steps": 29}}, []),
        ({"train": {"max_steps": 30}, "save": {"save_steps": 31}}, ["save.save_steps"]),
        ({"train": {"max_steps": 30}, "save": {"save_steps": 30}}, []),
        ({"train": {"max_steps": 30}, "eval": {"eval_steps": 31}}, []),
        ({"train": {"max_steps": 30}, "eval": {"eval_steps": 31}, "data": {"eval_split": 0.2}}, ["eval.eval_steps"]),
    ],
)
def test_ft033_what_does_not_fit_the_run(of, sections, keys):
    found = of("FT033", fast=True, **sections)
    assert [p.key for p in found] == keys
    assert all(p.severity == "warning" for p in found)


def test_ft102_optimisers(of):
    assert of("FT102", "optim=adafactor", fast=True) == []
    assert "did you mean adafactor?" in of("FT102", "optim=adafactr", fast=True)[0].message


def test_ft103_an_adapter_on_an_adapter(of, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    assert [p.key for p in of("FT103", fast=True, model={"name_or_path": str(tmp_path / "a")})] == ["lora"]
    assert of("FT103", fast=True) == []


def test_ft104_quantised_weights_without_an_adapter(of, tmp_path):
    asked = "quantization={load_in_4bit: true}"
    assert of("FT104", asked, fast=True) == []
    (problem,) = of("FT104", asked, fast=True, lora=None)
    assert problem.message.endswith("add `lora: {}`")
    (tmp_path / "x.gguf").touch()
    assert len(of("FT104", asked, f"name_or_path={tmp_path}/x.gguf", fast=True)) == 1


def test_ft105_output_dir_is_an_input(of, tiny_model_folder, tmp_path):
    (tmp_path / "link").symlink_to(tiny_model_folder)
    for folder in (tiny_model_folder, tmp_path / "link", tiny_model_folder / ".." / tiny_model_folder.name):
        (problem,) = of("FT105", fast=True, output_dir=str(folder))
        assert (problem.key, problem.severity) == ("output_dir", "error")
        assert "model.name_or_path" in problem.message
    assert of("FT105", fast=True, output_dir=str(tmp_path / "new")) == []
    assert of("FT105", fast=True, output_dir=str(tmp_path)) == [], "the folder of the rows is no input itself"


@pytest.mark.parametrize(
    ("method", "sections", "wanted"),
    [
        ({"name": "dpo", "loss_type": "aot"}, {}, [("method.loss_type", "warning")]),
        ({"name": "dpo", "loss_type": "aot"}, {"train": {"per_device_train_batch_size": 4}}, []),
        ({"name": "dpo"}, {}, []),
        ({"name": "dpo", "sync_ref_model": True}, {}, [("method.ref_model_mixup_alpha", "error")]),
        ({"name": "dpo", "sync_ref_model": True, "ref_model_mixup_alpha": 1.0}, {}, []),
        ({"name": "dpo", "sync_ref_model": True}, {"lora": None}, []),
        ({"name": "reward"}, {"eval": {"metric": "exact_match"}}, [("eval.metric", "error")]),
        ({"name": "sft"}, {"eval": {"metric": "exact-match"}}, [("eval.metric", "error")]),
        ({"name": "sft"}, {"eval": {"metric": "exact_match"}}, [("eval.metric", "warning")]),
        ({"name": "sft"}, {"eval": {"metric": "exact_match"}, "data": {"eval_split": 0.5}}, []),
        ({"name": "sft"}, {"save": {"load_best_model_at_end": True}}, [("save.load_best_model_at_end", "warning")]),
    ],
)
def test_ft111_settings_of_the_method(of, method, sections, wanted):
    train = {"learning_rate": "auto", **sections.pop("train", {})}
    found = of("FT111", fast=True, method=method, train=train, **sections)
    assert [(p.key, p.severity) for p in found] == wanted


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("quantization={load_in_4bit: true}", "quantization"),
        ("optim=adafactor", "train.optim"),
        ("per_device_train_batch_size=auto", "train.per_device_train_batch_size"),
        ("precision=fp16", "train.precision"),
    ],
)
def test_ft114_what_cannot_be_in_pieces(of, option, key):
    assert [p.key for p in of("FT114", "strategy=fsdp2", option, fast=True)] == [key]
    assert of("FT114", "strategy=ddp", option, fast=True) == []


def test_ft114_pieces_themselves_are_fine(of):
    assert of("FT114", "strategy=fsdp2", fast=True) == []


def test_ft114_deepspeed_is_an_extra(of, monkeypatch):
    zero = "strategy=deepspeed-zero3"
    there = {"deepspeed": True}
    monkeypatch.setattr("finetune_cli.checks.spread.find_spec", lambda name: there[name] or None)
    assert of("FT114", zero, fast=True) == of("FT114", zero, "optim=sgd", "precision=bf16", fast=True) == []
    for option, key in (
        ("optim=adagrad", "train.optim"),
        ("precision=fp16", "train.precision"),
        ("quantization={load_in_8bit: true}", "quantization"),
        ("lora={modules_to_save: [lm_head]}", "lora.modules_to_save"),
        ("lora={target_modules: [q_proj, lm_head]}", "lora.target_modules"),
    ):
        assert [p.key for p in of("FT114", zero, option, fast=True)] == [key]
    there["deepspeed"] = False
    (found,) = of("FT114", zero, fast=True)
    assert 'pip install "finetune-recipes[deepspeed]"' in found.message


def test_ft115_machines_know_their_places(of, monkeypatch):
    for name in ("MASTER_ADDR", "RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    keys = [p.key for p in of("FT115", "num_machines=2", fast=True)]
    assert keys == ["launch.machine_rank", "launch.main_process_ip"]
    assert of("FT115", "num_machines=2", "machine_rank=1", "main_process_ip=10.0.0.1", fast=True) == []
    (found,) = of("FT115", "num_machines=2", "machine_rank=2", "main_process_ip=10.0.0.1", fast=True)
    assert "numbered from 0 to 1" in found.message


def test_auto_spreads_what_gpus_cannot_hold_whole(recipe_of, monkeypatch):
    from finetune_cli import commands
    from finetune_cli.plan.machine import Gpu, Machine

    def strategy(gib: float, *overrides: str) -> tuple[str, str]:
        gpu = Gpu(name="GPU", memory_gib=gib, compute_capability=9.0)
        machine = Machine(cpus=8, memory_gib=64.0, gpus=[gpu] * 2, cpu_bf16=True)
        monkeypatch.setattr(commands.machine, "look", lambda: machine)
        path = recipe_of(model={"name_or_path": "Qwen/Qwen2.5-3B-Instruct"}, train={"learning_rate": "auto"})
        plan = commands.checked(path, ["lora=null", *overrides]).plan
        return plan.resolved.strategy, plan.origins["launch.strategy"]

    for gib, wanted in ((80, "ddp"), (40, "fsdp2")):
        chosen, origin = strategy(gib)
        assert chosen == wanted
        assert "GiB a process with whole weights" in origin
    assert strategy(40, "strategy=ddp") == ("ddp", "recipe")
    assert strategy(40, "per_device_train_batch_size=auto")[0] == "ddp"  # pieces cannot be had with it


def test_ft116_what_accelerate_is_asked_for_beside_the_recipe(of, monkeypatch):
    for name, value in (("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), ("ACCELERATE_DYNAMO_BACKEND", "no")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert of("FT116", fast=True) == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = of("FT116", fast=True)
    assert ["FSDP" in found[0].message, "train.global_batch_size" in found[1].message] == [True, True]


def test_the_named_metrics_are_those_that_there_are():
    from finetune_cli.checks.lints import METRICS
    from finetune_cli.engine.metrics import NAMED

    assert list(METRICS) == list(NAMED)
