"""The command as people and programs meet it: right exit codes, one screen, no traceback, and quick to answer."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_cli import cli
from tests.helpers import finetune, questions, said, write_rows

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """(exit code, stdout, stderr) of `finetune ...` in this process and an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["finetune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return caught.value.code or 0, out, err

    return run


def fails(result, code, *texts):
    """The code, nothing on stdout, and one screen on stderr that holds these texts."""
    found, out, err = result
    assert (found, out) == (code, ""), err
    assert 1 <= len(err.splitlines()) <= 24
    for text in texts:
        assert text in err
    return err


# --- the recipe: 2


def test_no_such_recipe(command):
    fails(command("validate", "nowhere.yaml"), 2, "nowhere.yaml", "no such file")


@pytest.mark.parametrize("name", ["run", "validate", "plan", "preview-template"])
def test_every_command_refuses_a_wrong_recipe_with_all_its_problems(command, recipe_of, name):
    path = recipe_of(train={"learning_rat": 1, "max_steps": "many"}, lora={"r": 0}, odd={"a": 1})
    err = fails(command(name, path), 2, "train.learning_rat", "did you mean train.learning_rate?", "train.max_steps")
    assert "lora.r" in err
    assert "odd" in err
    assert "4 problems" in err
    assert str(path.name) + ":" in err


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ("max_steps=lots", ["train.max_steps"]),
        ("max_step=3", ["max_steps"]),
        ("nonsense", ["nonsense"]),
        ("method=dpoo", ["method"]),
        ("learning_rate=5", ["train.learning_rate", "FT016", "2e-05 to 0.0005"]),
        ("optim=galore_adamw", ["train.optim", "FT102", "parameter groups"]),
        ("strategy=zero3", ["launch.strategy"]),
        ("output_dir=", ["output_dir"]),
        ("seed=-1", ["seed"]),
    ],
)
def test_wrong_values(command, recipe_of, change, texts):
    fails(command("validate", recipe_of(), "--fast", "--set", change), 2, *texts)


def test_a_recipe_that_is_not_yaml(command, tmp_path):
    (tmp_path / "r.yaml").write_text("method: [sft\nmodel: x")
    fails(command("run", "r.yaml"), 2, "r.yaml:")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00\x01\x02")
    fails(command("run", "r.yaml"), 2, "r.yaml")
    (tmp_path / "r.yaml").write_text("")
    fails(command("run", "r.yaml"), 2, "empty")
    fails(command("run", tmp_path), 2, "directory")


def test_an_adapter_on_an_adapter(command, recipe_of, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "x/y"}')
    path = recipe_of(model={"name_or_path": str(tmp_path / "adapter")})
    fails(command("validate", path, "--fast"), 2, "FT103", "lora")


def test_quantised_weights_need_an_adapter(command, recipe_of, tmp_path):
    asked = ("--set", "quantization={load_in_4bit: true}")
    assert command("validate", recipe_of(), "--fast", *asked)[0] == 0
    fails(command("validate", recipe_of(lora=None), "--fast", *asked), 2, "FT104", "add `lora: {}`")
    (tmp_path / "x.gguf").touch()
    whole = ("--set", f"name_or_path={tmp_path / 'x.gguf'}")
    fails(command("validate", recipe_of(), "--fast", *asked, *whole), 2, "FT104", ".gguf")


def test_windows_is_told_where_it_runs(command, recipe_of, monkeypatch):
    assert (os.name == "nt") == cli.WINDOWS
    monkeypatch.setattr(cli, "WINDOWS", True)
    fails(command("validate", recipe_of(), "--fast"), 4, "does not run on Windows itself", "WSL 2")


def test_own_options_are_checked(command, recipe_of):
    fails(command("run", recipe_of(), "--resume", "--overwrite"), 2, "exclude each other")
    code, _, err = command("run", recipe_of(), "--resum")
    assert code == 2
    assert "--resum" in err
    assert command("rnu")[0] == 2


# --- the rows: 3


@pytest.mark.parametrize("options", [("validate", "--fast"), ("validate",), ("plan",), ("run",), ("preview-template",)])
def test_data_that_is_not_there(command, recipe_of, tmp_path, options):
    write_rows(tmp_path / "other.jsonl", questions(1))
    path = recipe_of(data={"train": "gone.jsonl", "eval_sets": {"good": "also_gone.jsonl"}})
    err = fails(command(options[0], path, *options[1:]), 3, "data.train.0.path", "gone.jsonl does not exist")
    assert "that folder has other.jsonl" in err
    seen = options[0] != "preview-template"  # which shows what is trained on
    assert ("2 problems" in err, "data.eval_sets.good.path" in err) == (seen, seen)


