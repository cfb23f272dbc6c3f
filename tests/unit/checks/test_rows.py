"""Rules on rows, in files and as they are trained: each tripped once, each silent once, none upset by odd rows."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_cli.types import Branch, Row
from tests.helpers import CHATML, model_folder, questions, said, tiny_tokenizer, write_rows
from tests.unit.checks.conftest import pair, trips, with_rows

LONG = {"messages": said("one", "two " * 300)}
EMPTY = {"messages": said("one", "")}


def template(tmp_path, text):
    path = tmp_path / "t.jinja"
    path.write_text(text)
    return {"chat_template": str(path)}


def test_ft001_rows_in_which_nothing_is_trained(of):
    rows = [*questions(30), EMPTY]
    (problem,) = of("FT001", rows=rows)
    assert problem.severity == "warning"
    assert "1 of 31 rows (3.2%) are dropped as empty, the first " in problem.message
    assert "train.jsonl:31: messages[1].content is empty text" in problem.message
    (problem,) = of("FT001", rows=[*questions(10), EMPTY, EMPTY])
    assert (problem.severity, problem.line) == ("error", 11)
    assert problem.message.endswith("then train.jsonl:12")
    assert of("FT001") == []


def test_ft002_rows_longer_than_max_length(of):
    rows = [*questions(30), LONG]
    (problem,) = of("FT002", rows=rows)
    assert "of 31 rows 1 row dropped at 128 tokens (data.overlength: drop)" in problem.message
    assert "lengths: p50 " in problem.message
    longest = int(re.search(r"max (\d+)", problem.message)[1])
    assert of("FT002", f"max_length={longest}", rows=rows) == []
    (problem,) = of("FT002", "overlength=truncate", rows=rows)
    assert problem.severity == "warning"
    assert "1 row cut at 128 tokens (data.overlength: truncate)" in problem.message
    too_long = {"messages": said("one " * 200, "two")}
    (problem,) = of("FT002", "overlength=truncate", "max_dropped_fraction=0.5", rows=[*rows, too_long])
    assert "of 32 rows 1 row dropped and 1 row cut" in problem.message
    (problem,) = of("FT002", "overlength=error", rows=rows)
    assert (problem.severity, problem.line) == ("error", 31)


def ends_in(tmp_path, stop, *, more=()):
    """A model whose template ends turns with `stop`."""
    folder = model_folder(tmp_path / "m")
    tokenizer = tiny_tokenizer(CHATML.replace("<|im_end|>", stop), more=more)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(tokenizer)}))
    return {"model": {"name_or_path": str(folder)}}


def test_ft003_no_answer_ends_in_a_stop_token(of, tmp_path):
    (problem,) = of("FT003", **ends_in(tmp_path, " END"))
    assert "none of the 12 trained answers ends in a token that stops inference: '<|im_end|>' (" in problem.message
    assert of("FT003") == []


def test_ft003_a_method_that_trains_no_answers_is_not_asked(seen):
    from finetune_cli.methods.reward import Reward

    scored = Row([5], (Branch([60, 70, 80], [False, False, True], "chosen"),))
    assert trips("FT003", "rows", with_rows(seen, scored))
    recipe = seen.recipe.model_copy(update={"method": Reward()})
    ranks = replace(seen, plan=seen.plan.model_copy(update={"recipe": recipe}))
    assert trips("FT003", "rows", with_rows(ranks, scored)) == []


def test_ft004_some_answers_do_not_end_in_a_stop_token(seen):
    stop = seen.stops[0]
    good = [Row([5], (Branch([60, 70, stop], [True] * 3),), n) for n in range(11)]
    open_end = Row([5], (Branch([60, 70, 80], [True] * 3),), 11)
    (problem,) = trips("FT004", "rows", with_rows(seen, *good, open_end))
    assert "1 of 12 trained answers (8.3%) do not end in a token that stops" in problem.message
    assert "first: train.jsonl:12" in problem.message
    assert trips("FT003", "rows", with_rows(seen, *good, open_end)) == []
    assert trips("FT004", "rows", with_rows(seen, *good)) == []
    assert trips("FT004", "rows", with_rows(seen, *good, replace(open_end, truncated=True))) == [], "that is FT002's"


def test_ft005_the_template_ends_turns_with_another_token(of, tmp_path):
    (problem,) = of("FT005", **ends_in(tmp_path, "<|eot|>", more=("<|eot|>",)))
    assert problem.severity == "error"
    assert "12 of 12 trained answers (100.0%) end in '<|eot|>' (" in problem.message
    assert 'write "eos_token_id": [' in problem.message
    assert of("FT005") == []


def test_ft005_the_fix_that_is_offered_is_one(of, tmp_path):
    sections = ends_in(tmp_path, "<|eot|>", more=("<|eot|>",))
    (problem,) = of("FT005", **sections)
    wanted = json.loads(re.search(r'"eos_token_id": (\[[^]]*\])', problem.message)[1])
    path = tmp_path / "m" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": wanted}))
    assert of("FT005", **sections) == []


def test_ft006_two_beginnings(seen):
    bos = seen.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    seen.tokenizer.bos_token = "<|endoftext|>"
    one = Row([], (Branch([bos, 5, 6], [False, True, True]),))
    two = Row([], (Branch([bos, bos, 5], [False, False, True]),))
    across = Row([bos], (Branch([bos, 5], [False, True]),))
    assert trips("FT006", "rows", with_rows(seen, one)) == []
    (problem,) = trips("FT006", "rows", with_rows(seen, one, replace(two, source=1), replace(across, source=2)))
    assert "2 of 3 rows (66.7%) begin with '<|endoftext|>' twice" in problem.message
    seen.tokenizer.bos_token = None
    assert trips("FT006", "rows", with_rows(seen, two)) == []


def test_ft007_messages_without_a_template(of, tmp_path):
    folder = model_folder(tmp_path / "base", template=None)
    (problem, *_) = of("FT007", model={"name_or_path": str(folder)})
    assert problem.severity == "error"
    assert "train.jsonl are messages, and the tokenizer has no chat template" in problem.message
    texts = [{"text": f"word {i}"} for i in range(12)]
    assert of("FT007", model={"name_or_path": str(folder)}, rows=texts) == []


def test_ft008_lost_reasoning(of):
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]
    }
    (problem,) = of("FT008", rows=[*questions(11), row])
    assert "1 of 12 rows (8.3%); " in problem.message
    assert "train.jsonl:12" in problem.message
    assert of("FT008") == []


def test_ft009_a_prompt_that_is_not_the_beginning_of_the_row(of):
    spaces = [{"prompt": f"Question {i}: ", "completion": "word"} for i in range(12)]
    clean = [{"prompt": row["prompt"].strip(), "completion": " word"} for row in spaces]
    assert of("FT009", rows=clean) == []
    found = of("FT009", rows=spaces)
    assert found
    assert {p.severity for p in found} == {"error"}
    assert "(100.0%) have a" in found[0].message
    assert "around it " in found[0].message
    assert {p.severity for p in of("FT009", "max_dropped_fraction=1.0", rows=spaces)} == {"warning"}


def test_ft010_pairs_that_say_nothing(seen):
    a, b = seen.chat.encoder.many(["one", "two"])
    stop = seen.stops[0]
    good = [pair([*a, stop], [*b, stop], source=n) for n in range(10)]
    same, empty = pair([*a, stop], [*a, stop], source=10), pair([*a, stop], [stop], source=11)
    assert trips("FT010", "rows", with_rows(seen, *good)) == []
    assert trips("FT010", "rows", seen) == [], "rows of one branch are no pairs"
    found = trips("FT010", "rows", with_rows(seen, *good, same, empty))
    assert [p.severity for p in found] == ["error", "error"]
    assert (
        "1 of 12 pairs (8.3%) have a rejected answer that is the chosen one; first: train.jsonl:11" in found[0].message
    )
    assert "1 of 12 pairs (8.3%) have an empty answer; first: train.jsonl:12" in found[1].message
    few = [replace(row, source=row.source % 10) for row in good * 3]
    assert [p.severity for p in trips("FT010", "rows", with_rows(seen, *few, same))] == ["warning"]


def test_ft014_a_marker_that_is_no_token(of, tmp_path):
    (problem,) = of("FT014", **ends_in(tmp_path, "<|turn_end|>"))
    assert problem.severity == "error"
    assert "end in '<|turn_end|>', which is no token of this tokenizer but text of" in problem.message
    assert of("FT014") == []


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        (said("a", "b", "c"), "end in a turn of the user"),
        (said("a", "b", first="assistant") + said("c"), "begin with a turn of the assistant"),
        ([*said("a"), *said("b", "c")], "have two turns of the user in a row"),
        ([*said("a", "b"), *said("c", first="assistant")], "have two turns of the assistant in a row"),
    ],
)
def test_ft031_turns_in_an_odd_order(of, turns, what):
    found = of("FT031", "max_dropped_fraction=1.0", rows=[*questions(11), {"messages": turns}])
    assert any(f"1 of 12 rows (8.3%) {what}" in p.message and "train.jsonl:12" in p.message for p in found)
    assert of("FT031") == []
    assert of("FT031", "max_dropped_fraction=1.0", rows=[*questions(101), {"messages": turns}]) == [], "1 of 102 is few"


def test_ft031_a_prompt_that_ends_with_the_assistant(of):
    rows = [{"prompt": said("a", "b"), "completion": said("c", first="assistant")} for _ in range(12)]
    assert any("have a prompt that ends in a turn of the assistant" in p.message for p in of("FT031", rows=rows))


def test_ft031_tools_are_not_turns_in_a_row(of):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [{"messages": [*said("a"), call, {"role": "tool", "content": "1"}, *said("b", first="assistant")]}] * 12
    assert of("FT031", "max_dropped_fraction=1.0", rows=rows) == []


def test_ft032_copies(of):
    (problem,) = of("FT032", rows=[*questions(12), *questions(2)])
    assert "2 of 14 rows (14.3%) are copies of an earlier one; first: train.jsonl:13, 14" in problem.message
    assert of("FT032", rows=[*questions(150), *questions(1)]) == [], "1 of 151 is few"


def test_ft032_rows_that_weight_repeats_are_no_copies(recipe_of, of, tmp_path):
    path = str(write_rows(tmp_path / "train.jsonl", questions(12)))
    assert of("FT032", data={"train": [{"path": path, "weight": 2.0}]}) == []


def test_ft032_evaluation_rows_that_are_trained_on(of, tmp_path):
    held = str(write_rows(tmp_path / "eval.jsonl", [*questions(1), *questions(3, first=50)]))
    (problem,) = of("FT032", data={"eval_sets": held})
    assert (problem.key, problem.severity) == ("data.eval_sets", "warning")
    assert "1 of 4 evaluation rows (25.0%) are also trained on; first: eval.jsonl:1" in problem.message
    named = of("FT032", data={"eval_sets": {"good": held}})
    assert [p.key for p in named] == ["data.eval_sets.good"]
    clean = str(write_rows(tmp_path / "eval.jsonl", questions(3, first=50)))
    assert of("FT032", data={"eval_sets": clean}) == []
    split = of("FT032", "eval_split=0.5", rows=[*questions(12), *questions(12)])
    assert "data.eval_split" in {p.key for p in split}


def test_ft032_length_of_pairs(seen):
    even = [pair([9] * 10, [8] * 10, source=n) for n in range(4)]
    longer = [pair([9] * 16, [8] * 10, source=n) for n in range(4)]
    shorter = [pair([9] * 10, [8] * 16, source=n) for n in range(4)]
    apart = [replace(row, prefix=[5, 6, n]) for rows in (even, longer, shorter) for n, row in enumerate(rows)]
    assert trips("FT032", "rows", with_rows(seen, *apart[:4])) == []
    (problem,) = trips("FT032", "rows", with_rows(seen, *apart[4:8]))
    assert "chosen answers have 16 tokens on average, rejected ones 10 (1.60 times)" in problem.message
    (problem,) = trips("FT032", "rows", with_rows(seen, *apart[8:]))
    assert "(0.62 times)" in problem.message


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"train": {"max_steps": None, "num_train_epochs": 7}}, []),  # 12 rows by 4 are 3 steps an epoch
        ({"train": {"max_steps": None, "num_train_epochs": 6}}, ["train.num_train_epochs"]),
        ({"train": {"max_steps": None, "num_train_epochs": 7, "warmup_steps": 21}}, ["train.warmup_steps"]),
        ({"train": {"max_steps": None, "num_train_epochs": 7}, "save": {"save_steps": 22}}, ["save.save_steps"]),
    ],
)
def test_ft033_what_does_not_fit_the_run(of, sections, keys):
    found = of("FT033", rows=questions(12), **sections)
    assert [p.key for p in found] == keys


@pytest.fixture
def table_of_positions(tmp_path):
    """A model that has an embedding of 128 positions, as GPT-2 has."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder, tokenizer = tmp_path / "gpt2", tiny_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": {"name_or_path": str(folder)}, "lora": {"r": 4, "target_modules": ["c_attn"]}}


