"""Every `auto` becomes a value with a reason; the fingerprint is of what changes the numbers."""

import json
from pathlib import Path

import pytest

from finetune_cli.plan import launch, resolve
from finetune_cli.plan.facts import Facts
from finetune_cli.plan.machine import Gpu, Machine
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.load import load

CPU = Machine(cpus=8, memory_gib=32.0, gpus=[], cpu_bf16=False)
NEW_CPU = CPU.model_copy(update={"cpu_bf16": True})


def with_gpus(count: int, capability: float = 9.0) -> Machine:
    gpu = Gpu(name="H100", memory_gib=80.0, compute_capability=capability)
    return CPU.model_copy(update={"gpus": [gpu] * count})


@pytest.fixture
def plan_of(tmp_path, monkeypatch):
    """The plan of a minimal recipe with `--set` changes."""
    monkeypatch.chdir(tmp_path)

    def make(*changes, machine=CPU, facts=None, world=None, text="") -> Plan:
        path = tmp_path / "recipe.yaml"
        path.write_text("method: sft\nmodel: org/m\ndata: train.jsonl\noutput_dir: runs/x\n" + text)
        loaded = load(path, changes)
        facts = Facts(kind="hub") if facts is None else facts
        return resolve.resolve(loaded.recipe, loaded.data, machine, facts, recipe_path=path, world=world)

    return make


LORA = "lora: {r: 8}\n"


@pytest.mark.parametrize(
    ("text", "facts", "rate", "kind"),
    [
        ("", None, 2e-5, "full"),
        (LORA, None, 2e-4, "LoRA"),
        ("", Facts(kind="adapter", base="org/b"), 2e-4, "LoRA"),
    ],
)
def test_learning_rate(plan_of, text, facts, rate, kind):
    plan = plan_of(text=text, facts=facts)
    assert plan.resolved.learning_rate == rate
    assert plan.origins["train.learning_rate"] == f"auto: sft with {kind} training"


@pytest.mark.parametrize(
    ("machine", "precision", "dtype", "attention"),
    [
        (CPU, "fp32", "float32", "sdpa"),
        (NEW_CPU, "bf16", "bfloat16", "sdpa"),
        (with_gpus(1), "bf16", "bfloat16", "varlen"),
        (with_gpus(1, 7.5), "fp16", "float16", "sdpa"),
    ],
)
def test_precision_follows_the_machine_and_the_rest_follows_it(
    plan_of, monkeypatch, machine, precision, dtype, attention
):
    monkeypatch.setattr(resolve, "find_spec", lambda name: None)
    made = plan_of(machine=machine)
    found = made.resolved
    assert (found.precision, found.dtype, found.bnb_4bit_compute_dtype) == (precision, dtype, dtype)
    assert found.attn_implementation == attention
    assert made.origins["model.dtype"] == f"auto: train.precision is {precision}"
    assert made.origins["train.precision"].startswith("auto: ")


def test_flash_attention_where_its_package_is(plan_of, monkeypatch):
    monkeypatch.setattr(resolve, "find_spec", lambda name: name == "flash_attn")
    assert plan_of(machine=with_gpus(1)).resolved.attn_implementation == "flash_attention_2"
    assert plan_of("precision=fp32", machine=with_gpus(1)).resolved.attn_implementation == "sdpa"
    assert plan_of().resolved.attn_implementation == "sdpa"


def test_what_is_written_is_kept(plan_of):
    plan = plan_of(
        "learning_rate=1e-5", "precision=fp32", "model.dtype=bfloat16", "attn_implementation=eager",
        "gradient_checkpointing=true", "num_processes=2", "load_best_model_at_end=true", machine=with_gpus(4),
    )  # fmt: skip
    found = plan.resolved
    assert (found.learning_rate, found.precision, found.dtype) == (1e-5, "fp32", "bfloat16")
    assert (found.attn_implementation, found.gradient_checkpointing, found.num_processes) == ("eager", True, 2)
    assert found.load_best_model_at_end is True
    for key in ("train.learning_rate", "train.precision", "model.dtype", "launch.num_processes"):
        assert plan.origins[key] == "recipe"


