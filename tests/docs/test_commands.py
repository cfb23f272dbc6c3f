"""Every command in a fenced block of README and docs/ is run, on a tiny model."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_cli import cli, runs, worker
from finetune_cli.engine.signals import Stop
from tests.docs.test_pages import EACH, ROOT, commands_of, skipped
from tests.helpers import model_folder, questions, write_recipe, write_rows

SMALL = ("max_steps=2", "precision=fp32", "data.max_length=640", "max_new_tokens=4", "metric_rows=2", "report_to=none")
"""What `finetune run` gets in addition, beside a tiny model."""
PAIRS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"It is not {i}."} for i in range(40)]
THEIRS = "model_name_or_path: a/b\ndataset_name: c/d\noutput_dir: out\nuse_peft: true\nlora_r: 8\npacking: true\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader's folder has: rows, a recipe, another tool's recipe, two finished runs. And a tiny model."""
    folder = tmp_path_factory.mktemp("world")
    tiny = model_folder(folder / "tiny")
    write_rows(folder / "train.jsonl", questions(40))
    write_rows(folder / "pairs.jsonl", PAIRS)
    (folder / "trl.yaml").write_text(THEIRS)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    own = {"model": str(tiny), "train": {"max_steps": 2, "learning_rate": 2e-4}}
    write_recipe(folder / "recipe.yaml", output_dir="runs/mine", **own, data={"train": "train.jsonl"})
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    """Run a command in a folder of its own; workers in this process."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def begin(plan: Any, start: Any, options: Any, lock: Any) -> int:
        code = worker.run(plan, Stop(), resume=start, anyway=options.anyway, as_json=options.as_json)
        return runs.report_end(plan, code)

    monkeypatch.setattr(runs, "begin", begin)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["finetune", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return run


@EACH
def test_every_command_runs(page, here, capfd):
    asked = [command for command in commands_of(page) if not skipped(command)]
    if any("runs/a" in command for command in asked):
        for name in ("runs/a", "runs/b"):
            assert here("run", "recipe.yaml", "--set", f"output_dir={name}") == 0
    if any("init sft" in command and " -o " not in command for command in asked):
        Path("recipe.yaml").unlink()
    for command in asked:
        program, name, *rest = shlex.split(command)
        assert program == "finetune", f"{command}: neither run nor in NOT_RUN"
        more = [f"name_or_path={Path('tiny').absolute()}"] if name in ("run", "validate", "preview-template") else []
        more += SMALL if name == "run" else []
        sets = [part for value in more for part in ("--set", value)]
        code = here(name, *rest, *sets)
        assert code in ((0, 4) if name == "doctor" else (0,)), (command, capfd.readouterr().err)