def test_template_and_metric_files_that_are_not_there(command, recipe_of):
    path = recipe_of(model={"chat_template": "gone.jinja"}, eval={"metric": "gone.py:f"})
    fails(command("validate", path, "--fast"), 3, "model.chat_template", "gone.jinja", "eval.metric", "gone.py")


BAD_ROWS = {
    "not json": '{"messages": [\n',
    "another shape": '{"question": "a", "answer": "b"}\n',
    "no list": '{"messages": 3}\n',
    "unknown role": json.dumps({"messages": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]})
    + "\n",
    "empty file": "",
    "nothing to train": json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n",
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows(command, recipe_of, tmp_path, kind):
    path = recipe_of()
    (tmp_path / "train.jsonl").write_text(BAD_ROWS[kind])
    fails(command("validate", path), 3, "train.jsonl" if kind != "nothing to train" else "no_targets")


def test_too_many_dropped_rows(command, recipe_of):
    rows = [*questions(3), {"messages": said("a", "word " * 300)}]
    fails(
        command("validate", recipe_of(rows=rows)),
        3,
        "1 of 4 rows are dropped",
        "overlength",
        "max_dropped_fraction 0.05",
    )
    code, out, _ = command("validate", recipe_of(rows=rows), "--set", "max_dropped_fraction=0.25")
    assert code == 0
    assert "3 of 4" in out