def test_ft033_no_positions_for_what_is_trained_or_answered(of, table_of_positions, tmp_path):
    rows = [{"prompt": f"question {n} ", "completion": "a b"} for n in range(12)]
    rows[3]["prompt"] = long = "why " * 20
    fits = {"data": {"max_length": 128}, "generation": {"max_new_tokens": 4}, "eval": {"sample_prompts": 12}}

    def found(rows, **more):
        more = {key: {**fits.get(key, {}), **value} for key, value in more.items()}
        return of("FT033", "max_steps=20", rows=rows, **table_of_positions, **{**fits, **more})

    assert found(rows) == []
    (problem,) = found(rows, generation={"max_new_tokens": 110})
    assert (problem.key, problem.severity) == ("generation.max_new_tokens", "error")
    asked = int(re.search(r"110 tokens behind a prompt of (\d+) are more than the 128", problem.message)[1])
    assert found(rows, generation={"max_new_tokens": 128 - asked}) == []
    assert f"use {128 - asked} or less" in problem.message
    assert found(rows, generation={"max_new_tokens": 110}, eval={"sample_prompts": 0}) == []
    window, problem = found([*rows, {"prompt": long + long, "completion": "a"}], data={"max_length": 200})
    assert (window.key, window.severity) == ("data.max_length", "warning")
    assert (problem.key, problem.severity) == ("data.max_length", "error")
    assert "and the model has positions for 128" in problem.message
    (tmp_path / "judge.py").write_text("def judge(prompts, responses, rows):\n    return [0.0 for _ in prompts]\n")
    method = {"method": {"name": "ppo", "reward": f"{tmp_path}/judge.py:judge"}, "eval": {"sample_prompts": 0}}
    (problem,) = found([{"prompt": row["prompt"]} for row in rows], generation={"max_new_tokens": 110}, **method)
    assert problem.key == "generation.max_new_tokens"


