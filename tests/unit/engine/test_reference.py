"""References: what they are, that a margin before the first step is exactly 0, and what is kept on disk."""

import gc
import json
from typing import Any

import pytest
import torch

from finetune_cli.engine import loop, watch
from finetune_cli.engine.reference import Reference
from finetune_cli.engine.role import Role
from finetune_cli.errors import TrainError
from tests.helpers import finetune, journal
from tests.parity.stock import EDGES, adapter_folder, causal_model, sequences, token_logps, token_rows

RATE = {"learning_rate": "auto"}


@pytest.fixture
def pairs_of(recipe_of):
    """A recipe of DPO on the pairs of the parity tests."""

    def make(method: dict[str, Any] | None = None, **sections: Any) -> Any:
        sections["train"] = {**RATE, **sections.get("train", {})}
        return recipe_of(rows=token_rows(EDGES), method={"name": "dpo", **(method or {})}, **sections)

    return make


@pytest.fixture
def adapter(tiny_model_folder, tmp_path):
    return adapter_folder(tiny_model_folder, tmp_path / "adapter")


def margins(job: Any, step: int = 0) -> float:
    sums = loop.Sums()
    job.policy.train()
    loop.optimiser_step(job, step, measure=False, sums=sums)
    return sums.means(job)["rewards/margins"]


