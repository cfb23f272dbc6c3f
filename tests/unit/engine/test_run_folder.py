"""The run folder that people script against: what is in it, what it says, how it is gone on with."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune_cli import commands, replaced, runs, worker
from finetune_cli.engine import manifest
from finetune_cli.engine.signals import Stop
from finetune_cli.errors import DataError, MachineError, RecipeError
from tests.helpers import finetune, journal, questions, write_rows

TRAIN = {
    "event", "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "mean_token_accuracy",
    "tokens_per_second", "memory_gib", "seconds",
}  # fmt: skip
REPORT = {
    "method", "model", "rows", "tokens", "steps", "seconds", "tokens_per_second", "peak_memory_gib",
    "estimated_memory_gib", "first", "last", "result", "versions", "fingerprint", "status",
}  # fmt: skip
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
FULL = {"config.json", "model.safetensors"}


@pytest.fixture
def run_here(job_of, monkeypatch):
    """Claim the folder and do the worker's work in this process; (plan, job)."""

    def run(recipe, *overrides, resume=False, overwrite=False, anyway=False):
        from finetune_cli.engine import finish

        plan, loaded, _ = commands.planned(recipe, overrides)
        options = runs.Options(resume=resume, anyway=anyway)
        start = runs.resumed(plan, options, mend=True) if resume else None
        runs.claim(plan, loaded, start=start, resume=resume, overwrite=overwrite)
        jobs, real = [], finish.finish
        monkeypatch.setattr(finish, "finish", lambda job, *rest: jobs.append(job) or real(job, *rest))
        worker.work(plan, Stop(), resume=start, anyway=anyway, as_json=False)
        monkeypatch.setattr(finish, "finish", real)
        return plan, jobs[0]

    return run


