"""Evaluation: the loss over the whole of each set, generated answers and what they are worth."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from finetune_cli.data.batches import Batch, counts_of, silent
from finetune_cli.engine import metrics
from finetune_cli.engine.generate import answers
from finetune_cli.engine.signals import Interrupted
from finetune_cli.engine.update import Sums
from finetune_cli.types import Prompt, Row

if TYPE_CHECKING:
    from finetune_cli.engine.job import EvalSet, Job


def evaluate(job: "Job", step: int, *, final: bool) -> dict[str, float]:
    """Every number of every set, keys as in metrics.jsonl; emits one eval event and the samples. Collective."""
    numbers: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    for eval_set in job.eval_sets:
        if job.experience is not None:
            numbers |= job.experience.evaluate(eval_set, step, samples)
        else:
            numbers |= loss_of(job, eval_set)
    for eval_set in job.eval_sets:
        if job.metric is not None and eval_set.prompts and job.experience is None:
            numbers |= generated(job, eval_set, step, samples)
    if job.metric is None and not samples:
        samples += sample(job, step) if job.experience is None else job.experience.samples(step)
    if numbers:
        job.emit(job.event("eval", step, **numbers))
    for event in samples:
        job.emit(event)
    job.emit({"event": "looked", "step": step, "final": final})
    return numbers


def unless_stopping(job: "Job") -> None:
    """Raises Interrupted where the run is to end: what was found so far is thrown away. Collective."""
    if (number := job.stopping()) is not None:
        raise Interrupted(number)


def loss_of(job: "Job", eval_set: "EvalSet") -> dict[str, float]:
    """Sums over the whole set, divided once: the same number for every batch size and number of processes."""
    sums, role, counts = Sums(), job.accelerator.unwrap_model(job.policy), counts_of(eval_set.rows)
    role.eval()

    def ask(name: str, batch: Batch) -> Any:
        return role(batch) if name == "policy" else job.models(name, batch)

    with torch.no_grad():
        for rows in chunks(eval_set.rows, job.plan.resolved.per_device_eval_batch_size, job.rank, job.world):
            if job.stop.wanted and not job.sharded:
                break
            batch = job.batch(rows, measure=True)
            sums.add(job.method.loss(batch, ask, counts).metrics)
    unless_stopping(job)
    means = sums.means(job)
    return {f"{eval_set.prefix}{name}": value for name, value in means.items()}


def chunks(rows: Sequence[Row], size: int, rank: int, world: int) -> list[list[Row]]:
    """This process's share, rows of alike length together; as many forwards as every other process makes. Where there
    are no rows left for one it computes the shortest silently."""
    ordered = sorted(rows, key=lambda row: -row.length)
    own, most = ordered[rank::world], len(ordered[::world])
    return [own[i : i + size] or [silent(ordered[-1])] for i in range(0, most, size)]


def generated(job: "Job", eval_set: "EvalSet", step: int, samples: list[dict[str, Any]]) -> dict[str, float]:
    """The metric on greedy answers; its first answers are added to the samples."""
    assert job.metric is not None
    name, metric = job.metric
    texts = spread(job, eval_set.prompts, step, temperature=0.0)
    scores = metrics.judge(name, metric, texts, [p.answer for p in eval_set.prompts])
    for prompt, text in list(zip(eval_set.prompts, texts, strict=True))[: job.recipe.eval.sample_prompts]:
        samples.append(sample_event(job, step, eval_set.name, prompt, text))
    return {f"{eval_set.prefix}{name}": sum(scores) / len(scores)}


def sample(job: "Job", step: int) -> list[dict[str, Any]]:
    """A few answers at the recipe's temperature, to be read."""
    prompts = job.sample_prompts
    if not prompts:
        return []
    texts = spread(job, prompts, step, temperature=job.recipe.generation.temperature)
    return [sample_event(job, step, "", prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def sample_event(job: "Job", step: int, name: str, prompt: Prompt, text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": prompt.text, "answer": text, "reference": prompt.answer, "row": prompt.source}
    return job.event("sample", step, **({"set": name} if name else {}), **fields)


def spread(job: "Job", prompts: Sequence[Prompt], step: int, *, temperature: float) -> list[str]:
    """Answers to all prompts, each process answering its share. Collective."""
    with job.gathered():  # answers are of unequal lengths
        own = answers(
            job.generator,
            job.tokenizer,
            prompts[job.rank :: job.world],
            stop_ids=job.stop_ids,
            max_new_tokens=job.recipe.generation.max_new_tokens,
            temperature=temperature,
            top_p=job.recipe.generation.top_p,
            seed=job.recipe.seed + step,
            stop=lambda: job.stop.wanted,
        )
    unless_stopping(job)
    shares = job.gather(own)
    texts = [""] * len(prompts)
    for rank, share in enumerate(shares):
        texts[rank :: job.world] = share
    return texts
