"""Prompts of an online method, and settings under which it cannot learn."""

import pytest

from finetune_cli import commands
from finetune_cli.data.chat import Chat
from finetune_cli.data.encode import encode_set
from finetune_cli.errors import FinetuneError
from finetune_cli.methods.online import RewardSource
from finetune_cli.methods.ppo import Ppo
from finetune_cli.recipe.sections import Data, Source
from tests.helpers import said, tiny_tokenizer, write_rows

PPO = Ppo(reward=[RewardSource(source="r.py:f")])
TURN = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chat():
    return Chat.bind(tiny_tokenizer())


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": said("one")}, TURN),
        ({"prompt": "one"}, "one"),
        ({"messages": said("one")}, TURN),
        ({"messages": said("one", "two")}, TURN),
        ({"messages": said("one", "two", "one")}, TURN.replace("assistant\n", "assistant\ntwo<|im_end|>\n") + TURN),
        ({"prompt": said("one"), "completion": said("two", first="assistant")}, TURN),
        ({"prompt": "one", "completion": "two"}, "one"),
        (
            {"prompt": said("one"), "chosen": said("two", first="assistant"), "rejected": said("3", first="assistant")},
            TURN,
        ),
    ],
)
def test_the_prompt_of_a_row_is_what_inference_feeds(chat, tmp_path, row, prompt):
    data = Data(train=[Source(path=str(write_rows(tmp_path / "t.jsonl", [row])))])
    found = encode_set(PPO, data.train, chat, data, seed=0)
    (kept,) = found.rows
    assert kept.branches == ()
    assert chat.tokenizer.decode(kept.prefix) == prompt
    assert found.report["kept"] == 1


def test_a_prompt_that_fills_max_length_is_dropped_and_never_cut(chat, tmp_path):
    rows = [{"prompt": said("one")}, {"prompt": said("one " * 90)}]
    source = Source(path=str(write_rows(tmp_path / "t.jsonl", rows)))
    data = Data(train=[source], max_length=60, overlength="truncate", max_dropped_fraction=0.5)
    found = encode_set(PPO, data.train, chat, data, seed=0)
    assert [row.source for row in found.rows] == [0]
    assert found.report["dropped"] == {"overlength": 1}


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"generation": {"temperature": 0.0}}, "generation.temperature"),
        ({"generation": {"top_p": 0.9}}, "generation.top_p"),
        ({"method": {"total_episodes": 64}}, "method.total_episodes"),
        ({"method": {"num_mini_batches": 5}}, "method.num_mini_batches"),
        ({"method": {"reward": "nothing.py:f"}}, "method.reward"),
        ({}, None),
    ],
)
def test_settings_under_which_nothing_can_be_learned(recipe_of, tmp_path, sections, key):
    (tmp_path / "r.py").write_text("def f(prompts, responses, rows):\n    return [0.0] * len(responses)\n")
    method = {"name": "ppo", "reward": "r.py:f"} | sections.pop("method", {})
    path = recipe_of(method=method, rows=[{"prompt": said("one")}] * 8, **sections)
    if key is None:
        assert commands.planned(path, [])[0].recipe.method.name == "ppo"
        return
    with pytest.raises(FinetuneError) as caught:
        commands.planned(path, [])
    assert [problem.key for problem in caught.value.problems if problem.key.startswith(key)]