def test_origins_cover_every_leaf(plan_of):
    plan = plan_of("max_length=64", text=LORA)
    origins = plan.origins
    assert origins["data.max_length"] == "recipe"
    assert origins["lora.r"] == "recipe"
    assert origins["lora.lora_alpha"] == "default"
    assert origins["seed"] == "default"
    assert origins["method.name"] == "recipe"
    assert origins["model.name_or_path"] == "recipe"
    assert origins["model.revision"] == "default"
    leaves = {key for key, _ in resolve.leaves(plan.recipe.model_dump())}
    assert leaves <= set(origins)
    autos = {key for key, value in resolve.leaves(plan.recipe.model_dump()) if value == "auto"}
    assert autos > {"train.learning_rate", "train.precision", "model.dtype", "launch.num_processes"}
    assert {key for key in autos if not origins[key].startswith("auto: ")} == {"model.layout"}  # found with the weights


@pytest.mark.parametrize(
    ("changes", "gpus", "world", "accumulation", "batch", "processes"),
    [
        ((), 0, None, 1, 1, 1),
        (("per_device_train_batch_size=4",), 0, None, 1, 4, 1),
        (("per_device_train_batch_size=4", "global_batch_size=32"), 0, None, 8, 32, 1),
        (("per_device_train_batch_size=4", "global_batch_size=32"), 2, None, 4, 32, 2),
        (("per_device_train_batch_size=4", "global_batch_size=30"), 2, None, 4, 30, 2),
        (("per_device_train_batch_size=4", "global_batch_size=2"), 2, None, 1, 2, 2),
        (("per_device_train_batch_size=2", "gradient_accumulation_steps=3"), 4, None, 3, 24, 4),
        (("global_batch_size=8", "num_processes=2"), 0, None, 4, 8, 2),
        (("global_batch_size=8", "num_processes=2"), 0, 4, 2, 8, 4),  # the launcher has started four
    ],
)
def test_batch(plan_of, changes, gpus, world, accumulation, batch, processes):
    plan = plan_of(*changes, machine=with_gpus(gpus), world=world)
    found = plan.resolved
    assert (found.gradient_accumulation_steps, found.global_batch_size) == (accumulation, batch)
    assert found.num_processes == processes
    if world is not None:
        assert plan.origins["launch.num_processes"] == "auto: the launcher started them"


def test_evaluation(plan_of):
    assert plan_of("per_device_train_batch_size=3").resolved.per_device_eval_batch_size == 3
    assert plan_of("per_device_eval_batch_size=5").resolved.per_device_eval_batch_size == 5
    for changes, best in [
        ((), False),
        (("eval_split=0.1",), True),
        (("eval_sets=e.jsonl",), True),
        (("eval_split=0.1", "eval_strategy=no"), False),
        (("eval_split=0.1", "load_best_model_at_end=false"), False),
    ]:
        assert plan_of(*changes).resolved.load_best_model_at_end is best


@pytest.mark.parametrize(
    ("machine", "weights", "on"),
    [
        (CPU, 7_000_000_000, False), (with_gpus(1), 999_999_999, False), (with_gpus(1), 1_000_000_000, True),
        (with_gpus(1), None, True),
    ],
)  # fmt: skip
def test_gradient_checkpointing(plan_of, machine, weights, on):
    plan = plan_of(machine=machine, facts=Facts(kind="folder", parameters=weights))
    assert plan.resolved.gradient_checkpointing is on


def test_every_precision_and_process_is_reasoned(plan_of):
    assert plan_of(machine=with_gpus(2)).origins["launch.num_processes"] == "auto: 2 GPUs"
    assert plan_of().origins["launch.num_processes"] == "auto: no GPU"
    assert "H100 has no bfloat16" in plan_of(machine=with_gpus(1, 7.0)).origins["train.precision"]


@pytest.mark.parametrize(
    "change",
    [
        "learning_rate=1e-5", "seed=1", "max_length=64", "num_train_epochs=1", "model.revision=abc", "loss_on=all",
        "global_batch_size=2", "optim=sgd", "max_steps=3", "precision=bf16", "eval_split=0.1", "weight_decay=0.1",
    ],
)  # fmt: skip
def test_fingerprint_changes_with_what_changes_the_numbers(plan_of, change):
    assert plan_of(change).fingerprint != plan_of().fingerprint
    assert plan_of(text=LORA).fingerprint != plan_of().fingerprint


