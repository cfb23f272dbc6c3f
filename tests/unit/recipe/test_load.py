"""A recipe from text: shorthands, bases, options, paths, and what is said when something is wrong."""

import os
from pathlib import Path

import pytest

from finetune_cli.errors import RecipeError
from finetune_cli.recipe.load import load
from tests.unit.recipe.two_methods import One, Two

SECRET = "hf_abcdefghijklmnopqrstuvwxyz01"


def test_shorthands_expand(read, good: str, tmp_path: Path) -> None:
    text = good + "logging: {report_to: wandb}\nlora: {}\nquantization: null\n"
    loaded = read(text)
    assert loaded.data == {
        "method": {"name": "sft"},
        "model": {"name_or_path": "org/m"},
        "data": {"train": [{"path": str(tmp_path / "train.jsonl")}]},
        "output_dir": "runs/x",
        "logging": {"report_to": ["wandb"]},
        "lora": {},
        "quantization": None,
    }
    assert loaded.recipe.lora is not None
    assert loaded.recipe.lora.r == 16
    assert loaded.recipe.quantization is None


@pytest.mark.parametrize("sets", ["e.csv", "{path: e.csv}"])
def test_one_evaluation_set_has_no_name(read, good: str, sets: str, tmp_path: Path) -> None:
    loaded = read(good.replace("data: train.jsonl", f"data: {{train: [a.csv, {{path: b.csv}}], eval_sets: {sets}}}"))
    assert loaded.data["data"]["eval_sets"] == {"": {"path": str(tmp_path / "e.csv")}}
    assert [Path(s.path).name for s in loaded.recipe.data.train] == ["a.csv", "b.csv"]
    assert loaded.problem("data.eval_sets.path", "m").line == 3


def test_named_evaluation_sets(read, good: str) -> None:
    loaded = read(good.replace("data: train.jsonl", "data: {train: a.csv, eval_sets: {x: e.csv, path: {path: f.csv}}}"))
    assert set(loaded.recipe.data.eval_sets or {}) == {"x", "path"}


def test_a_list_is_data_train(read, good: str) -> None:
    assert len(read(good.replace("train.jsonl", "[a.csv, b.csv]")).recipe.data.train) == 2


def test_method_block_of_the_union(read, good: str, tmp_path: Path) -> None:
    loaded = read(good.replace("sft", "{name: dpo, loss_type: ipo, ref_model: ./m}"))
    assert loaded.data["method"] == {"name": "dpo", "loss_type": ["ipo"], "ref_model": str(tmp_path / "m")}