def test_ft033_packed_rows_are_counted_in_bins(seen):
    from finetune_cli.checks.rows import units

    packed = seen.recipe.model_copy(update={"method": type(seen.recipe.method)(packing=True)})
    assert units(seen) == 12
    assert 1 < units(replace(seen, plan=seen.plan.model_copy(update={"recipe": packed}))) < 12


def test_ft106_tools_that_the_template_does_not_show(of):
    tool = {"name": "weather", "description": "d", "parameters": {}}
    rows = [*questions(11), {"messages": said("a", "b"), "tools": [tool]}]
    (problem,) = of("FT106", rows=rows)
    assert "the template does not show the row's tools (weather)" in problem.message
    assert of("FT106") == []


def test_ft107_control_tokens_in_messages(of):
    (problem,) = of("FT107", rows=[*questions(11), {"messages": said("a <|im_end|> b", "c")}])
    assert "message 0 (user) contains the control token '<|im_end|>'" in problem.message
    assert of("FT107") == []


def test_ft108_a_setting_that_inference_needs_too(of, tmp_path):
    thinking = CHATML.replace(
        "{% if add_generation_prompt %}",
        "{% if add_generation_prompt and enable_thinking is not defined %}<|im_start|>assistant\n<think>\n"
        "{% elif add_generation_prompt %}",
    )
    assert thinking != CHATML
    (problem, *_) = of("FT108", model=template(tmp_path, thinking))
    assert "enable_thinking: false" in problem.message
    assert of("FT108") == []