@pytest.mark.parametrize(
    "change",
    [
        "logging_steps=1", "report_to=none", "run_name=x", "save_steps=7", "save_total_limit=1", "output_dir=runs/y",
        "sample_prompts=0", "max_grad_norm_warning=5", "ignore=[FT016]", "learning_rate=2e-5", "precision=fp32",
    ],
)  # fmt: skip
def test_fingerprint_does_not_change_with_the_rest(plan_of, change):
    """The last two write down what `auto` is anyway."""
    assert plan_of(change).fingerprint == plan_of().fingerprint


def test_plan_survives_json(plan_of):
    plan = plan_of("eval_split=0.1", text=LORA, machine=with_gpus(2))
    assert Plan.model_validate_json(plan.model_dump_json(indent=1)) == plan
    assert json.loads(plan.model_dump_json())["versions"]["finetune-recipes"]


def test_output_dir_is_absolute_and_below_the_working_directory(plan_of, tmp_path):
    assert plan_of().run == tmp_path / "runs" / "x"
    assert plan_of("output_dir=/else/where").run == Path("/else/where")


@pytest.mark.parametrize(
    ("environment", "inside"),
    [
        ({}, False),
        ({"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "10.0.0.1"}, False),  # a plain pod of a cluster
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2"}, True),  # torchrun
        ({"ACCELERATE_MIXED_PRECISION": "no"}, True),  # accelerate launch, one process
        ({"ACCELERATE_MIXED_PRECISION": "bf16", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, True),
        ({"SLURM_PROCID": "0", "OMPI_COMM_WORLD_SIZE": "2"}, False),
    ],
)
def test_inside_a_launcher(environment, inside):
    assert launch.inside(environment) is inside
    assert launch.world(environment) == int(environment.get("WORLD_SIZE", 1))


def test_one_process_is_started_directly_and_several_by_a_launcher(plan_of):
    import sys

    one = launch.argv(plan_of(), Path("/r/plan.json"), ["--resume"])
    assert one == [sys.executable, "-m", "finetune_cli.worker", "/r/plan.json", "--resume"]
    two = launch.argv(plan_of("num_processes=2", "main_process_port=2345"), Path("/r/plan.json"), [])
    assert two[-3:] == ["-m", "finetune_cli.worker", "/r/plan.json"]
    assert two[two.index("--nproc_per_node") + 1] == "2"
    assert two[two.index("--master_port") + 1] == "2345"


def test_processes_share_the_cores(plan_of, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "OMP_NUM_THREADS" not in launch.environment(plan_of())
    assert launch.environment(plan_of("num_processes=2"))["OMP_NUM_THREADS"] == "4"
    assert launch.environment(plan_of("num_processes=16"))["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.environment(plan_of("num_processes=2"))["OMP_NUM_THREADS"] == "3"


HERE = "num_machines=2"
SKY = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
SLURM = {"SLURM_NODEID": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "20001", "RANK": "7"}
POD = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


@pytest.mark.parametrize(
    ("changes", "environment", "place"),
    [
        ([], SLURM, (1, 0, "127.0.0.1", 29500)),  # the recipe says that there are several
        ([HERE, "machine_rank=1", "main_process_ip=10.0.0.1"], {}, (2, 1, "10.0.0.1", 29500)),
        ([HERE, "machine_rank=0", "main_process_port=1234"], SLURM, (2, 0, "node1", 1234)),
        ([HERE], SLURM, (2, 1, "node1", 20001)),
        ([HERE], SKY, (2, 1, "10.0.0.1", 29500)),
        ([HERE], POD, (2, 0, "job-master-0", 23456)),
        ([HERE], {}, (2, None, None, 29500)),
    ],
)
def test_the_place_of_a_machine(plan_of, changes, environment, place):
    assert launch.place(plan_of(*changes).recipe.launch, environment) == place


def test_a_machine_starts_its_own_share_of_the_processes(plan_of):
    plan = plan_of(HERE, "num_processes=4", "machine_rank=1", "main_process_ip=10.0.0.1")
    assert plan.resolved.num_processes == 8
    argv = launch.argv(plan, Path("/r/plan-machine-1.json"), [])
    given = dict(zip(argv[3:-3:2], argv[4:-3:2], strict=True))
    assert given == {
        "--nproc_per_node": "4", "--master_addr": "10.0.0.1", "--master_port": "29500", "--nnodes": "2",
        "--node_rank": "1", "--error_file": str(plan.run / "error.json"),
    }  # fmt: skip
    assert not launch.first(plan)
    assert launch.environment(plan)["OMP_NUM_THREADS"] in ("2", "1")
