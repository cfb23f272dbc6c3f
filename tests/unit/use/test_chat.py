"""Chat: the ids that inference feeds, answers as transformers' own generate gives them, and the model as it was."""

import json

import pytest
import torch

from finetune_cli.errors import DataError, ModelError
from finetune_cli.recipe.sections import Generation
from finetune_cli.use import chat
from finetune_cli.use.chat import Speaker, Streamer, find
from tests.helpers import said, tiny_tokenizer

GREEDY = Generation(max_new_tokens=8, temperature=0.0)
ASKED = said("What is two plus two?")


@pytest.fixture
def run_folder(recipe_of, job_of):
    """A run that has come to its end: its plan, and the result in its folder. Weights are moved, not trained."""

    def make(**sections):
        job, _ = job_of(recipe_of(**sections))
        model = job.generator
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(torch.randn(p.shape, generator=generator) * 0.3)
        model.save_pretrained(job.plan.run)
        job.tokenizer.save_pretrained(job.plan.run)
        (job.plan.run / "plan.json").write_text(job.plan.model_dump_json())
        return job.plan.run

    return make


def stock(model, tokenizer, ids):
    out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, len(ids) :]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return tokenizer.decode([token for token in out.tolist() if token != stop])


def asked(speaker, *, before=False):
    pieces = []
    answer = speaker.answer(speaker.ids(ASKED), pieces.append, before=before)
    assert answer == "".join(pieces)
    return answer


def test_an_adapter_before_and_after(run_folder, tiny_model_folder):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    run = run_folder()
    speaker = Speaker(find(str(run)), GREEDY, with_before=True)
    ids = speaker.tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"]
    assert speaker.ids(ASKED) == ids
    after = stock(AutoPeftModelForCausalLM.from_pretrained(run), speaker.tokenizer, ids)
    before = stock(AutoModelForCausalLM.from_pretrained(tiny_model_folder), speaker.tokenizer, ids)
    assert after != before
    assert asked(speaker) == after
    assert asked(speaker, before=True) == before
    assert asked(speaker) == after  # and the adapter is on again


def test_all_weights_before_and_after(run_folder, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    run = run_folder(lora=None, train={"learning_rate": 1e-5})
    speaker = Speaker(find(str(run)), GREEDY, with_before=True)
    ids = speaker.ids(ASKED)
    assert asked(speaker) == stock(AutoModelForCausalLM.from_pretrained(run), speaker.tokenizer, ids)
    assert asked(speaker, before=True) == stock(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder), speaker.tokenizer, ids
    )


def test_a_run_that_started_from_an_adapter(run_folder, tmp_path):
    first = run_folder()
    start = first.rename(tmp_path / "first")
    run = run_folder(model={"name_or_path": str(start)}, lora=None)
    speaker = Speaker(find(str(run)), GREEDY, with_before=True)
    assert asked(speaker, before=True) == asked(Speaker(find(str(start)), GREEDY, with_before=False))
    assert asked(speaker) != asked(speaker, before=True)


def test_any_model(tiny_model_folder):
    target = find(str(tiny_model_folder))
    assert target.generation == Generation()
    with pytest.raises(DataError, match="no before"):
        Speaker(target, GREEDY, with_before=True)
    assert isinstance(asked(Speaker(target, GREEDY, with_before=False)), str)


def test_text_as_it_is(tiny_model_folder):
    speaker = Speaker(find(str(tiny_model_folder)), GREEDY, with_before=False)
    assert speaker.ids(said("What is"), raw=True) == speaker.tokenizer("What is", add_special_tokens=False)["input_ids"]


def test_a_run_that_is_not_finished(run_folder):
    run = run_folder()
    (run / "adapter_config.json").unlink()
    (run / "checkpoint-3").mkdir()
    with pytest.raises(DataError, match="no result") as failed:
        find(str(run))
    assert "checkpoint-3" in failed.value.hint


def test_a_checkpoint_has_the_plan_of_its_run(run_folder):
    run = run_folder()
    checkpoint = run / "checkpoint-3"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).rename(checkpoint / name)
    target = find(str(checkpoint))
    assert target.after.adapter == str(checkpoint)
    assert target.generation.max_new_tokens == 4


def test_a_plan_of_another_version(run_folder):
    run = run_folder()
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps({**plan, "recipe": {}}))
    with pytest.raises(DataError, match="another version"):
        find(str(run))


def test_what_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        find(str(tmp_path / "nothing"))


def test_characters_come_whole():
    tokenizer, pieces = tiny_tokenizer(), []
    ids = tokenizer("a 🙂 日本", add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    streamer = Streamer(tokenizer, [stop], pieces.append)
    streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in [*ids, stop]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == "a 🙂 日本"
    assert not any("�" in piece for piece in pieces)
    assert len(pieces) > 2


def test_a_reward_model_does_not_answer(run_folder):
    run = run_folder()
    text = (run / "plan.json").read_text()
    plan = json.loads(text)
    plan["recipe"]["method"] = {"name": "reward"}
    (run / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ModelError, match="scores"):
        chat.find(str(run))
