"""Every recipe that comes along: what its header says, its plan on the hardware it names, and three steps of it on a
tiny random model of its family, in this process."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_cli import commands, runs, starting, worker
from finetune_cli.engine.signals import Stop
from finetune_cli.errors import MachineError, RecipeError
from finetune_cli.plan.machine import Gpu, Machine
from finetune_cli.plan.memory import fits
from finetune_cli.plan.shape import Shape, known_models
from finetune_cli.recipe.load import load
from finetune_cli.shipped import recipes_folder
from finetune_cli.use import zoo
from tests.helpers import CHATML, LLAMA3, QWEN3, journal, tiny_tokenizer

ZOO = zoo.entries()
BY_NAME = {one.name: one for one in ZOO}
EACH = pytest.mark.parametrize("one", ZOO, ids=lambda one: one.name)
SMALL = (
    "max_steps=3", "per_device_train_batch_size=2", "global_batch_size=2", "precision=fp32", "data.max_length=640",
    "max_new_tokens=4", "sample_prompts=1", "metric_rows=2", "logging_steps=1", "report_to=none", "num_processes=1",
)  # fmt: skip
TEMPLATES = {"meta-llama/": (LLAMA3, "<|eot_id|>"), "Qwen/Qwen3": (QWEN3, "<|im_end|>"), "": (CHATML, "<|im_end|>")}


def tiny_of(name: str, folder: Path) -> Path:
    """A random model of two layers, of the family of `name`, with a tokenizer and a template like its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    template, stop = next(found for start, found in TEMPLATES.items() if name.startswith(start))
    tokenizer = tiny_tokenizer(template, bos="<s>" if template is LLAMA3 else None, eos=stop)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "initializer_range": 0.1}
    end = tokenizer.convert_tokens_to_ids(stop)
    known = known_models()[name]
    tied, ends = known["tie_word_embeddings"], {"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    ends |= {"bos_token_id": tokenizer.bos_token_id}
    config = AutoConfig.for_model(
        known["model_type"], vocab_size=len(tokenizer), tie_word_embeddings=tied, **sizes, **ends
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


DISTINCT = "def distinct(prompts, responses, rows):\n    return [float(len(set(r))) for r in responses]\n"


def unalike(one: zoo.Entry, folder: Path) -> tuple[str, ...]:
    """Beside a function of a recipe's own, which gives short random answers all the same, one that tells them apart."""
    if one.method != "ppo":
        return ()
    (folder / "distinct.py").write_text(DISTINCT)
    own = [str(one.path.parent / reward.source) for reward in one.loaded.recipe.method.reward]
    return (f"method.reward={json.dumps([*own, f'{folder}/distinct.py:distinct'])}",)


def run_here(path: Path, model: Path, output: Path, *more: str) -> dict[str, Any]:
    """Three steps in this process; report.json."""
    overrides = [f"name_or_path={model}", f"output_dir={output}", *SMALL, *more]
    plan, loaded, _ = commands.planned(path, overrides)
    runs.claim(plan, loaded, resume=False, overwrite=False)
    worker.work(plan, Stop(), resume=None, anyway=False, as_json=False)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a recipe starts from, tiny: a model of its family, or the adapter that the recipe it follows has made."""
    made: dict[str, Path] = {}

    def start(one: zoo.Entry) -> Path:
        name = one.model
        if name not in made:
            folder = tmp_path_factory.mktemp("start")
            if name.startswith("../runs/"):
                before = BY_NAME[name.removeprefix("../runs/")]
                run_here(before.path, start(before), folder / "run")
                made[name] = folder / "run"
            else:
                made[name] = tiny_of(name, folder)
        return made[name]

    return start


@EACH
def test_three_steps_on_a_tiny_model_of_its_family(one, started, tmp_path, monkeypatch, one_thread):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = run_here(one.path, started(one), tmp_path / "run", *unalike(one, tmp_path))
    assert (report["steps"], report["method"], report["status"]) == (3, one.method, "finished")
    lines = [line for line in journal(tmp_path / "run") if line["event"] == "train"]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    assert report["rows"]["kept"] == report["rows"]["read"]


@EACH
def test_it_is_planned_on_the_hardware_it_names(one, monkeypatch):
    if one.model.startswith("../runs/"):
        pytest.skip("it goes on from another recipe's run, and is planned where that is")
    found = zoo.GPUS.search(one.facts["hardware"])
    gpus = [Gpu(name="a GPU", memory_gib=float(found["size"]), compute_capability=8.9)] if found else []
    machine = Machine(cpus=2, memory_gib=16, gpus=gpus, cpu_bf16=True)
    monkeypatch.setattr("finetune_cli.plan.machine.look", lambda: machine)
    heard: list[Any] = []
    plan = commands.checked(one.path, [], heard.append).plan
    assert [problem for problem in heard if problem.severity == "error"] == []
    assert plan.resolved.precision == "bf16"
    if found:
        lora = plan.recipe.lora is not None
        assert plan.resolved.learning_rate == plan.recipe.method.rates(lora=lora).default
        assert plan.resolved.gradient_checkpointing
        assert one.estimated_gib is not None
        assert int(found["size"]) in fits(one.estimated_gib)


@EACH
def test_its_header_and_its_name_say_what_it_is(one):
    assert one.about.endswith(".")
    assert set(one.facts) in ({"hardware"}, {"hardware", "time", "memory", "result"})
    assert (one.seconds is None, one.memory_gib is None) == (("time" not in one.facts),) * 2
    assert f"$schema=../schemas/recipe.schema.json\n# {one.about[:20]}" in one.path.read_text()
    recipe, parts = one.loaded.recipe, one.name.split("-")
    for part, there in (("qlora", recipe.quantization is not None), ("full", recipe.lora is None)):
        assert (part in parts) <= there
    assert one.method in parts or one.name == "quickstart"
    size = zoo.GPUS.search(one.facts["hardware"])
    assert (f"{size['size']}gb" if size else None) == (parts[-1] if parts[-1].endswith("gb") else None)
    assert "extends" not in one.path.read_text()  # `finetune init` copies one file and what it names


def test_every_method_has_one_to_run_on_a_cpu_and_one_for_a_7b_model():
    methods = {"sft", "dpo", "orpo", "reward", "ppo"}
    assert {one.method for one in ZOO if one.name.startswith("qwen2.5-7b-")} == methods
    assert {one.method for one in ZOO if "CPU" in one.facts["hardware"]} == methods


def test_known_models_have_the_weights_that_their_cards_say():
    cards = {
        "builtin:smollm2-135m-instruct": 134_515_008, "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
        "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512, "Qwen/Qwen3-4B": 4_022_468_096, "Qwen/Qwen3-8B": 8_190_735_360,
        "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248, "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    }  # fmt: skip
    for name, weights in cards.items():
        shape = Shape.of(known_models()[name])
        assert shape is not None
        assert shape.weights == weights


def test_a_header(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "# yaml-language-server: $schema=x\n# Some words,\n# and more.\n# hardware: 2 GPUs of 24 GB\n"
        "# time: 1.5 h of training\n# memory: 12.5 GiB\n# result: loss 2 to 1\nmethod: sft\n# hardware: not this\n"
    )
    found = zoo.entry(tmp_path / "x.yaml")
    assert (found.name, found.about, found.seconds, found.memory_gib) == ("x", "Some words, and more.", 5400.0, 12.5)
    assert found.facts["hardware"] == "2 GPUs of 24 GB"
    assert found.facts["result"] == "loss 2 to 1"


def test_the_list(capsys):
    assert starting.recipes(as_json=False) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["name"].split() == ["name", "method", "hardware", "time", "memory"]
    assert lines["quickstart"].endswith("132 s         3.3 GiB")
    assert "not measured  about" in lines["qwen2.5-7b-dpo-lora-24gb"]
    assert lines["qwen2.5-7b-dpo-lora-24gb"].endswith("GiB (estimated)")
    assert starting.recipes(as_json=True) == 0
    told = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert told.keys() == BY_NAME.keys()
    quick = told["quickstart"]
    assert (quick["method"], quick["model"]) == ("sft", "builtin:smollm2-135m-instruct")
    assert (quick["measured"]["seconds"], quick["measured"]["memory_gib"]) == (132.0, 3.3)
    assert told["dpo-orders"]["model"] == "../runs/quickstart"
    assert told["qwen2.5-7b-dpo-lora-24gb"]["measured"] is None


@EACH
def test_init_copies_it_with_what_it_names(one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert starting.init(one.name, None) == 0
    loaded = load(Path("recipes") / f"{one.name}.yaml")
    for path in (*(source.path for source in loaded.recipe.data.train),):
        assert Path(path).is_relative_to(tmp_path)
        assert Path(path).read_bytes() == (recipes_folder() / "data" / Path(path).name).read_bytes()
    for _, script in loaded.recipe.method.scripts():
        assert Path(script).is_relative_to(tmp_path)
        assert Path(script).is_file()
    if one.model.startswith("../runs/"):
        assert loaded.recipe.model.name_or_path == str(tmp_path / "runs" / one.model.removeprefix("../runs/"))
    assert loaded.recipe.model_dump(exclude={"data", "model", "method"}) == one.loaded.recipe.model_dump(
        exclude={"data", "model", "method"}
    )


def test_init_elsewhere_and_where_something_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert starting.init("dpo-orders", Path("deep/er/mine.yaml")) == 0
    assert load(Path("deep/er/mine.yaml")).recipe.model.name_or_path == str(tmp_path / "runs" / "quickstart")
    with pytest.raises(RecipeError, match="exists"):
        starting.init("dpo-orders", Path("deep/er/mine.yaml"))
    assert starting.init("orpo-orders", Path("deep/er/other.yaml")) == 0  # the same rows are there already
    Path("deep/er/data/orders_pairs.jsonl").write_text("mine\n")
    with pytest.raises(RecipeError, match="another file"):
        starting.init("orpo-orders", Path("deep/er/third.yaml"))
    assert not Path("deep/er/third.yaml").exists()
    with pytest.raises(RecipeError, match="no method or recipe 'orpo-order'"):
        starting.init("orpo-order", None)
    shutil.rmtree("deep")
    Path("deep").write_text("a file")
    with pytest.raises(MachineError, match="cannot be written"):
        starting.init("quickstart", Path("deep/mine.yaml"))