@pytest.mark.parametrize("precomputed", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("start", ["fresh", "brought", "full", "pissa", "dora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_the_first_step_every_margin_is_exactly_0(
    start, precomputed, precision, pairs_of, job_of, adapter, tiny_model_folder
):
    lora = {"fresh": {}, "pissa": {"init_lora_weights": "pissa"}, "dora": {"use_dora": True}}.get(start)
    path = pairs_of(
        {"precompute_ref_log_probs": precomputed},
        model={"name_or_path": str(adapter if start == "brought" else tiny_model_folder)},
        lora=None if lora is None else {"r": 4, **lora},
        train={"precision": precision},
    )
    job, _ = job_of(path)
    assert job.reference_report["kind"] == ("adapter off" if start == "fresh" else "start")
    assert (job.reference is None) == precomputed
    assert margins(job) == 0.0
    if precision == "fp32":  # a step of this size is below bfloat16's rounding
        assert margins(job, 1) != 0.0  # the policy has moved, its reference has not


def test_a_reference_that_is_not_the_start_stops_the_run(pairs_of, job_of, monkeypatch):
    honest = Reference.scores

    def wrong(self: Reference, batch: Any) -> Any:
        scores = honest(self, batch)
        return scores._replace(logps_N=scores.logps_N + 1e-4)

    monkeypatch.setattr(Reference, "scores", wrong)
    with pytest.raises(TrainError, match="the reference is not what the policy starts from"):
        job_of(pairs_of({"precompute_ref_log_probs": False}))


def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forwards without a gradient: rows of each."""
    seen: list[int] = []
    honest = Reference.scores

    def counted(self: Reference, batch: Any) -> Any:
        seen.append(len(batch.rows))
        return honest(self, batch)

    monkeypatch.setattr(Reference, "scores", counted)
    return seen


def test_a_second_run_asks_nothing_whatever_its_beta_and_rate(pairs_of, job_of, monkeypatch, adapter):
    seen = forwards(monkeypatch)
    on = {"precompute_ref_log_probs": True, "ld_alpha": 0.75}  # a key of its own in the cache of the session
    first, _ = job_of(pairs_of(on))
    assert sum(seen) == 6
    assert (first.reference_report["computed"], first.reference_report["from_disk"]) == (6, 0)
    seen.clear()
    told = {**on, "beta": 0.5, "loss_type": "ipo"}
    again, _ = job_of(pairs_of(told, train={"learning_rate": 2e-5, "per_device_train_batch_size": 1}))
    assert seen == []
    assert (again.reference_report["computed"], again.reference_report["from_disk"]) == (0, 6)
    assert [r.extra for u in again.units for r in u] == [r.extra for u in first.units for r in u]
    for method, sections in (
        ({**on, "ld_alpha": 0.5}, {}),
        (on, {"model": {"dtype": "bfloat16"}}),
        (on, {"model": {"name_or_path": str(adapter)}, "lora": None}),
    ):
        job_of(pairs_of(method, **sections))
        assert sum(seen) == 6, sections
        seen.clear()


def test_rows_that_were_added_are_asked_of_and_no_others(pairs_of, recipe_of, job_of, monkeypatch):
    on = {"name": "dpo", "precompute_ref_log_probs": True, "ld_alpha": 0.125}  # a key of its own in the cache
    train = {**RATE, "per_device_train_batch_size": 1}
    job_of(recipe_of(rows=token_rows(EDGES[:4]), method=on, train=train))
    seen = forwards(monkeypatch)
    job, _ = job_of(recipe_of(rows=token_rows(EDGES), method=on, train=train))
    assert seen == [1, 1]
    assert job.reference_report["computed"] == 2


def test_a_damaged_file_is_computed_anew(pairs_of, job_of, monkeypatch, caplog):
    from finetune_cli.data.builtin import cache_root

    on = {"precompute_ref_log_probs": True, "ld_alpha": 0.25}
    known = set((cache_root() / "reference").glob("*.npz"))
    first, _ = job_of(pairs_of(on))
    (file,) = set((cache_root() / "reference").glob("*.npz")) - known
    file.write_bytes(file.read_bytes()[:-40])
    seen = forwards(monkeypatch)
    again, _ = job_of(pairs_of(on))
    assert sum(seen) == 6
    assert "damaged" in caplog.text
    assert [r.extra for u in again.units for r in u] == [r.extra for u in first.units for r in u]


def test_full_fine_tuning_holds_no_second_model(pairs_of, job_of, tiny_model_folder):
    """The default there: log-probabilities of the model itself, before it moves, equal to stock transformers'."""
    job, _ = job_of(pairs_of(lora=None))
    assert job.reference is None
    assert job.reference_report["precompute"]
    rows = [row for unit in job.units for row in unit]
    with torch.no_grad():
        logps, trained, _ = token_logps(causal_model(tiny_model_folder), sequences(rows))
    wanted = (logps * trained).sum(1).view(-1, 2).tolist()
    found = [[row.extra["ref_chosen_logps"], row.extra["ref_rejected_logps"]] for row in rows]
    assert torch.tensor(found).flatten().tolist() == pytest.approx(torch.tensor(wanted).flatten().tolist(), rel=1e-5)


def test_a_moving_reference_follows_and_goes_on_after_a_resume(pairs_of, job_of, tmp_path):
    """alpha 0.5 after step 1: reference = (start + policy) / 2; then again after step 2."""
    moves = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    path = pairs_of(moves, lora=None, save={"save_steps": 2}, train={"max_steps": 3, "learning_rate": 1e-5})
    job, progress = job_of(path)
    start = [p.detach().clone() for p in job.trained]
    loop.forward(job, progress, watch.Stillness(job))
    once = [(a + p.detach()) / 2 for a, p in zip(start, job.trained, strict=True)]
    assert all(torch.allclose(c, w, atol=1e-7) for c, w in zip(job.reference.copies, once, strict=True))
    loop.forward(job, progress, watch.Stillness(job))
    kept = [c.clone() for c in job.reference.copies]
    folder = job.save(progress)
    again, _ = job_of(path, resume=folder)
    assert all(torch.equal(c, w) for c, w in zip(again.reference.copies, kept, strict=True))


@pytest.mark.parametrize("precomputed", [False, True], ids=["live", "precomputed"])
@pytest.mark.parametrize("adapted", [True, False], ids=["brought", "full"])
def test_a_resumed_run_compares_with_what_the_run_started_from(
    adapted, precomputed, pairs_of, job_of, adapter, tiny_model_folder
):
    path = pairs_of(
        {"precompute_ref_log_probs": precomputed, "ld_alpha": 0.0625}, lora=None,
        model={"name_or_path": str(adapter if adapted else tiny_model_folder)}, train={"learning_rate": 5e-6},
    )  # fmt: skip
    job, progress = job_of(path)
    loop.forward(job, progress, watch.Stillness(job))
    folder = job.save(progress)
    wanted = margins(job, 1)
    again, _ = job_of(path, resume=folder)
    assert wanted != 0
    assert margins(again, 1) == pytest.approx(wanted, rel=1e-5)


def test_the_run_says_which_reference_it_used(recipe_of, tmp_path):
    method = {"name": "dpo"}
    different = [pair for pair in EDGES if pair[1] != pair[2]]
    path = recipe_of(rows=token_rows(different), method=method, eval={"eval_strategy": "no"}, train=RATE)
    done = finetune("run", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the model with the adapter off" in " ".join(done.stdout.split())
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["reference"]["kind"] == "adapter off"
    first = next(line for line in journal(tmp_path / "run") if line["event"] == "train")
    assert first["rewards/margins"] == 0
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected", "entropy"}
    assert names <= first.keys()


def test_eval_loss_is_one_number_for_every_batch_size(pairs_of, job_of):
    from finetune_cli.engine.evaluate import loss_of

    told = {"loss_type": ["sigmoid", "sft"], "ref_model": None}
    numbers = []
    for size in (1, 4):
        job, _ = job_of(pairs_of(told, data={"eval_split": 0.5}, eval={"per_device_eval_batch_size": size}))
        loop.forward(job, loop.Progress(), watch.Stillness(job))
        numbers.append(loss_of(job, job.eval_sets[0]))
        assert isinstance(job.accelerator.unwrap_model(job.policy), Role)
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-6)  # differences of numbers near 10
    assert "eval_rewards/margins" in numbers[0]


def test_another_model_is_freed_once_it_has_said_its_log_probabilities(pairs_of, job_of, tiny_model_folder):
    method = {"ref_model": str(tiny_model_folder), "precompute_ref_log_probs": True}
    others = [
        found for found in gc.get_objects() if isinstance(found, Role)
    ]  # of other tests, kept so that no id is new
    job, _ = job_of(pairs_of(method=method))
    assert job.reference is None
    known = {id(role) for role in others}
    made = [found for found in gc.get_objects() if isinstance(found, Role) and id(found) not in known]
    assert [role is job.accelerator.unwrap_model(job.policy) for role in made] == [True]
