"""What an online method learns from: prompts answered, answers judged and scored by every role, credit for each token.

A step draws its prompts, answers them once, and learns from the answers in `epochs` passes of `parts` updates. Prompts
stay in the forwards in which their answers were scored, so that the first update meets the very log-probabilities that
the answers were drawn with, and nothing of a step outlives it: a checkpoint needs no more than weights and the step.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from finetune_cli.data.batches import Batch, counts_of
from finetune_cli.data.chat import Chat
from finetune_cli.data.rows import Given
from finetune_cli.engine import metrics, rewards
from finetune_cli.engine.actor import POLICY, Actor
from finetune_cli.engine.evaluate import sample_event, unless_stopping
from finetune_cli.engine.judge import Answers
from finetune_cli.engine.rewards import Source
from finetune_cli.engine.rollout import Generator, Local, without_stop
from finetune_cli.engine.update import Sums, Update
from finetune_cli.errors import RecipeError
from finetune_cli.methods.online import Credit, Online, Rollout
from finetune_cli.plan.memory import scored_once
from finetune_cli.types import Branch, Counts, Prompt, Row

if TYPE_CHECKING:
    from finetune_cli.engine.job import EvalSet, Job

FEW = 3
"""Answers that every reward is tried on before anything is trained."""
EXACT = 1e-4
"""How far from 1 the ratio of new to old probabilities may be before anything has changed."""


@dataclass
class Experience:
    """The part of a job that answers prompts and finds what the answers are worth."""

    job: "Job"
    method: Online
    actor: Actor
    stop_ids: list[int]
    generator: Generator
    data: Mapping[str | None, Mapping[int, Given]]
    """The rows by set and source, as in `RowSets`."""
    sources: list[Source] = field(default_factory=list)
    told: bool = False
    """Whether it has been said why the first ratio is not 1."""

    @property
    def scored_once(self) -> bool:
        """Whether the forwards that score answers are the first update's as well."""
        return scored_once(self.job.plan) and not self.drops

    @property
    def drops(self) -> bool:
        """Whether the policy is another while it is trained."""
        return any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.actor.modules())

    # ── roles ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, role: str, batch: Batch) -> Any:
        """What a role says of a batch. A switch to a role holds until another is asked."""
        if role == "reference":
            assert self.job.reference is not None
            self.actor.switch(POLICY)
            return self.job.reference.scores(batch)
        return self.actor(batch, role)

    def state(self) -> dict[str, Tensor]:
        """The critic, for a checkpoint."""
        return {name: p.detach().cpu() for name, p in self.actor.beside().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, p in self.actor.beside().items():
            p.copy_(state[name])

    # ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────

    def updates(self, step: int, sums: Sums, *, measure: bool = False) -> Iterator[Update]:
        """The optimiser updates of a step. Collective; logs into `sums`."""
        method, job = self.method, self.job
        parts = [list(self.forwards(step, part)) for part in range(method.parts)]
        answered = self.answer([rows for part in parts for rows in part], step)
        kept = Kept(measure) if self.scored_once and len([*filter(None, answered)]) == 1 else None
        scored = iter(self.credited(answered, sums, first=step == 0, kept=kept))
        window = [[next(scored) for _ in part] for part in parts]
        counts, tokens = self.counts(window)
        for epoch in range(method.epochs):
            order = [part for part in range(method.parts) if counts[part].tokens]
            random.Random(f"updates {job.recipe.seed} {step} {epoch}").shuffle(order)
            for number, part in enumerate(order):
                forwards = [rows for rows in window[part] if rows] or [[self.silent()]]
                first = kept.said if kept is not None and epoch == number == 0 else {}
                update = Update(forwards, counts[part], tokens[part], first)
                yield update
                if epoch == number == 0:
                    self.check_ratio(update, step)
                found = {name: a / n for name, (a, n) in update.found.over_processes(job).items() if n}
                if method.enough(found):
                    return

    def silent(self) -> Row:
        """A row with nothing to learn: what a process computes when an update has none for it, so that all of them
        know the names of what is logged."""
        nothing = defaultdict[str, list[float]](list)
        return Row(self.job.units[0][0].prefix, (Branch([self.job.pad_id], [False], numbers=nothing),))

    def forwards(self, step: int, part: int) -> Iterator[list[Row]]:
        """This process's prompts, forward by forward."""
        job = self.job
        for own in job.schedule.window(step, rank=job.rank, world=job.world, part=part, parts=self.method.parts):
            yield job.rows_of(own)

    def answer(self, forwards: Sequence[list[Row]], step: int) -> list[list[Row]]:
        """The same rows with `num_generations` answers each."""
        group = self.method.num_generations
        prompts = [row.prefix for rows in forwards for row in rows for _ in range(group)]
        # not the state of a generator: a run that goes on draws what it would have drawn
        seed = random.Random(f"answers {self.job.recipe.seed} {step} {self.job.rank}").getrandbits(32)
        temperature = self.job.recipe.generation.temperature
        self.actor.switch(POLICY)
        drawn = self.generator(prompts, temperature=temperature, seed=seed)
        unless_stopping(self.job)
        groups = (drawn[i : i + group] for i in range(0, len(drawn), group))
        return [[answered(row, next(groups)) for row in rows] for rows in forwards]

    def imagined(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows with answers as long as they may be, worth nothing: what a forward must have room for."""
        length = self.job.recipe.generation.max_new_tokens
        nothing = defaultdict[str, list[float]](lambda: [0.0] * length)
        answer = Branch([self.job.pad_id] * length, [True] * length, numbers=nothing)
        return [replace(row, branches=(answer,) * self.method.num_generations) for row in rows]

    @torch.no_grad()
    def credited(
        self, forwards: Sequence[list[Row]], sums: Sums, *, first: bool = False, kept: "Kept | None" = None
    ) -> list[list[Row]]:
        """The same rows with what each token is worth; `first` of a run, the critic is told the mean of that."""
        rows = [row for some in forwards for row in some]
        scores = self.scores(rows, None)
        lengths = [len(branch.ids) for row in rows for branch in row.branches]
        ended = [float(branch.ids[-1] in self.stop_ids) for row in rows for branch in row.branches]
        worth_R, ended_R = torch.tensor(self.summed(scores)), torch.tensor(ended)
        if first:
            paid_R = self.method.paid(worth_R, ended=ended_R)
            total, count = self.job.sum_over_processes(torch.stack([paid_R.sum(), ended_R.new_tensor(len(ended))]))
            self.actor.expect(total / max(1.0, count))
        logps, ref_logps, values = (
            ragged(self.column(forwards, role, kept), lengths) for role in ("policy", "reference", "value")
        )
        mask = ragged(torch.ones(sum(lengths)), lengths)
        group = self.method.num_generations
        rollout = Rollout(logps, ref_logps, values, mask, worth_R, ended_R, group)
        credit = self.method.credit(rollout, self.total)
        sums.add(credit.metrics)
        sums.add(self.about(rows, scores, ended))
        worth = iter(worth_of(credit, lengths))
        return [[with_numbers(row, worth) for row in some] for some in forwards]

    def column(self, forwards: Sequence[list[Row]], role: str, kept: "Kept | None") -> Tensor:
        """A number for each token of every answer, by a role; what it said is `kept` with its graph if it will learn
        from that."""
        kept = None if role == "reference" else kept
        training = self.actor.training
        self.actor.eval()
        found = [torch.zeros(0)]
        for rows in filter(None, forwards):
            batch = self.job.batch(rows, measure=kept is not None and kept.measure)
            with torch.set_grad_enabled(kept is not None):
                said = self.ask(role, batch)
            if kept is not None:
                kept.said[role] = said
            found.append((said if isinstance(said, Tensor) else said.logps_N).detach().float().cpu())
        self.actor.train(training)
        return torch.cat(found)

    def scores(self, rows: list[Row], of: str | None) -> list[list[float]]:
        """What every source says of every answer."""
        if not rows:
            return [[] for _ in self.sources]
        decode, data = self.job.tokenizer.decode, self.data[of if of in self.data else None]
        pairs = [(row, branch) for row in rows for branch in row.branches]
        answers = Answers(
            rows,
            [decode(row.prefix) for row, _ in pairs],
            [self.text(branch.ids) for _, branch in pairs],
            [data[row.source] for row, _ in pairs],
        )
        return [source.scores(answers) for source in self.sources]

    def text(self, ids: list[int]) -> str:
        """An answer without its stop token."""
        text: str = self.job.tokenizer.decode(without_stop(ids, self.stop_ids))
        return text

    def summed(self, scores: list[list[float]]) -> list[float]:
        """Over the sources, each with its weight."""
        return [
            sum(s.weight * x for s, x in zip(self.sources, each, strict=True)) for each in zip(*scores, strict=True)
        ]

    def total(self, value: Tensor) -> Tensor:
        return torch.tensor(self.job.sum_over_processes(value.reshape(1)))

    def counts(self, window: Sequence[Sequence[list[Row]]]) -> tuple[list[Counts], list[int]]:
        """Counts of each part, and the tokens that it computes, over all processes."""
        flat: list[float] = []
        for part in window:
            own = [row for rows in part for row in rows]
            flat += [counts_of(own).rows, counts_of(own).tokens, sum(row.length for row in own)]
        summed = [int(n) for n in self.job.sum_over_processes(torch.tensor(flat, dtype=torch.float64))]
        counts = [Counts(rows, tokens) for rows, tokens in zip(summed[::3], summed[1::3], strict=True)]
        return counts, summed[2::3]

    def about(self, rows: list[Row], scores: list[list[float]], ended: list[float]) -> dict[str, tuple[float, float]]:
        """What is logged of answers, whatever the method."""
        answers = [tuple(branch.ids) for row in rows for branch in row.branches]
        count = len(answers)
        found: dict[str, tuple[float, float]] = {
            "completions/mean_length": (sum(map(len, answers)), count),
            "completions/clipped_ratio": (count - sum(ended), count),
            "completions/distinct_ratio": (len(set(answers)), count),
        }
        if len(self.sources) > 1:
            found |= {f"rewards/{s.name}": (sum(each), count) for s, each in zip(self.sources, scores, strict=True)}
        return found

    def check_ratio(self, update: Update, step: int) -> None:
        """Before the first update of a step the policy must give its answers the probability they were drawn with."""
        total, count = update.found.own().get("policy/approxkl_avg", (0.0, 0.0))
        off = math.sqrt(2 * total / count) if count else 0.0
        if self.told or off <= EXACT:
            return
        self.told = True
        precision = self.job.plan.resolved.precision
        why = (
            "dropout changes the policy between scoring and training; set lora.lora_dropout: 0"
            if self.drops
            else f"the forward that trains rounds otherwise than the one that scored ({precision})"
        )
        said = f"the first update's ratio is off 1 by {off:.2g} (root mean square): {why}"
        self.job.emit(self.job.event("health", step, rule="first_ratio", message=said))

    # ── evaluation ────────────────────────────────────────────────────────────────────────────────────────────────

    def try_rewards(self) -> None:
        """Every reward on a few answers, before anything is trained. Raises TrainError where one is no reward."""
        rows = [row for unit in self.job.units[:FEW] for row in unit]
        drawn = self.generator([row.prefix for row in rows], temperature=0.0, seed=0)
        self.scores([answered(row, [ids]) for row, ids in zip(rows, drawn, strict=True) if ids], None)

    def evaluate(self, eval_set: "EvalSet", step: int, samples: list[dict[str, Any]]) -> dict[str, float]:
        """What answers to a set are worth, drawn as in training and always by the same seed; where the recipe has a
        metric, that of greedy ones, and what those are worth. Collective."""
        job = self.job
        rows = eval_set.rows[: job.recipe.eval.metric_rows]
        found = self.spread(rows, eval_set.name, temperature=job.recipe.generation.temperature)
        known = {prompt.source: prompt for prompt in eval_set.prompts}
        asked = [known.get(row.source) or self.as_prompt(row) for row in rows]
        numbers = {
            "objective/scores": sum(each.worth for each in found) / len(found),
            "completions/mean_length": sum(each.length for each in found) / len(found),
        }
        if job.metric is not None:
            found = self.spread(rows, eval_set.name, temperature=0.0)
            marks = metrics.judge(*job.metric, [each.text for each in found], [prompt.answer for prompt in asked])
            numbers[job.metric[0]] = sum(marks) / len(marks)
            numbers["objective/greedy_scores"] = sum(each.worth for each in found) / len(found)
        samples += self.told_of(step, eval_set.name, asked, found)
        return {f"{eval_set.prefix}{key}": value for key, value in numbers.items()}

    def samples(self, step: int) -> list[dict[str, Any]]:
        """Answers to the first training rows, to be read. Collective."""
        job = self.job
        rows = [row for unit in job.units[: job.recipe.eval.sample_prompts] for row in unit]
        found = self.spread(rows, None, temperature=job.recipe.generation.temperature)
        return self.told_of(step, "", [self.as_prompt(row) for row in rows], found)

    def told_of(self, step: int, name: str, asked: list[Prompt], found: list["Judged"]) -> list[dict[str, Any]]:
        few = list(zip(asked, found, strict=True))[: self.job.recipe.eval.sample_prompts]
        return [{**sample_event(self.job, step, name, prompt, each.text), "reward": each.worth} for prompt, each in few]

    def spread(self, rows: list[Row], of: str | None, *, temperature: float) -> list["Judged"]:
        """Answers to rows of a set and what they are worth, each process answering its share. Collective."""
        job = self.job
        shares = job.gather(self.judged(rows[job.rank :: job.world], of, temperature=temperature))
        return [shares[i % job.world][i // job.world] for i in range(len(rows))]

    def as_prompt(self, row: Row) -> Prompt:
        return Prompt(row.prefix, self.job.tokenizer.decode(row.prefix), "", row.source)

    def judged(self, rows: list[Row], of: str | None, *, temperature: float) -> list["Judged"]:
        """Answers to rows of a set, and what they are worth. The seed is always the same, so that two evaluations
        differ by what was learned between them."""
        self.actor.switch(POLICY)
        seed = random.Random(f"evaluation {self.job.recipe.seed} {self.job.rank}").getrandbits(32)
        drawn = self.generator([row.prefix for row in rows], temperature=temperature, seed=seed)
        unless_stopping(self.job)
        scores = self.scores([answered(row, [ids]) for row, ids in zip(rows, drawn, strict=True)], of)
        return [
            Judged(self.text(ids), len(ids), self.method.paid(score, ended=ids[-1] in self.stop_ids))
            for ids, score in zip(drawn, self.summed(scores), strict=True)
        ]


@dataclass
class Kept:
    """What roles said of the one forward of a step when its answers were scored, with their graphs."""

    measure: bool
    """Whether entropy is measured on the way."""
    said: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judged:
    """An answer, and what it is worth."""

    text: str
    length: int
    worth: float


def attach(job: "Job", actor: Actor, chat: Chat, data: Mapping[str | None, Mapping[int, Given]]) -> None:
    """Give the job what answers and judges. Raises where a reward cannot be had or is none."""
    method = job.method
    assert isinstance(method, Online)
    stop_ids = stops_of(method.stop_token, job)
    generator = Local(
        actor.model, stop_ids, job.pad_id, job.recipe.generation.max_new_tokens, stop=lambda: job.stop.wanted
    )
    job.experience = Experience(job, method, actor, stop_ids, generator, data)
    job.experience.sources = rewards.find(method.reward, job, actor, chat)
    job.experience.try_rewards()


def stops_of(token: str, job: "Job") -> list[int]:
    """The ids that end an answer."""
    if token == "eos":
        return job.stop_ids
    ids: list[int] = job.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise RecipeError(f"method.stop_token {token!r} is {len(ids)} tokens", "Name one token, or eos.")
    return ids


def answered(row: Row, drawn: Sequence[list[int]]) -> Row:
    return replace(row, branches=tuple(Branch(ids, [True] * len(ids)) for ids in drawn))


def ragged(flat_N: Tensor, lengths: Sequence[int]) -> Tensor:
    """The numbers of each answer in a row of their own, zeros behind them. [R, T]"""
    if not lengths:
        return flat_N.new_zeros(0, 1)
    return pad_sequence(list(torch.split(flat_N, list(lengths))), batch_first=True)


def worth_of(credit: Credit, lengths: Sequence[int]) -> Iterator[dict[str, list[float]]]:
    """Of each answer, its numbers by name."""
    lists = {name: x_RT.tolist() for name, x_RT in credit.numbers_RT.items()}
    for r, length in enumerate(lengths):
        yield {name: x[r][:length] for name, x in lists.items()}


def with_numbers(row: Row, worth: Iterator[dict[str, list[float]]]) -> Row:
    return replace(row, branches=tuple(replace(branch, numbers=next(worth)) for branch in row.branches))