@pytest.mark.slow
def test_bad_rows_of_a_run_are_told_once_by_the_parent(recipe_of, tmp_path):
    """The worker meets them; with two of them there is still one message."""
    path = recipe_of(rows=[{"messages": 3}])
    done = finetune("run", str(path), "--set", "num_processes=2", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("data error") == 1
    assert "train.jsonl" in done.stderr
    assert len(done.stderr.splitlines()) < 12
    error = json.loads((tmp_path / "run" / "error.json").read_text())
    assert error["exit_code"] == 3


# --- the machine: 4


@pytest.mark.parametrize("where", ["file/run", "file"])
def test_a_run_folder_that_cannot_be_written(command, recipe_of, tmp_path, where):
    (tmp_path / "file").write_text("")
    code, _, err = command("run", recipe_of(output_dir=str(tmp_path / where)))
    assert code == 4
    assert "cannot be written" in err


@pytest.mark.slow
def test_an_unknown_tracker(recipe_of, tmp_path):
    path = recipe_of(logging={"report_to": "tensorbord"})
    done = finetune("run", str(path), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "unknown tracker 'tensorbord'; did you mean tensorboard?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- the model: 5


def test_models_that_are_not_there_or_no_models(command, recipe_of, tmp_path):
    def of(name):
        return command("validate", recipe_of(model={"name_or_path": name}), "--fast")

    fails(of("./gone"), 5, "gone does not exist")
    fails(of(str(tmp_path / "gone.gguf")), 5, "gone.gguf does not exist")
    (tmp_path / "empty").mkdir()
    fails(of(str(tmp_path / "empty")), 5, "has no config.json (found: nothing)")
    fails(of(str(tmp_path / "train.jsonl")), 5, "is a file, not a model")
    (tmp_path / "empty" / "config.json").write_text("{torn")
    fails(of(str(tmp_path / "empty")), 5, "config.json is not valid JSON")


def test_a_folder_without_a_tokenizer(command, recipe_of, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "llama"}')
    path = recipe_of(model={"name_or_path": str(tmp_path / "bare")})
    assert command("validate", path, "--fast")[0] == 0
    fails(command("validate", path), 5, "the tokenizer of", "cannot be loaded")


def test_an_adapter_without_a_base(command, recipe_of, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    path = recipe_of(model={"name_or_path": str(tmp_path / "adapter")}, lora=None)
    fails(command("validate", path), 5, "does not say which model it belongs to")


# --- for programs


def test_json_of_validate(command, recipe_of):
    code, out, _ = command("validate", recipe_of(), "--json")
    value = json.loads(out)
    assert (code, value["ok"], value["exit_code"], value["problems"]) == (0, True, 0, [])
    assert value["rows"]["train"]["kept"] == 12
    code, out, _ = command("validate", recipe_of(train={"learning_rat": 1}), "--json", "--fast")
    value = json.loads(out)
    assert (code, value["ok"], value["exit_code"]) == (2, False, 2)
    (problem,) = value["problems"]
    assert problem["key"] == "train.learning_rat"
    assert problem["line"] > 0
    assert problem["severity"] == "error"


def test_warnings_are_told_and_can_be_accepted(command, recipe_of):
    """1e-3 with LoRA is beyond 5e-4, and not ten times."""
    code, out, err = command("validate", recipe_of(train={"learning_rate": 1e-3}), "--fast")
    assert code == 0
    assert "FT016" in err
    assert "fine" in out
    code, out, _ = command("validate", recipe_of(train={"learning_rate": 1e-3}), "--fast", "--json")
    assert [(p["rule"], p["severity"]) for p in json.loads(out)["problems"]] == [("FT016", "warning")]
    code, _, err = command("validate", recipe_of(train={"learning_rate": 1e-3}, ignore=["FT016", "FT033"]), "--fast")
    assert (code, err) == (0, "")


def test_warnings_of_the_rows_are_told_with_their_place(command, recipe_of):
    path = recipe_of(rows=[*questions(12), *questions(2)])
    code, out, err = command("validate", path)
    assert code == 0
    assert "recipe.yaml:" in err
    assert "first: train.jsonl:13, 14" in err
    assert "[FT032]" in err
    assert "fine (schema, lints, files, tokenizer and rows), 1 warning" in out
    assert "are trained (" in out
    code, out, _ = command("validate", path, "--json")
    value = json.loads(out)
    assert [p["rule"] for p in value["problems"]] == ["FT032"]
    assert value["weights"]["trained"] < value["weights"]["total"]


def test_no_rule_stops_a_preview(command, recipe_of):
    path = recipe_of(train={"learning_rate": 5.0}, output_dir=None)
    assert command("validate", path)[0] == 2
    path = recipe_of(train={"learning_rate": 5.0})
    assert "FT016" in command("validate", path)[2]
    assert command("preview-template", path, "--json")[0] == 0


@pytest.mark.slow
def test_a_run_makes_the_same_checks_before_weights_are_read(recipe_of, tmp_path, tiny_model_folder):
    """A warning is told once and is in the report; an error stops the run, with its place and exit code."""
    path = recipe_of(rows=[*questions(12), *questions(2)], ignore=[])
    done = finetune("run", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.rpartition("[")[2] for line in done.stderr.splitlines()] == ["FT033]", "FT032]"]
    assert done.stderr.count("recipe.yaml:") == 2
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [line.partition(" ")[0] for line in report["warnings"]] == ["FT033", "FT032"]
    copy = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    path = recipe_of(model={"name_or_path": str(copy)}, lora={"target_modules": ["nothing"]})
    done = finetune("run", str(path), "--overwrite", cwd=tmp_path)
    assert done.returncode == 5, done.stderr
    assert "recipe.yaml:" in done.stderr
    assert "lora.target_modules 'nothing' fits no layer" in done.stderr.replace('["nothing"]', "'nothing'").replace(
        "['nothing']", "'nothing'"
    )
    assert "[FT030]" in done.stderr


def test_json_of_plan_is_a_plan(command, recipe_of):
    from finetune_cli.plan.resolve import Plan

    code, out, _ = command("plan", recipe_of(), "--json", "--set", "learning_rate=1e-4")
    assert code == 0
    plan = Plan.model_validate_json(out)
    assert plan.resolved.learning_rate == 1e-4
    assert plan.origins["train.learning_rate"] == "recipe"


def test_plan_shows_every_key_with_its_origin(command, recipe_of):
    code, out, _ = command("plan", recipe_of(train={"learning_rate": "auto"}))
    assert code == 0
    for text in (
        "train.learning_rate",
        "0.0002",
        "auto: sft with LoRA training",
        "data.max_length",
        "default",
        "recipe",
    ):
        assert text in out


@pytest.mark.slow
def test_json_of_run_is_a_line_an_event_and_nothing_else(recipe_of, tmp_path):
    done = finetune("run", str(recipe_of()), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    names = [event["event"] for event in events]
    assert names[:2] == ["rows", "start"]
    assert names[-1] == "end"
    assert names.count("train") == 3
    assert events[-1]["report"]["status"] == "finished"
    assert done.stderr == ""


def test_preview_in_json(command, recipe_of):
    code, out, _ = command("preview-template", recipe_of(), "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row["row"] for row in rows] == list(range(12))
    assert all(len(row["input_ids"]) == len(row["trained"]) for row in rows)


def test_preview_on_screen_and_as_a_page(command, recipe_of, tmp_path):
    recipe = recipe_of()
    code, out, _ = command("preview-template", recipe)
    assert (code, out.count("▌assistant")) == (0, 3)
    code, out, err = command("preview-template", recipe, "--html", "page.html", "-n", "5")
    assert (code, out, "5 rows" in err) == (0, "", True)
    assert (tmp_path / "page.html").read_text().count('class="row') == 5
    code, out, _ = command("preview-template", recipe, "--json", "-n", "2")
    assert (code, len(out.splitlines())) == (0, 2)
    code, out, _ = command("preview-template", recipe, "--where", "overlength", "--json")
    assert (code, out) == (0, "")
    fails(command("preview-template", recipe, "--row", "12"), 3, "there is no row 12", "12 rows")


# --- looking things up


def test_init_writes_a_recipe_that_is_fine_but_for_its_data(command, tmp_path):
    code, out, _ = command("init", "sft")
    assert code == 0
    assert "finetune validate recipe.yaml" in out
    first = (tmp_path / "recipe.yaml").read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=file://")
    schema = Path(first.partition("file://")[2])
    assert json.loads(schema.read_text())["properties"]["method"]
    err = fails(command("validate", "recipe.yaml", "--fast"), 3, "train.jsonl does not exist")
    assert err.count("does not exist") == 1
    write_rows(tmp_path / "train.jsonl", questions(1))
    assert command("validate", "recipe.yaml", "--fast")[0] == 0
    fails(command("init", "sft"), 2, "recipe.yaml exists")
    assert command("init", "sft", "-o", "second.yaml")[0] == 0


def test_init_of_what_is_no_method(command, tmp_path):
    fails(command("init", "sftt"), 2, "'sftt'", "sft")
    fails(command("init", "../sft"), 2)
    fails(command("init", "sft", "-o", "no/such/folder.yaml"), 4, "cannot be written")
    assert not (tmp_path / "recipe.yaml").exists()


def test_init_of_a_recipe_that_comes_along_can_be_checked_at_once(command):
    code, out, _ = command("init", "quickstart")
    assert code == 0
    assert "finetune run recipes/quickstart.yaml" in out
    assert command("validate", "recipes/quickstart.yaml", "--fast")[0] == 0
    fails(command("init", "quickstart"), 2, "recipes/quickstart.yaml exists")


def test_lists(command):
    code, out, _ = command("recipes")
    assert code == 0
    assert "quickstart" in out
    assert "yaml-language-server" not in out
    code, out, _ = command("methods")
    assert code == 0
    assert out.startswith("sft")
    code, out, _ = command("methods", "sft")
    assert code == 0
    assert "loss_on = null" in out
    assert "packing = false" in out
    assert "messages" in out
    code, out, _ = command("methods", "ppo")
    assert code == 0
    assert "reward (required)" in out
    fails(command("methods", "sftt"), 2, "'sftt'")


def test_schema_is_a_schema(command):
    import jsonschema

    code, out, _ = command("schema")
    assert code == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(out))


# --- quick to answer


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["validate", "{}", "--fast"],
        ["plan", "{}"],
        ["methods"],
        ["recipes"],
        ["init", "quickstart", "-o", "r/q.yaml"],
        ["schema"],
        ["explain"],
    ],
)
def test_nothing_heavy_is_imported(recipe_of, tmp_path, arguments):
    code = (
        "import sys\n"
        "from finetune_cli.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    path = str(recipe_of())
    command = [sys.executable, "-c", code, *(argument.format(path) for argument in arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


# --- put right in the file


def test_fix_writes_the_file_and_goes_on(command, recipe_of):
    path = recipe_of(lora=None, seed=3)
    text = path.read_text() + "lora:  # adapters\n  rank: 4  # few\nuse_peft: true\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    err = fails_after(command("validate", path, "--fast", "--fix"), 2, "lora.rank is now lora.r")
    assert "use_peft" in err
    after = path.read_bytes()
    assert after == b"\xef\xbb\xbf" + text.replace("rank: 4", "r: 4").replace("\n", "\r\n").encode()
    fails_after(command("validate", path, "--fast", "--fix"), 2, "nothing to put right")
    assert path.read_bytes() == after


def test_fix_in_json(command, recipe_of):
    path = recipe_of(lora=None)
    path.write_text(path.read_text() + "lora_r: 4\nlora_rank: 5\nlearningrate: 1\n")
    code, out, _ = command("validate", path, "--fast", "--fix", "--json")
    value = json.loads(out)
    assert code == value["exit_code"] == 2
    assert [sorted(one) for one in (*value["fixed"]["moved"], *value["fixed"]["left"])] == [["key", "reason", "to"]] * 3
    assert "fixed" not in json.loads(command("validate", path, "--fast", "--json")[1])


def test_fix_of_what_is_not_there(command, tmp_path):
    fails(command("validate", "nowhere.yaml", "--fix"), 2, "no such file")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    fails(command("validate", "binary.yaml", "--fix"), 2, "binary.yaml")


def fails_after(result, code, text):
    found, out, err = result
    assert found == code, err
    assert text in out
    return err


# --- what programs read


def test_explain_and_methods_in_json(command):
    code, out, _ = command("explain", "ft016", "--json")
    assert (code, json.loads(out)["id"]) == (0, "FT016")
    code, out, _ = command("explain", "--json")
    assert {"id", "title", "severity", "why", "remedy"} == set(json.loads(out)[0])
    code, out, _ = command("methods", "dpo", "--json")
    assert json.loads(out)["keys"]["beta"]["default"] == 0.1
    code, out, _ = command("methods", "--json")
    assert [each["name"] for each in json.loads(out)] == ["sft", "dpo", "orpo", "reward", "ppo"]


def test_a_failure_always_has_a_problem_for_programs(command, recipe_of, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    code, out, _ = command("validate", recipe_of(data={"train": str(tmp_path / "empty.jsonl")}), "--json")
    result = json.loads(out)
    assert (code, result["ok"]) == (3, False)
    assert [("has no rows" in problem["message"]) for problem in result["problems"]] == [True]


def test_lints_and_files_come_before_a_model_that_is_not_there(command, recipe_of, tmp_path):
    gone = recipe_of(model={"name_or_path": str(tmp_path / "gone")})
    fails(command("validate", gone, "--set", "learning_rate=1.0"), 2, "train.learning_rate")
    fails(command("validate", gone, "--set", f"data.train={tmp_path}/none.jsonl"), 3, "none.jsonl does not exist")
    err = fails(command("validate", gone), 5, "gone does not exist", "model.name_or_path")
    assert "recipe.yaml:26:3" in err
    _, out, _ = command("validate", gone, "--json")
    assert [problem["key"] for problem in json.loads(out)["problems"]] == ["model.name_or_path"]


def test_an_empty_section_that_switches_something_on_is_no_answer(command, recipe_of):
    path = recipe_of()
    text = path.read_text().split("lora:")[0] + "lora:\n" + "train:" + path.read_text().split("train:", 2)[2]
    path.write_text(text)
    fails(command("validate", path, "--fast"), 2, "lora", "write `lora: {}` for its defaults, or `lora: null`")
    path.write_text(text.replace("lora:\n", "lora: null\n"))
    assert command("validate", path, "--fast", "--set", "learning_rate=2e-5")[0] == 0


def test_an_attention_that_this_machine_has_not(command, recipe_of):
    for kernel in ("varlen", "flash_attention_2"):
        result = command("validate", recipe_of(), "--fast", "--set", f"model.attn_implementation={kernel}")
        fails(result, 2, f"{kernel} needs an NVIDIA GPU", "FT117")


def test_rewards_that_are_not_there(command, recipe_of, tmp_path):
    asked = [{"prompt": row["messages"][:1]} for row in questions(12)]

    def ppo(reward):
        return recipe_of(rows=asked, method={"name": "ppo", "reward": reward})

    fails(command("validate", ppo("./nofolder"), "--fast"), 3, "nofolder does not exist", "method.reward")
    fails(command("validate", ppo("judge.py"), "--fast"), 2, "name the function in it: judge.py:FUNCTION")


def test_warnings_of_lints_are_told_to_programs(command, recipe_of):
    warned = recipe_of(ignore=[])
    code, _, err = command("plan", warned, "--json")
    assert code == 0
    assert "FT033" in err


def test_a_preview_asks_for_its_own_files_alone(command, recipe_of, tmp_path):
    path = recipe_of(data={"eval_sets": str(tmp_path / "gone.jsonl")}, eval={"metric": "gone.py:f"})
    code, out, _ = command("preview-template", path, "--json", "--row", "0")
    assert (code, json.loads(out)["row"]) == (0, 0)


@pytest.mark.slow
def test_a_refused_resume_leaves_a_finished_run_as_it_was(recipe_of, tmp_path):
    path = recipe_of(ignore=[])
    first = finetune("run", str(path), "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "FT033" in [json.loads(line).get("rule") for line in first.stdout.splitlines()]
    run = next(folder.parent for folder in tmp_path.rglob("report.json"))
    before = {name: (run / name).read_bytes() for name in ("plan.json", "recipe.yaml", "report.json")}
    refused = finetune("run", str(path), "--resume", "--set", "max_steps=1", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert {name: (run / name).read_bytes() for name in before} == before
    assert not (run / "error.json").exists()