def test_every_problem_at_once_one_line_each(says) -> None:
    text = """\
method: {name: dpo, packing: true, bta: 1}
model: {name_or_path: org/m, max_length: 5}
data:
  trian: x.jsonl
  max_length: "2048"
lora: true
train:
  learning_rat: 1
  learning_rate: 5e-x
  max_seq_length: 4
  max_steps: 1e3
  global_batch_size: 0
  bf16: true
  precision: bf61
  gradient_checkpointing: yes
  seed: 3
  beta: 0.2
eval: {eval_strategy: false}
launch:
report_to: wandb
train.max_steps: 3
columns: {a: b}
"""
    assert says(text) == [
        "recipe.yaml:1:1  output_dir  required key missing; add `output_dir: runs/first`",
        "recipe.yaml:1:21  method.packing  unknown key; it belongs to method sft, not to dpo",
        "recipe.yaml:1:36  method.bta  unknown key; did you mean method.beta?",
        "recipe.yaml:2:30  model.max_length  unknown key; it belongs under data: (data.max_length)",
        "recipe.yaml:3:1  data.train  required key missing; add `train: train.jsonl`",
        "recipe.yaml:4:3  data.trian  unknown key; did you mean data.train?",
        "recipe.yaml:5:15  data.max_length  expected a whole number of at least 1, found text '2048'; "
        "take the quotes off",
        "recipe.yaml:6:7  lora  expected a mapping or null, found true; write `lora: {}` for LoRA with its defaults",
        "recipe.yaml:8:3  train.learning_rat  unknown key; did you mean train.learning_rate?",
        "recipe.yaml:9:18  train.learning_rate  expected a number above 0 or auto, found text '5e-x'",
        "recipe.yaml:10:3  train.max_seq_length  unknown key; here it is data.max_length",
        "recipe.yaml:11:14  train.max_steps  expected a whole number of at least 1 or null, found the number 1000.0; "
        "write 1000",
        "recipe.yaml:12:22  train.global_batch_size  expected a whole number of at least 1 or auto, found the number 0",
        "recipe.yaml:13:3  train.bf16  unknown key; here it is train.precision: bf16",
        "recipe.yaml:14:14  train.precision  expected auto, bf16, fp16 or fp32, found text 'bf61'; did you mean bf16?",
        "recipe.yaml:15:27  train.gradient_checkpointing  expected true, false or auto, found text 'yes'; write true",
        "recipe.yaml:16:3  train.seed  unknown key; it belongs at the top level",
        "recipe.yaml:17:3  train.beta  unknown key; it belongs under method: (method.beta)",
        "recipe.yaml:18:23  eval.eval_strategy  expected steps, epoch or no, found false; "
        "write no, which is text in YAML 1.2",
        "recipe.yaml:19:8  launch  expected a mapping, found nothing; leave launch: out, or put its keys under it",
        "recipe.yaml:20:1  report_to  unknown key; it belongs under logging: (logging.report_to)",
        "recipe.yaml:21:1  train.max_steps  unknown key; write `train:` and under it `max_steps:`",
        "recipe.yaml:22:1  columns  unknown key; it belongs to an item of data.train: (data.train[].columns)",
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("dpoo", "recipe.yaml:1:9  method  unknown method 'dpoo'; did you mean dpo?"),
        ("{name: xyz}", "recipe.yaml:1:16  method  unknown method 'xyz'; the methods are sft, dpo"),
        ("{name: 3}", "recipe.yaml:1:16  method  a method's name, not the number 3; the methods are sft, dpo"),
        ("{name: [1]}", "recipe.yaml:1:16  method  a method's name, not a list; the methods are sft, dpo"),
        ("{beta: 1}", "recipe.yaml:1:1  method.name  required key missing; add `name: sft`"),
        ("3", "recipe.yaml:1:9  method  expected a method (sft, dpo) or a mapping with its name, found the number 3"),
        ("{name: dpo, beta: 0}",
         "recipe.yaml:1:27  method.beta  expected a number above 0, found the number 0"),
        ("{name: dpo, loss_type: sigmoyd}",
         "recipe.yaml:1:32  method.loss_type[0]  expected sigmoid or ipo, found text 'sigmoyd'; did you mean sigmoid?"),
    ],
)  # fmt: skip
def test_methods_of_the_union(says, good: str, written: str, expected: str) -> None:
    assert says(good.replace("sft", written)) == [expected]


def test_a_single_method(says, good: str) -> None:
    assert says(good.replace("sft", "sff"), root=One) == [
        "recipe.yaml:1:9  method  unknown method 'sff'; did you mean sft?"
    ]
    assert says(good.replace("sft", "{name: sft, packin: true}"), root=One) == [
        "recipe.yaml:1:21  method.packin  unknown key; did you mean method.packing?"
    ]


def test_validators_speak_at_the_first_key_that_they_name(says, good: str) -> None:
    assert says(good + "train: {max_steps: 3, gradient_accumulation_steps: 2, global_batch_size: 2}") == [
        "recipe.yaml:5:55  train.global_batch_size  "
        "global_batch_size and gradient_accumulation_steps exclude each other; keep one"
    ]
    assert says(good + "lora: {}\nquantization: {bnb_4bit_quant_type: nf4, load_in_8bit: false}") == [
        "recipe.yaml:6:42  quantization.load_in_8bit  set exactly one of load_in_4bit and load_in_8bit to true"
    ]