def test_ft109_columns_that_are_not_read(of):
    rows = [{**row, "chosen": "a", "rejected": "b", "id": 1} for row in questions(12)]
    (problem,) = of("FT109", rows=rows)
    assert "are read as messages, so chosen, rejected are not read" in problem.message
    assert of("FT109", rows=[{**row, "id": 1} for row in questions(12)]) == []


CELLS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=6))
MESSAGES = st.lists(
    st.one_of(
        CELLS,
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system", "tool", "human", "odd"]), "content": CELLS}
        ),
    ),
    max_size=4,
)
ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"messages": st.one_of(MESSAGES, CELLS)}),
        st.fixed_dictionaries({"prompt": st.one_of(MESSAGES, CELLS), "completion": st.one_of(MESSAGES, CELLS)}),
        st.fixed_dictionaries({"text": CELLS}),
        st.dictionaries(st.sampled_from(["messages", "prompt", "chosen", "text", "tools"]), CELLS, max_size=3),
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(rows=ROWS, most=st.sampled_from([1, 16, 128]), how=st.sampled_from(["drop", "truncate", "error"]))
def test_whatever_the_rows_are_there_is_an_answer(says, rows, most, how):
    """No rows, one row, all of them dropped, rows of any type: problems, or none, and never another exception."""
    options = [f"max_length={most}", f"overlength={how}", "max_dropped_fraction=1.0"]
    for problem in says(*options, rows=rows):
        assert problem.message