@pytest.fixture
def eval_rows(tmp_path):
    return str(write_rows(tmp_path / "eval.jsonl", questions(3, first=20)))


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_everything_that_the_contract_names(recipe_of, run_here, eval_rows):
    """Five steps of four of 12 rows, evaluated and saved after steps 2, 4 and 5."""
    path = recipe_of(
        data={"eval_sets": eval_rows},
        train={"max_steps": 5},
        eval={"eval_steps": 2, "sample_prompts": 2},
        save={"save_steps": 2},
        logging={"logging_steps": 2, "report_to": "tensorboard"},
    )
    plan, job = run_here(path)
    run = plan.run
    assert names(run) == {
        "recipe.yaml", "plan.json", "metrics.jsonl", "report.json", "report.html", "trainer_state.json",
        "README.md", "tensorboard",
        "checkpoint-2", "checkpoint-4", "checkpoint-5",
    } | TOKENIZER | ADAPTER  # fmt: skip
    training = {"optimizer.pt", "scheduler.pt", "rng_0.pt", "trainer_state.json", "manifest.json"}
    assert names(run / "checkpoint-2") == training | TOKENIZER | ADAPTER
    assert all(manifest.damage(folder) is None for folder in manifest.found(run))
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    assert (run / "chat_template.jinja").read_text() == job.tokenizer.chat_template
    assert worker.Plan.model_validate_json((run / "plan.json").read_text()) == plan

    lines = journal(run)
    assert {line["event"] for line in lines} == {"train", "eval", "sample", "checkpoint"}
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 4, 5]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0, 2, 4, 5]
    assert lines[0]["event"] == "eval"
    assert [(n["step"], n["path"]) for n in lines if n["event"] == "checkpoint"] == [
        (step, f"checkpoint-{step}") for step in (2, 4, 5)
    ]
    assert all(isinstance(line["step"], int) and isinstance(line["epoch"], float) for line in lines)
    assert [line["epoch"] for line in lines if line["event"] == "train"] == [0.3333, 0.6667, 1.3333, 1.6667]
    for line in lines:
        if line["event"] == "train":
            assert set(line) == TRAIN
        elif line["event"] == "eval":
            assert set(line) == {"event", "step", "epoch", "eval_loss", "eval_entropy", "eval_mean_token_accuracy"}
        elif line["event"] == "sample":
            assert set(line) == {"event", "step", "epoch", "prompt", "answer", "reference", "row"}
    samples = [line for line in lines if line["event"] == "sample"]
    assert [(s["step"], s["row"]) for s in samples] == [(step, row) for step in (0, 2, 4, 5) for row in (0, 1)]
    assert samples[0]["prompt"] == questions(1, first=20)[0]["messages"][0]["content"]
    assert samples[0]["reference"] == questions(1, first=20)[0]["messages"][1]["content"]

    report = json.loads((run / "report.json").read_text())
    assert set(report) >= REPORT
    assert (report["status"], report["method"], report["steps"]) == ("finished", "sft", 5)
    assert report["model"] == plan.recipe.model.name_or_path
    kept = {key: report["rows"][key] for key in ("read", "kept", "dropped", "truncated")}
    assert kept == {"read": 12, "kept": 12, "dropped": {}, "truncated": 0}
    rows = job.data.rows  # steps of four: all twelve, then the first two steps of the second epoch
    again = [rows[i] for step in (3, 4) for i in job.schedule.step(step)]
    assert report["tokens"] == {
        "total": sum(row.length for row in [*rows, *again]), "trained": sum(row.targets for row in [*rows, *again])
    }  # fmt: skip
    trained = [line for line in lines if line["event"] == "train"]
    assert trained[-1]["num_tokens"] == report["tokens"]["total"]
    assert report["seconds"] == pytest.approx(sum(line["seconds"] for line in trained), rel=0.05, abs=0.02)
    assert report["tokens_per_second"] == pytest.approx(report["tokens"]["total"] / report["seconds"])
    evals = [line for line in lines if line["event"] == "eval"]
    assert report["first"]["eval_loss"] == evals[0]["eval_loss"]
    assert report["last"]["eval_loss"] == evals[-1]["eval_loss"]
    assert report["first"]["loss"] == trained[0]["loss"]
    assert report["last"]["loss"] == trained[-1]["loss"]
    best = min(evals[1:], key=lambda line: line["eval_loss"])["step"]
    assert report["result"] == {"checkpoint": f"checkpoint-{best}", "step": best, "is": "best"}
    assert report["fingerprint"] == plan.fingerprint
    assert report["peak_memory_gib"] > 0.1
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    assert state["log_history"] == lines
    card = (run / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    (chosen,) = (line for line in evals if line["step"] == best)
    assert report["result_metrics"]["eval_loss"] == chosen["eval_loss"]
    assert f"| {evals[0]['eval_loss']:.4g} | {chosen['eval_loss']:.4g} |" in card


def test_without_eval_rows_there_are_samples_of_training_rows_and_the_last_is_the_result(recipe_of, run_here):
    plan, _ = run_here(recipe_of())
    lines = journal(plan.run)
    assert not [line for line in lines if line["event"] == "eval"]
    assert {line["step"] for line in lines if line["event"] == "sample"} == {0, 1, 2, 3}
    report = json.loads((plan.run / "report.json").read_text())
    assert report["result"] == {"checkpoint": "checkpoint-3", "step": 3, "is": "last"}


IDS = torch.arange(40, 60)[None]


@pytest.mark.parametrize("dora", [False, True])
def test_adapter_loads_with_plain_peft(recipe_of, run_here, dora):
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan, job = run_here(recipe_of(lora={"use_dora": dora}))
    with torch.no_grad():
        wanted = job.generator.eval()(input_ids=IDS).logits
        base = AutoModelForCausalLM.from_pretrained(plan.recipe.model.name_or_path)
        assert float((base(input_ids=IDS).logits - wanted).abs().max()) > 1e-4
        auto = AutoPeftModelForCausalLM.from_pretrained(plan.run)
        for model in (auto, PeftModel.from_pretrained(base, plan.run)):
            torch.testing.assert_close(model.eval()(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(plan.run).chat_template == job.tokenizer.chat_template
    config = json.loads((plan.run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == plan.recipe.model.name_or_path
    assert config["inference_mode"] is True


def test_full_fine_tuning_loads_with_plain_transformers(recipe_of, run_here, tiny_model_folder):
    from transformers import AutoModelForCausalLM, GenerationConfig

    plan, job = run_here(recipe_of(lora=None, train={"learning_rate": 5e-5}))
    assert names(plan.run) >= TOKENIZER | FULL
    assert not names(plan.run) & ADAPTER
    model = AutoModelForCausalLM.from_pretrained(plan.run).eval()
    with torch.no_grad():
        wanted = job.generator.eval()(input_ids=IDS).logits
        torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    assert model.config.use_cache is True
    assert (plan.run / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    of_base, of_run = (GenerationConfig.from_pretrained(folder) for folder in (tiny_model_folder, plan.run))
    assert of_run.eos_token_id == of_base.eos_token_id


def test_an_adapter_goes_on(recipe_of, run_here, tmp_path):
    """The result of a run is a model to start from; its first loss is that of the end, not of the base."""
    first, _ = run_here(recipe_of(train={"max_steps": 6}, data={"eval_sets": str(tmp_path / "train.jsonl")}))
    path = recipe_of(
        name="more.yaml", lora=None, model={"name_or_path": str(first.run)}, output_dir=str(tmp_path / "more"),
        data={"eval_sets": str(tmp_path / "train.jsonl")},
    )  # fmt: skip
    second, _ = run_here(path)
    assert second.facts.kind == "adapter"
    start = next(line["eval_loss"] for line in journal(second.run) if line["event"] == "eval")
    best = min(line["eval_loss"] for line in journal(first.run) if line["event"] == "eval" and line["step"])
    assert start == pytest.approx(best, rel=1e-5)
    assert names(second.run) >= ADAPTER


METRIC = '''
import json, os, time
from pathlib import Path

def scripted(answers, references):
    """The next number of scores.json; waits for ever at the call that hang.txt names."""
    here = Path(__file__).parent
    calls = here / "calls.txt"
    number = int(calls.read_text()) if calls.exists() else 0
    own = here / f"calls-{os.getpid()}.txt"  # two processes call: what one reads, the other is not just writing
    own.write_text(str(number + 1))
    own.replace(calls)
    hang = here / "hang.txt"
    if hang.exists() and int(hang.read_text()) == number:
        (here / "hangs").write_text(str(os.getpid()))
        time.sleep(300)
    scores = json.loads((here / "scores.json").read_text())
    return [float(scores[number])] * len(answers)
'''


@pytest.fixture
def scripted(tmp_path):
    """A metric that gives these numbers, call by call."""

    def write(*scores, hang=None):
        (tmp_path / "metric.py").write_text(METRIC)
        (tmp_path / "scores.json").write_text(json.dumps(scores))
        for name in ("calls.txt", "hang.txt", "hangs"):
            (tmp_path / name).unlink(missing_ok=True)
        if hang is not None:
            (tmp_path / "hang.txt").write_text(str(hang))
        return f"{tmp_path / 'metric.py'}:scripted"

    return write


@pytest.mark.parametrize(("limit", "kept"), [(1, [3, 6]), (2, [3, 6]), (3, [3, 5, 6]), (None, [1, 2, 3, 4, 5, 6])])
def test_best_and_last_are_kept(recipe_of, run_here, scripted, eval_rows, limit, kept):
    """The metric is best at step 3 of 6 (step 0 is higher, and no candidate); every step is saved."""
    path = recipe_of(
        data={"eval_sets": eval_rows},
        train={"max_steps": 6},
        eval={"eval_steps": 1, "metric": scripted(0.95, 0.1, 0.2, 0.9, 0.3, 0.9, 0.5), "metric_rows": 2},
        save={"save_steps": 1, "save_total_limit": limit},
    )
    plan, _ = run_here(path)
    assert [manifest.step_of(folder) for folder in manifest.found(plan.run)] == kept
    report = json.loads((plan.run / "report.json").read_text())
    assert report["result"] == {"checkpoint": "checkpoint-3", "step": 3, "is": "best"}
    assert report["last"]["eval_scripted"] == 0.5
    result, best, last = (
        (plan.run / folder / "adapter_model.safetensors").read_bytes()
        for folder in ("", "checkpoint-3", "checkpoint-6")
    )
    assert result == best
    assert result != last


def test_last_is_the_result_where_the_recipe_says_so(recipe_of, run_here, scripted, eval_rows):
    path = recipe_of(
        data={"eval_sets": eval_rows},
        eval={"eval_steps": 1, "metric": scripted(0.1, 0.9, 0.2, 0.3)},
        save={"save_steps": 2, "load_best_model_at_end": False},
    )
    plan, _ = run_here(path)
    assert [folder.name for folder in manifest.found(plan.run)] == ["checkpoint-2", "checkpoint-3"]
    report = json.loads((plan.run / "report.json").read_text())
    assert report["result"] == {"checkpoint": "checkpoint-3", "step": 3, "is": "last"}


def start_and_wait_for_hang(path, tmp_path):
    """A run through the command, once it waits in its metric."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_cli", "run", str(path)],
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    return process


@pytest.mark.slow
def test_killed_run_goes_on_and_ends_as_if_it_had_not_been(recipe_of, run_here, scripted, eval_rows, tmp_path):
    """Saved after steps 2 and 4, killed in the evaluation after step 5; dropout is on, so generators matter too."""
    scores = (0.5, 0.9, 0.3, 0.2, 0.1, 0.1, 0.1)
    sections = {
        "data": {"eval_sets": eval_rows},
        "lora": {"lora_dropout": 0.1},
        "train": {"max_steps": 7},
        "eval": {"eval_steps": 1, "sample_prompts": 0},
        "save": {"save_steps": 2, "load_best_model_at_end": False},
    }
    sections["eval"]["metric"] = scripted(*scores, 0.1)
    whole, _ = run_here(recipe_of(**sections, output_dir=str(tmp_path / "whole")))

    sections["eval"]["metric"] = scripted(*scores, 0.1, hang=5)
    path = recipe_of(**sections, output_dir=str(tmp_path / "cut"))
    process = start_and_wait_for_hang(path, tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    cut = tmp_path / "cut"
    assert [folder.name for folder in manifest.found(cut)] == ["checkpoint-2", "checkpoint-4"]
    assert max(line["step"] for line in journal(cut)) == 5
    (cut / "checkpoint-6.writing").mkdir()  # what a kill while saving leaves

    scripted(*scores[5:], 0.1)
    refused = finetune("run", str(path), cwd=tmp_path)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = finetune("run", str(path), "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(run / "adapter_model.safetensors") for run in (whole.run, cut))
    assert one.keys() == other.keys()
    assert all(bool((one[name] == other[name]).all()) for name in one)
    lines, wanted = journal(cut), journal(whole.run)
    keys = ("event", "step", "epoch", "loss", "grad_norm", "learning_rate", "num_tokens", "eval_loss")
    assert [[line.get(k) for k in keys] for line in lines] == [[line.get(k) for k in keys] for line in wanted]
    first, second = (json.loads((run / "report.json").read_text()) for run in (whole.run, cut))
    assert {k: first[k] for k in ("tokens", "steps", "result", "fingerprint")} == {
        k: second[k] for k in ("tokens", "steps", "result", "fingerprint")
    }
    assert first["first"]["loss"] == second["first"]["loss"]

    again = finetune("run", str(path), "--resume", cwd=tmp_path)
    assert again.returncode == 0
    assert "finished" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to", "processes", "code"),
    [(signal.SIGTERM, os.kill, 1, 143), (signal.SIGTERM, os.kill, 2, 143), (signal.SIGINT, os.killpg, 1, 130)],
    ids=["SIGTERM", "SIGTERM to two processes", "Ctrl-C"],
)
def test_exit_code_of_a_run_that_is_stopped(recipe_of, scripted, eval_rows, tmp_path, number, to, processes, code):
    """By a scheduler, which signals the parent; or by Ctrl-C, which the terminal sends to all of them."""
    path = recipe_of(
        data={"eval_sets": eval_rows},
        eval={"metric": scripted(*[0.1] * 9, hang=0)},
        launch={"num_processes": processes},
    )
    process = start_and_wait_for_hang(path, tmp_path)
    to(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said


def test_resume_passes_over_a_damaged_checkpoint(recipe_of, run_here):
    path = recipe_of(train={"max_steps": 4}, save={"save_steps": 1})
    plan, _ = run_here(path)
    wanted = (plan.run / "adapter_model.safetensors").read_bytes()
    (plan.run / "report.json").unlink()
    (plan.run / "checkpoint-4" / "manifest.json").unlink()
    with (plan.run / "checkpoint-3" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x99")
    run_here(path, resume=True)
    assert (plan.run / "adapter_model.safetensors").read_bytes() == wanted
    assert [line["step"] for line in journal(plan.run) if line["event"] == "train"] == [1, 2, 3, 4]


def test_full_fine_tuning_resumes(recipe_of, run_here):
    """The weights are those of the checkpoint, not of the model that the recipe names."""
    path = recipe_of(lora=None, train={"max_steps": 4, "learning_rate": 5e-5}, save={"save_steps": 2})
    plan, _ = run_here(path)
    wanted = (plan.run / "model.safetensors").read_bytes()
    (plan.run / "report.json").unlink()
    shutil.rmtree(plan.run / "checkpoint-4")
    run_here(path, resume=True)
    assert (plan.run / "model.safetensors").read_bytes() == wanted


def test_resume_without_the_best_checkpoint_still_ends(recipe_of, run_here, scripted, eval_rows):
    """The best so far was removed by hand: the run ends with the best of what there is."""
    path = recipe_of(
        data={"eval_sets": eval_rows},
        train={"max_steps": 4},
        eval={"eval_steps": 1, "metric": scripted(0.1, 0.9, 0.2, 0.3, 0.4, 0.3)},
        save={"save_steps": 3},
    )
    plan, _ = run_here(path)
    (plan.run / "report.json").unlink()
    for name in ("checkpoint-1", "checkpoint-4"):
        shutil.rmtree(plan.run / name)
    run_here(path, resume=True)
    report = json.loads((plan.run / "report.json").read_text())
    assert report["result"] == {"checkpoint": "checkpoint-4", "step": 4, "is": "best"}


def test_resume_of_another_recipe_is_refused(recipe_of, run_here):
    path = recipe_of(train={"max_steps": 4}, save={"save_steps": 2})
    plan, _ = run_here(path)
    (plan.run / "report.json").unlink()
    with pytest.raises(RecipeError, match=r"train.learning_rate: 0.0005 -> 0.001"):
        run_here(path, "learning_rate=1e-3", resume=True)


def test_run_folder_of_another_run_is_refused_or_replaced(recipe_of, run_here):
    path = recipe_of(save={"save_steps": 1})
    plan, _ = run_here(path)
    with pytest.raises(RecipeError, match="holds another run") as caught:
        run_here(path)
    assert caught.value.exit_code == 2
    assert "--overwrite" in caught.value.hint
    (plan.run / "notes.txt").write_text("mine")
    run_here(path, "max_steps=2", overwrite=True)
    assert [folder.name for folder in manifest.found(plan.run)] == ["checkpoint-1", "checkpoint-2"]
    assert json.loads((plan.run / "report.json").read_text())["steps"] == 2
    assert (plan.run / "notes.txt").read_text() == "mine"


def test_a_run_is_replaced_only_by_one_that_has_its_rows_and_its_model(recipe_of, tiny_model_folder, tmp_path):
    """Broken rows, or weights that cannot be read, are found when the old run is aside already: the folder is then what
    it was, to the byte."""
    path = recipe_of(train={"max_steps": 1})
    assert finetune("run", str(path), cwd=tmp_path).returncode == 0
    run = tmp_path / "run"
    (run / "notes.txt").write_text("mine")
    before = content(run)
    path = recipe_of(rows=[{"messages": 3}], train={"max_steps": 2})
    done = finetune("run", str(path), "--overwrite", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert content(run) == before
    broken = Path(shutil.copytree(tiny_model_folder, tmp_path / "broken"))
    os.truncate(broken / "model.safetensors", 1000)
    done = finetune("run", str(recipe_of(model={"name_or_path": str(broken)})), "--overwrite", cwd=tmp_path)
    assert done.returncode != 0, done.stderr
    assert content(run) == before
    path = recipe_of(train={"max_steps": 2})
    assert finetune("run", str(path), "--overwrite", cwd=tmp_path).returncode == 0
    assert json.loads((run / "report.json").read_text())["steps"] == 2
    assert (run / "notes.txt").read_text() == "mine"
    assert replaced.ASIDE not in names(run)


class Killed(BaseException):
    """In place of SIGKILL."""


def cut_after(monkeypatch, many):
    """The move of a path after `many` of them is never done, nor any that follows."""
    real, done = Path.rename, []

    def rename(path, target):
        done.append(path)
        if len(done) > many:
            raise Killed
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def finished_run(recipe_of, run_here):
    plan, _ = run_here(recipe_of(train={"max_steps": 1}))
    (plan.run / "notes.txt").write_text("mine")
    return plan.run


def test_killed_at_any_move_the_run_comes_back_whole(finished_run, monkeypatch, tmp_path):
    """On its way aside, and again on its way back."""
    before, moves = content(finished_run), len(replaced.written(finished_run)) + 1
    assert moves > 8
    for cut in range(moves):
        with monkeypatch.context() as patch:
            cut_after(patch, cut)
            with pytest.raises(Killed):
                replaced.put_aside(finished_run)
        with monkeypatch.context() as patch, suppress(Killed):
            cut_after(patch, cut // 2)
            replaced.put_back(finished_run)
        replaced.put_back(finished_run)
        assert content(finished_run) == before, cut
    for cut in range(moves):
        replaced.put_aside(finished_run)
        (finished_run / "plan.json").write_text("that of the successor")
        with monkeypatch.context() as patch:
            cut_after(patch, cut)
            with pytest.raises(Killed):
                replaced.put_back(finished_run)
        assert replaced.put_back(finished_run)
        assert content(finished_run) == before, cut
    assert not replaced.put_back(finished_run)


def test_a_file_that_cannot_be_moved_leaves_all_as_it_was(finished_run, monkeypatch):
    before, real = content(finished_run), Path.rename

    def rename(path, target):
        if path.name == "report.json" and path.parent == finished_run:
            raise OSError(errno.EBUSY, "in use")
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="in use"):
            replaced.put_aside(finished_run)
    assert content(finished_run) == before


def test_what_was_let_go_does_not_come_back(finished_run, monkeypatch):
    replaced.put_aside(finished_run)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            replaced.let_go(finished_run)
    assert not replaced.waits(finished_run)
    assert not replaced.put_back(finished_run)
    assert names(finished_run) == {"notes.txt"}


def test_resume_after_a_killed_overwrite_is_of_the_run_that_was_there(finished_run, recipe_of, capsys):
    """It is finished: nothing is trained over it."""
    before = content(finished_run)
    plan, loaded, _ = commands.planned(recipe_of(train={"max_steps": 1}), [])
    replaced.put_aside(finished_run)
    (finished_run / "plan.json").write_text(plan.model_dump_json())
    assert runs.run(plan, loaded, runs.Options(resume=True)) == 0
    assert "nothing is left to resume" in capsys.readouterr().err
    assert {name: text for name, text in content(finished_run).items() if name in before} == before


def test_overwriting_leaves_no_adapter_beside_whole_weights(recipe_of, run_here):
    """transformers would load what is left of the old adapter on top of the new result."""
    plan, _ = run_here(recipe_of())
    assert names(plan.run) >= ADAPTER
    run_here(recipe_of(lora=None, train={"learning_rate": 5e-5}), overwrite=True)
    assert names(plan.run) >= FULL
    assert not names(plan.run) & ADAPTER


def test_overwriting_in_a_folder_of_weights_that_no_run_wrote_removes_none(recipe_of, run_here, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.safetensors").write_text("mine")
    (run / "metrics.jsonl").write_text("")
    run_here(recipe_of(), overwrite=True)
    assert (run / "model.safetensors").read_text() == "mine"


def test_a_run_that_failed_before_its_first_step_is_simply_run_again(recipe_of, run_here):
    """error.json alone is no result to be protected."""
    path = recipe_of()
    run = path.parent / "run"
    run.mkdir()
    (run / "error.json").write_text("{}")
    (run / "plan.json").write_text("{}")
    run_here(path)
    assert not (run / "error.json").exists()
    assert (run / "report.json").exists()


def test_end_of_a_worker_that_could_not_say_why(recipe_of):
    """Killed by a signal: a stop that came before it listened, or the system's."""
    plan, _, _ = commands.planned(recipe_of(), [])
    assert runs.report_end(plan, -signal.SIGTERM) == 143
    assert runs.report_end(plan, -signal.SIGINT) == 130
    assert runs.report_end(plan, 0) == 0
    with pytest.raises(MachineError, match="killed by SIGKILL"):
        runs.report_end(plan, -signal.SIGKILL)


def test_error_of_a_worker_is_its_own_class_with_its_problems(recipe_of):
    plan, loaded, _ = commands.planned(recipe_of(rows=[{"messages": 3}, {"messages": 4}]), [])
    runs.claim(plan, loaded, resume=False, overwrite=False)
    assert worker.run(plan, Stop(), resume=None, anyway=False, as_json=False) == 3
    with pytest.raises(DataError) as caught:
        runs.report_end(plan, 3)
    assert [problem.line for problem in caught.value.problems] == [1, 2]
    assert not (plan.run / "traceback.txt").exists()


def unfinished(run_here, path, *, steps=2):
    """A run of four steps whose last checkpoint is of step 2, as if it had been killed after it."""
    plan, _ = run_here(path)
    (plan.run / "report.json").unlink()
    for folder in manifest.found(plan.run):
        if manifest.step_of(folder) > steps:
            shutil.rmtree(folder)
    return plan


def test_harmless_and_rounding_changes_go_on(recipe_of, run_here, caplog):
    path = recipe_of(train={"max_steps": 4}, save={"save_steps": 2})
    plan = unfinished(run_here, path)
    with caplog.at_level("WARNING", logger="finetune_cli"):
        run_here(path, "save_steps=1", "logging_steps=2", "per_device_train_batch_size=4", resume=True)
    assert "per_device_train_batch_size: 2 -> 4: the same training to rounding" in caplog.text
    assert "save_steps" not in caplog.text
    assert [line["step"] for line in journal(plan.run) if line["event"] == "train"] == [1, 2, 4]


def test_training_keys_stop_with_the_list_and_anyway_goes_on(recipe_of, run_here, caplog):
    path = recipe_of(train={"max_steps": 4}, save={"save_steps": 2})
    plan = unfinished(run_here, path)
    before = (plan.run / "plan.json").read_text()
    changed = ("learning_rate=1e-3", "weight_decay=0.5", "seed=7")
    with pytest.raises(RecipeError) as caught:
        run_here(path, *changed, resume=True)
    for line in ("seed: 42 -> 7; the order of the rows", "train.learning_rate: 0.0005 -> 0.001", "train.weight_decay"):
        assert line in caught.value.message
    assert "--resume-anyway" in caught.value.hint
    assert caught.value.exit_code == 2
    assert (plan.run / "plan.json").read_text() == before  # nothing was written
    with caplog.at_level("WARNING", logger="finetune_cli"):
        _, job = run_here(path, *changed, resume=True, anyway=True)
    assert "train.weight_decay: 0.0 -> 0.5: the new value holds from here on" in caplog.text
    assert {group["weight_decay"] for group in job.optimizer.param_groups} == {0.5}
    rates = {line["step"]: line["learning_rate"] for line in journal(plan.run) if line["event"] == "train"}
    assert rates[3] == pytest.approx(1e-3 * 0.5)  # half of the cosine of four steps
    assert rates[2] == pytest.approx(5e-4 * (1 + 0.5**0.5) / 2)


def test_another_method_or_no_adapter_is_no_resume_at_all(recipe_of, run_here):
    path = recipe_of(train={"max_steps": 4, "learning_rate": 5e-5}, save={"save_steps": 2})
    unfinished(run_here, path)
    full = recipe_of(name="full.yaml", lora=None, train={"max_steps": 4, "learning_rate": 5e-5})
    with pytest.raises(RecipeError, match="lora: ") as caught:
        run_here(full, resume=True, anyway=True)
    assert "--resume-anyway" not in caught.value.hint


def test_rows_are_compared_not_their_path(recipe_of, run_here, tmp_path):
    path = recipe_of(train={"max_steps": 4}, save={"save_steps": 2})
    plan = unfinished(run_here, path)
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    moved = recipe_of(name="moved.yaml", train={"max_steps": 4}, save={"save_steps": 2})
    moved.write_text(moved.read_text().replace("train.jsonl", "moved.jsonl"))
    run_here(moved, resume=True)
    (plan.run / "report.json").unlink()
    for folder in manifest.found(plan.run)[1:]:
        shutil.rmtree(folder)
    with (tmp_path / "moved.jsonl").open("a") as file:
        file.write(json.dumps(questions(1, first=77)[0]) + "\n")
    with pytest.raises(RecipeError, match="the rows are not those that checkpoint-2 was trained on") as caught:
        run_here(moved, resume=True)
    assert caught.value.exit_code == 2
    run_here(moved, resume=True, anyway=True)


@pytest.mark.parametrize("finished", [True, False])
def test_more_steps_are_a_supported_change(recipe_of, run_here, caplog, finished):
    """The schedule is that of the longer run from here on, of a finished run too; fewer steps than done are refused."""
    path = recipe_of(train={"max_steps": 4}, save={"save_steps": 2})
    plan = unfinished(run_here, path, steps=4 if finished else 2)
    if finished:
        run_here(path, resume=True)
        assert runs.ended(plan)
    longer, _, _ = commands.planned(path, ["max_steps=8"])
    assert not runs.ended(longer)
    with caplog.at_level("WARNING", logger="finetune_cli"):
        run_here(path, "max_steps=8", resume=True)
    start = 4 if finished else 2
    wanted = 5e-4 * (1 + math.cos(math.pi * start / 8)) / 2
    was = 0.0 if finished else 2.5e-4
    said = f"schedule is now that of 8 steps: the learning rate of step {start + 1} is {wanted:.3g}, it would have been"
    assert f"{said} {was:.3g}" in caplog.text
    rates = {line["step"]: line["learning_rate"] for line in journal(plan.run) if line["event"] == "train"}
    assert rates[start + 1] == pytest.approx(wanted)
    assert sorted(rates) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert json.loads((plan.run / "report.json").read_text())["steps"] == 8
    with pytest.raises(RecipeError, match="past the end of this run, which has 3 steps"):
        run_here(path, "max_steps=3", resume=True)


def test_another_recipe_is_no_finished_run(recipe_of, run_here):
    path = recipe_of()
    plan, _ = run_here(path)
    assert runs.ended(plan)
    assert runs.ended(commands.planned(path, ["save_steps=1"])[0])
    with pytest.raises(RecipeError, match=r"train\.learning_rate"):
        runs.ended(commands.planned(path, ["learning_rate=1e-3"])[0])


@pytest.mark.slow
def test_interrupted_run_ends_with_the_same_bits(recipe_of, run_here, tmp_path):
    """Through the command, in two processes; Ctrl-C goes to all of them, and comes again through the parents."""
    sections = {
        "lora": {"lora_dropout": 0.1}, "train": {"max_steps": 400}, "launch": {"num_processes": 2},
        "save": {"save_steps": 400}, "logging": {"logging_steps": 7}, "eval": {"eval_strategy": "no"},
    }  # fmt: skip
    path = recipe_of(**sections)
    whole = finetune("run", str(path), "--set", f"output_dir={tmp_path / 'whole'}", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "finetune_cli", "run", str(path)]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    said = ""
    while "step    14" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said + rest
    assert "Traceback" not in rest
    [saved] = manifest.found(tmp_path / "run")
    assert f"saved as {saved.name}" in rest
    assert "--resume" in rest
    assert 14 <= manifest.step_of(saved) < 400
    assert manifest.read(saved)["world_size"] == 2
    done = finetune("run", str(path), "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "whole"))
    assert all(bool((one[name] == other[name]).all()) for name in one)
    numbers = [
        [{k: line.get(k) for k in ("step", "loss", "grad_norm")} for line in journal(tmp_path / name) if "loss" in line]
        for name in ("run", "whole")
    ]
    assert numbers[0] == numbers[1]


def test_what_was_merged_before_the_first_checkpoint_is_made_anew(recipe_of):
    """It may be of another adapter; a run that goes on from a checkpoint needs what it has."""
    plan, loaded, _ = commands.planned(recipe_of(), ())
    base = plan.run / "base"
    base.mkdir(parents=True)
    runs.claim(plan, loaded, start=plan.run / "checkpoint-1", resume=True, overwrite=False)
    assert base.exists()
    runs.claim(plan, loaded, resume=True, overwrite=False)
    assert not base.exists()
    base.mkdir()
    runs.claim(plan, loaded, resume=False, overwrite=False)
    assert not base.exists()


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 4), (RuntimeError("gone"), 143)])
def test_a_save_that_fails_after_a_signal_is_not_called_saved(recipe_of, monkeypatch, error, code):
    plan, _, _ = commands.planned(recipe_of(), ())
    plan.run.mkdir(parents=True)
    stop = Stop()
    stop.number = 15
    stop._heard.set()

    def work(*_args, **_more):
        raise error

    monkeypatch.setattr(worker, "work", work)
    assert worker.run(plan, stop, resume=None, anyway=False, as_json=False) == code
    assert (plan.run / "error.json").exists() == (code == 4)
