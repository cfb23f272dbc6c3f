"""The evaluation loss is the sum over the whole set divided once, so it does not depend on the batch size."""

import pytest
import torch

from finetune_cli.engine.evaluate import chunks, evaluate
from finetune_cli.types import Branch, Row
from tests.helpers import questions, write_rows


def numbers_of(job):
    return evaluate(job, 0, final=False)


def test_loss_is_that_of_stock_transformers_for_every_batch_size(recipe_of, job_of, tmp_path, tiny_model_folder):
    """Ten rows of unequal lengths: a mean of batch means would change with the size (transformers issue 39241)."""
    from transformers import AutoModelForCausalLM

    rows = str(write_rows(tmp_path / "eval.jsonl", questions(10, first=20)))
    found = []
    for size in (1, 3, 10):
        path = recipe_of(data={"eval_sets": rows}, eval={"per_device_eval_batch_size": size, "sample_prompts": 0})
        job, _ = job_of(path)
        found.append(numbers_of(job))
    for numbers in found[1:]:
        assert numbers == pytest.approx(found[0], rel=1e-6)

    model, total, count, right = AutoModelForCausalLM.from_pretrained(tiny_model_folder), 0.0, 0, 0
    with torch.no_grad():
        for row in job.eval_sets[0].rows:
            ids = torch.tensor([[*row.prefix, *row.branches[0].ids]])
            trained = torch.tensor([False] * len(row.prefix) + row.branches[0].trained)[1:]
            logits = model(input_ids=ids).logits[0, :-1][trained]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:][trained], reduction="sum"))
            right += int((logits.argmax(-1) == ids[0, 1:][trained]).sum())
            count += int(trained.sum())
    assert found[0]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found[0]["eval_mean_token_accuracy"] == pytest.approx(right / count)


def test_named_sets_have_their_names_in_their_keys_and_are_judged_together(recipe_of, job_of, tmp_path):
    """`merit` is the mean over the sets, higher is better."""
    sets = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", questions(count, first=first)))
        for name, count, first in (("easy", 2, 30), ("hard", 3, 40))
    }
    events = []
    path = recipe_of(data={"eval_sets": sets}, eval={"metric": "exact_match", "metric_rows": 2, "sample_prompts": 1})
    job, _ = job_of(path, sink=events.append)
    numbers = numbers_of(job)
    ends = ("loss", "entropy", "mean_token_accuracy", "exact_match")
    assert set(numbers) == {f"eval_{name}_{end}" for name in sets for end in ends}
    assert job.merit(numbers) == 0.0
    assert job.merit({**numbers, "eval_easy_exact_match": 1.0}) == 0.5
    samples = [(e["set"], e["row"]) for e in events if e["event"] == "sample"]
    assert samples == [("easy", 0), ("hard", 0)]
    by_loss, _ = job_of(recipe_of(data={"eval_sets": sets}))
    assert by_loss.merit({"eval_easy_loss": 1.0, "eval_hard_loss": 2.0}) == -1.5
    assert by_loss.merit({"eval_easy_entropy": 1.0}) is None


def test_evaluation_costs_the_run_no_random_number_and_no_gradient(recipe_of, job_of, tmp_path):
    path = recipe_of(
        data={"eval_sets": str(write_rows(tmp_path / "eval.jsonl", questions(3)))},
        lora={"lora_dropout": 0.5},
        generation={"temperature": 1.0},
    )
    job, _ = job_of(path)
    job.policy.train()
    before = torch.get_rng_state()
    first = numbers_of(job)
    assert torch.equal(torch.get_rng_state(), before)
    assert numbers_of(job) == first  # dropout is off
    assert all(p.grad is None for p in job.trained)


@pytest.mark.parametrize(("count", "world"), [(7, 1), (7, 2), (1, 3), (2, 3)])
def test_every_row_is_evaluated_by_one_process(count, world):
    """A process without a row of its own computes one with nothing to learn."""
    rows = [Row([], (Branch([5] * (n + 2), [True] * (n + 2)),), source=n) for n in range(count)]
    shares = [chunks(rows, 2, rank, world) for rank in range(world)]
    assert all(1 <= len(rows) <= 2 for share in shares for rows in share)
    learned = [row.source for share in shares for some in share for row in some if row.targets]
    assert sorted(learned) == list(range(count))