def test_or_at_their_section(says, good: str) -> None:
    assert says(good + "lora: {}\nquantization: {bnb_4bit_quant_type: nf4}") == [
        "recipe.yaml:6:1  quantization  set exactly one of load_in_4bit and load_in_8bit to true"
    ]


def test_text_and_schema_problems_together(says, good: str) -> None:
    assert says(good + "seed: 1e999\nseed: 4\nsave: {save_step: 3}") == [
        "recipe.yaml:5:7  the number is too large; put it in quotes if it is text",
        "recipe.yaml:6:1  duplicate key seed; it is on line 5 already",
        "recipe.yaml:7:8  save.save_step  unknown key; did you mean save.save_steps?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\xff\xfea", "recipe.yaml:1:1  the file is not UTF-8 text; save it as UTF-8"),
        (b"a: 1\nb: \xff", "recipe.yaml:2:4  the file is not UTF-8 text; save it as UTF-8"),
        (b"- a", "recipe.yaml:1:1  expected a mapping: `method:`, `model:`, `data:`, ..."),
        (b"---\n", "recipe.yaml:1:1  the file is empty"),
        (b"#" * 1_000_001, "recipe.yaml:1:1  the file is larger than 1,000,000 bytes; is it a recipe?"),
    ],
)
def test_files_that_are_no_recipe(says, text: bytes, expected: str) -> None:
    assert says(text) == [expected]


def test_a_byte_order_mark_is_fine(says, good: str) -> None:
    assert says(b"\xef\xbb\xbf" + good.encode()) == []


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path, line in ((Path("no.yaml"), "no.yaml  no such file"), (tmp_path, ".  is a directory")):
        with pytest.raises(RecipeError) as caught:
            load(path)
        assert [str(p) for p in caught.value.problems] == [line]


# extends


def test_extends_merges_deep_and_child_wins(read, good: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/base.yaml").write_text(
        good + "lora: {r: 8}\ntrain: {max_steps: 5, learning_rate: 1e-4}\nignore: [FT001, FT002]\n"
        "logging: {logging_steps: 2}\n"
    )
    loaded = read("extends: sub/base.yaml\nlora: null\nignore: FT003\ntrain: {max_steps: 9}\nmethod: {packing: true}\n")
    assert "extends" not in loaded.data
    assert loaded.data["train"] == {"max_steps": 9, "learning_rate": 1e-4}
    assert loaded.data["ignore"] == ["FT003"]
    assert loaded.data["method"] == {"name": "sft", "packing": True}
    assert loaded.data["data"]["train"] == [{"path": str(tmp_path / "sub/train.jsonl")}]
    assert loaded.recipe.lora is None
    assert str(loaded.problem("logging.logging_steps", "m")) == "sub/base.yaml:8:11  logging.logging_steps  m"
    assert str(loaded.problem("train.max_steps", "m")) == "recipe.yaml:4:9  train.max_steps  m"


def test_another_method_replaces_the_whole_block(read, good: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(good.replace("sft", "{name: sft, packing: true}"))
    assert read("extends: base.yaml\nmethod: dpo\n").data["method"] == {"name": "dpo"}
    assert read("extends: base.yaml\nmethod: sft\n").data["method"] == {"name": "sft", "packing": True}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: recipe.yaml", "recipe.yaml:1:10  extends  recipe.yaml extends itself"),
        ("extends: no.yaml", "recipe.yaml:1:10  extends  no such file: no.yaml"),
        ("extends: https://x.org/a.yaml", "recipe.yaml:1:10  extends  only a local file can be extended"),
        ("extends: [a, b]", "recipe.yaml:1:10  extends  expected the path of one recipe file"),
    ],
)
def test_bases_that_cannot_be_read(says, text: str, expected: str) -> None:
    assert says(text) == [expected]


def test_a_chain_of_bases_is_bounded(says, tmp_path: Path) -> None:
    for n in range(30):
        (tmp_path / f"b{n}.yaml").write_text(f"extends: b{n + 1}.yaml\n")
    (line,) = says("extends: b0.yaml")
    assert line == "b9.yaml:1:10  extends  more than 10 files extend one another"