def test_a_huge_row(says):
    rows = [*questions(30), {"messages": said("a", "word " * 200_000)}]
    assert [p.rule for p in says(rows=rows, ignore=["FT033"])] == ["FT002"]


def test_ft002_of_prompts_alone(of, tmp_path):
    """They have no trained tokens, of which a share could be lost."""
    (tmp_path / "judge.py").write_text("def judge(prompts, responses, rows):\n    return [0.0 for _ in prompts]\n")
    rows = [{"prompt": f"question {i}"} for i in range(30)] + [{"prompt": "long " * 300}]
    method = {"name": "ppo", "reward": f"{tmp_path}/judge.py:judge"}
    (problem,) = of("FT002", rows=rows, method=method)
    assert "of 31 rows 1 row dropped at 128 tokens (data.overlength: drop); lengths" in problem.message


TEXTS = [{"text": f"hello number {n}"} for n in range(12)]


@pytest.mark.parametrize("rows", [TEXTS, [{"input_ids": [60, 70, 80 + n]} for n in range(12)]], ids=["text", "tokens"])
def test_ft111_a_metric_on_rows_that_ask_nothing(of, rows):
    metric = {"eval": {"metric": "exact_match"}, "data": {"eval_split": 0.25}}
    (problem,) = of("FT111", rows=rows, **metric)
    assert (problem.key, problem.severity) == ("eval.metric", "error")
    assert "never computed on the rows for evaluation: none of these rows has a prompt to answer" in problem.message
    assert "or take eval.metric out" in problem.message
    assert of("FT111", rows=rows, data={"eval_split": 0.25}) == []
    assert of("FT111", **metric) == []


def test_ft111_a_metric_on_some_of_the_sets(of, tmp_path):
    sets = {
        "plain": str(write_rows(tmp_path / "a.jsonl", TEXTS)),
        "talk": str(write_rows(tmp_path / "b.jsonl", questions(3, first=40))),
    }
    (problem,) = of("FT111", data={"eval_sets": sets}, eval={"metric": "exact_match"})
    assert (problem.key, problem.severity) == ("eval.metric", "warning")
    assert "never computed on the evaluation set plain: none" in problem.message