def test_problems_of_the_base_are_in_the_base(says, good: str, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(good + "train: {lr: 1}\n")
    assert says("extends: base.yaml\nsed: 1\n") == [
        "recipe.yaml:2:1  sed  unknown key; did you mean seed?",
        "base.yaml:5:9  train.lr  unknown key; here it is train.learning_rate",
    ]


# --set


def test_set_by_leaf_and_by_dotted_name(read, good: str, tmp_path: Path) -> None:
    loaded = read(
        good + "lora: {r: 8}\n", "learning_rate=1e-5", "train.max_steps=7", "beta=0.2", "method=dpo", "lora=null",
        "report_to=wandb", "data.eval_sets=e.csv", "seed=3",
    )  # fmt: skip
    assert loaded.data["train"] == {"learning_rate": 1e-5, "max_steps": 7}
    assert loaded.data["method"] == {"name": "dpo", "beta": 0.2}
    assert loaded.recipe.lora is None
    assert loaded.data["logging"] == {"report_to": ["wandb"]}
    assert loaded.data["data"]["eval_sets"] == {"": {"path": str(tmp_path / "e.csv")}}
    assert loaded.recipe.seed == 3
    assert str(loaded.problem("train.learning_rate", "m")) == "--set learning_rate=1e-5  train.learning_rate  m"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("learning_rate=x",
         "--set learning_rate=x  train.learning_rate  expected a number above 0 or auto, found text 'x'"),
        ("learning_rat=1", "--set learning_rat=1  learning_rat  unknown key; did you mean train.learning_rate?"),
        ("train.lr=1", "--set train.lr=1  train.lr  unknown key; here it is train.learning_rate"),
        ("beta=1", "--set beta=1  beta  unknown key; it belongs to method dpo, not to sft"),
        ("lora=true",
         "--set lora=true  lora  expected a mapping or null, found true; write `lora: {}` for LoRA with its defaults"),
        ("seed", "--set seed  expected KEY=VALUE, such as learning_rate=1e-5"),
        ("a..b=1", "--set a..b  expected KEY=VALUE, such as learning_rate=1e-5"),
        ("run_name=[1", "--set run_name=...  run_name  not valid YAML: did not find expected ',' or ']'"),
    ],
)  # fmt: skip
def test_options_that_are_wrong(says, good: str, option: str, expected: str) -> None:
    assert says(good, option) == [expected]


def test_a_missing_key_is_placed_in_the_file_not_at_the_option(says) -> None:
    assert says("method: sft\nmodel: {dtype: auto}\ndata: a.csv\noutput_dir: x", "model.layout=auto") == [
        "recipe.yaml:2:1  model.name_or_path  required key missing; add `name_or_path: Qwen/Qwen2.5-0.5B-Instruct`"
    ]


# paths


def test_paths_are_relative_to_the_file_that_names_them(read, good: str, tmp_path: Path) -> None:
    sub = tmp_path / "sub"
    (sub / "weights").mkdir(parents=True)
    (sub / "base.yaml").write_text(good.replace("org/m", "weights") + "eval: {metric: scores/m.py:f}\n")
    loaded = read("extends: sub/base.yaml\nmodel: {chat_template: t.jinja}\n", "data.eval_sets=../e.csv")
    assert loaded.recipe.model.name_or_path == str(sub / "weights")
    assert loaded.recipe.model.chat_template == str(tmp_path / "t.jinja")
    assert loaded.recipe.eval.metric == f"{sub}/scores/m.py:f"
    assert loaded.data["data"]["eval_sets"][""]["path"] == str(tmp_path.parent / "e.csv")
    assert loaded.recipe.output_dir == "runs/x"


@pytest.mark.parametrize("name", ["org/m", "builtin:smollm2-135m-instruct", "gpt2", "https://x.org/a.jsonl"])
def test_what_is_no_path_is_left_alone(read, good: str, name: str) -> None:
    assert read(good.replace("org/m", name)).recipe.model.name_or_path == name


def test_home(read, good: str) -> None:
    loaded = read(good.replace("runs/x", "~/runs").replace("org/m", "~/m"))
    assert loaded.recipe.output_dir == os.path.expanduser("~/runs")
    assert loaded.recipe.model.name_or_path == os.path.expanduser("~/m")


# secrets


@pytest.mark.parametrize(
    "line",
    [
        f"logging: {{run_name: {SECRET}}}",
        "logging: {run_name: sk-proj-abcdefghijklmnop0123}",
        "logging: {run_name: ghp_abcdefghijklmnopqrstuvwxyz0123456789}",
        "logging: {run_name: github_pat_abcdefghijklmnopqrstuvwxyz}",
        "logging: {run_name: AKIAABCDEFGHIJKLMNOP}",
        "logging: {run_name: xoxb-1234567890-abc}",
        "logging: {run_name: 'https://me:hunter2@x.org'}",
        "wandb_api_key: 0123456789abcdef0123456789abcdef01234567",
        "save: {password: hunter2}",
        "train: {lr_scheduler_kwargs: {token: hunter2}}",
        f"{SECRET}: 1",
        f"train: {{max_steps: {SECRET}}}",
        f"train: {{precision: {SECRET}}}",
        f"lora: {SECRET}",
        f"extends: {SECRET}",
        f"method: {{name: {SECRET}}}",
    ],
)
def test_secrets_are_refused_and_never_shown(says, good: str, line: str) -> None:
    text = good.replace("method: sft\n", "") if line.startswith("method") else good
    lines = says(f"{text}{line}\n")
    shown = "\n".join(lines)
    assert lines
    for secret in (SECRET, "sk-proj", "ghp_a", "github_pat_a", "AKIAA", "xoxb-1", "hunter2", "0123456789abcdef"):
        assert secret not in shown
    if not line.startswith(("extends", SECRET)):
        assert any(
            one.endswith("looks like a secret; use HF_TOKEN / WANDB_API_KEY in the environment") for one in lines
        )


@pytest.mark.parametrize(
    "option", [f"run_name={SECRET}", "hub_token=hunter2",
               f"model={{a: {SECRET}}}", "save={token: hunter2", f"{SECRET}=1",
               f"seed{SECRET}", "save={token: hunter2}", "token:hunter2"]
)  # fmt: skip
def test_secrets_in_options_are_never_shown(says, good: str, option: str) -> None:
    shown = "\n".join(says(good, option))
    assert shown
    assert SECRET not in shown
    assert "hunter2" not in shown


def test_a_commit_is_no_secret(read, good: str) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert read(good, f"revision={commit}").recipe.model.revision == commit


def test_long_values_are_shortened(says, good: str) -> None:
    (line,) = says(f"{good}train: {{optim: [1], precision: {'x' * 500}}}\n")[1:]
    assert len(line) < 200


def test_a_flood_of_problems_is_bounded(says, good: str) -> None:
    lines = says(good + "".join(f"key_{n}: 1\n" for n in range(20_000)))
    assert len(lines) <= 201


def test_dump_stands_alone(read, good: str, tmp_path: Path) -> None:
    loaded = read(good, "run_name='1e5'", "data.eval_sets=e.csv", "lora={}", "learning_rate=2e-5")
    path = tmp_path / "elsewhere" / "r.yaml"
    path.parent.mkdir()
    path.write_text(loaded.dump())
    again = load(path, root=Two)
    assert again.recipe == loaded.recipe
    assert again.data == loaded.data
    assert again.name == "elsewhere/r.yaml"


def test_a_typo_in_an_item_is_answered_with_its_place(says, good: str) -> None:
    text = good.replace("data: train.jsonl", "data: {train: [a.jsonl, {path: b.jsonl, wieght: 2}]}")
    (line,) = says(text)
    assert line.endswith("data.train[1].wieght  unknown key; did you mean data.train[1].weight?")
