"""The reference of a run: the frozen model that the policy is compared with, in one of three forms.

The model with the adapter off: the same weights. What the policy starts as: frozen copies of what is trained, switched
in for a forward (an adapter's are small). Another model, loaded beside it. Or its log-probabilities alone, computed
before training in the batches of the first epoch, so that step 0 sees the very numbers that the policy gives, and kept
on disk under a name that is a hash of everything they depend on.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finetune_cli.data.batches import Batch
from finetune_cli.engine import layout, models, shard
from finetune_cli.engine.evaluate import chunks
from finetune_cli.engine.pieces import Pieces
from finetune_cli.engine.reference_cache import Store, Values, row_key, weights_key
from finetune_cli.engine.role import Backbone, Role
from finetune_cli.errors import TrainError
from finetune_cli.methods.base import Reference as Wanted
from finetune_cli.plan import facts
from finetune_cli.recipe.sections import Model
from finetune_cli.types import Row, Scores

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model under its adapter. peft clears requires_grad on the way; it is as it was afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with model.disable_adapter():
        yield
    for p in trained:
        p.requires_grad_(True)


@contextmanager
def switched(pieces: Pieces, trained: Sequence[nn.Parameter], copies: Sequence[Tensor]) -> Iterator[None]:
    """Frozen copies in the place of what is trained; autograd and the optimiser never see them. Of weights in pieces
    it is the content that is exchanged: layers are gathered from the memory that they were cut into."""
    own = [pieces.own_piece(p).clone() if pieces.is_piece(p) else p.data for p in trained]
    try:
        put(pieces, trained, copies)
        yield
    finally:
        put(pieces, trained, own)


def put(pieces: Pieces, params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        if pieces.is_piece(p):
            pieces.own_piece(p).copy_(value)
        else:
            p.data = value


@dataclass
class Reference:
    """A module that scores, and a context in which it is the reference. `copies` are what `sync` moves."""

    role: nn.Module
    view: Callable[[], AbstractContextManager[None]] = nullcontext
    relayout: Callable[[Batch], Batch] = lambda batch: batch
    """For a model that cannot take rows in the policy's layout."""
    trained: list[nn.Parameter] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    sync_steps: int | None = None
    sync_alpha: float = 1.0
    pieces: Pieces = shard

    @torch.no_grad()
    def scores(self, batch: Batch) -> Scores:
        """Without dropout, whatever the policy does."""
        training = self.role.training
        self.role.eval()
        try:
            with self.view():
                scored: Scores = self.role(self.relayout(batch))
        finally:
            self.role.train(training)
        return scored

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Where a move is due: reference = alpha policy + (1 - alpha) reference (TR-DPO, arXiv 2404.09656, eq. 5)."""
        if self.sync_steps is not None and step % self.sync_steps == 0:
            for p, copy in zip(self.trained, self.copies, strict=True):
                copy.lerp_(self.pieces.own_piece(p), self.sync_alpha)


def of_policy(role: Backbone, model: Any, wanted: Wanted, pieces: Pieces) -> Reference:
    """The policy's own weights as they are at its start."""
    if wanted.kind == "adapter off":
        return Reference(role, lambda: adapter_off(model))
    if wanted.precompute:
        return Reference(role)
    trained = role.own()
    return copied(role, trained, [pieces.own_piece(p).clone() for p in trained], wanted, pieces)


def copied(
    role: nn.Module, trained: list[nn.Parameter], copies: list[Tensor], wanted: Wanted, pieces: Pieces
) -> Reference:
    moves: Any = {"sync_steps": wanted.sync_steps, "sync_alpha": wanted.sync_alpha, "pieces": pieces}
    return Reference(role, lambda: switched(pieces, trained, copies), trained=trained, copies=copies, **moves)


def of_start(job: "Job", role: Backbone, location: models.Location, wanted: Wanted) -> Reference:
    """The same for a resumed run, whose policy has moved on: what it started from is loaded again."""
    model = models.load_policy(job.plan, location)
    if wanted.precompute:
        return beside(job, model)
    own, start = role.own(), [p.detach().to(job.device) for p in model.parameters() if p.requires_grad]
    copies = [job.pieces.piece_of(one, p) for one, p in zip(start, own, strict=True)]
    return copied(role, own, copies, wanted, job.pieces)


def of_another(job: "Job", name: str) -> Reference:
    """Another model, or another adapter on its base."""
    location = located(name)
    model = models.load_stock(job.plan, location, getattr(torch, job.plan.resolved.dtype))
    if location.adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, location.adapter)
    return beside(job, model)


def located(name: str) -> models.Location:
    return models.locate(Model(name_or_path=name), base_of_adapter=facts.look(name).base)


def beside(job: "Job", model: Any) -> Reference:
    """A model of its own, frozen."""
    model.requires_grad_(False)
    role = Role(model)
    padded_because = layout.choose(role.stock, job.recipe.model)
    prepared = job.accelerator.prepare_model(role, evaluation_mode=True)
    job.accelerator._models.remove(prepared)  # it would keep one that is asked once and then freed
    if (padded_because is None) == (job.padded_because is None):
        return Reference(prepared)
    return Reference(
        prepared, relayout=lambda batch: job.batch(batch.rows, measure=False, as_padded=padded_because is not None)
    )


# ── what a run does with it ───────────────────────────────────────────────────────────────────────────────────────────


def attach(job: "Job", location: models.Location, *, resumed: bool) -> None:
    """Give the job its reference, or its rows the reference's log-probabilities. Collective.

    Raises TrainError where the policy, before its first step, is not what the reference says it is.
    """
    wanted = job.plan.resolved.reference
    if wanted is None:
        return
    role = job.accelerator.unwrap_model(job.policy)
    if wanted.model is not None:
        reference = of_another(job, wanted.model)
    elif resumed and wanted.kind == "start":
        reference = of_start(job, role, location, wanted)
    else:
        reference = of_policy(role, role.model, wanted, job.pieces)
    counts: dict[str, Any] = {}
    if wanted.precompute:
        with job.gathered():  # which rows are known already may differ
            counts = remember(job, reference, wanted)
    if not wanted.precompute:
        job.reference = reference
    del reference
    gc.collect()  # a model that autocast is wrapped around refers to itself
    job.reference_report = {**wanted.model_dump(), "about": wanted.about, **counts}
    if not resumed and wanted.starts_equal:
        check_start(job, role, exact=not counts.get("from_disk"))


def remember(job: "Job", reference: Reference, wanted: Wanted) -> dict[str, Any]:
    """Log-probabilities of all rows of the run, from disk where they are; (counts, seconds). The batches are those of
    the first epoch and of evaluation, so that the policy's own numbers are the same to the last bit."""
    started = time.perf_counter()
    method, resolved = job.method, job.plan.resolved
    settings = {"precision": resolved.precision, **method.reference_settings()}
    store = Store.open(weights_key(reference.role.model, adapter=wanted.kind != "adapter off", settings=settings))
    size = resolved.per_device_eval_batch_size
    batches = [*job.own_batches()]
    batches += [rows for s in job.eval_sets for rows in chunks(s.rows, size, job.rank, job.world)]
    found: Values = {}
    for rows in batches:
        missing = [row for row in rows if row.targets and row_key(row) not in store.values]
        if missing:
            batch = job.batch(rows, measure=False)
            numbers = method.remembered(batch, reference.scores(batch))
            found |= {row_key(row): tuple(values) for row, values in zip(rows, numbers, strict=True) if row.targets}
    for share in job.gather(found):
        found |= share
    known = {**store.values, **found}
    if found and job.accelerator.is_main_process:
        store.add(found)
    job.units = [[with_values(row, known, method.remembers) for row in unit] for unit in job.units]
    job.eval_sets = [
        replace(s, rows=[with_values(row, known, method.remembers) for row in s.rows]) for s in job.eval_sets
    ]
    rows_known = sum(row.extra.keys() >= set(method.remembers) for unit in job.units for row in unit)
    rows_known += sum(len(s.rows) for s in job.eval_sets)
    counts = {"computed": len(found), "from_disk": rows_known - len(found), "seconds": time.perf_counter() - started}
    job.emit({"event": "reference", **counts})
    return counts


def with_values(row: Row, known: Values, names: Sequence[str]) -> Row:
    """Rows beyond the end of a short run have none."""
    values = known.get(row_key(row))
    return row if values is None else replace(row, extra={**row.extra, **dict(zip(names, values, strict=True))})


@torch.no_grad()
def check_start(job: "Job", role: nn.Module, *, exact: bool) -> None:
    """On the first batch the policy and its reference must be the same model: every margin 0.

    Numbers from disk may come of other batches, so there rounding is allowed.
    """
    rows = next(iter(job.own_batches()), None)
    if rows is None:
        return
    batch, method = job.batch(rows, measure=False), job.method
    training = role.training
    role.eval()
    policy = method.remembered(batch, role(batch))
    role.train(training)
    if job.reference is not None:
        theirs = method.remembered(batch, job.reference.scores(batch))
    else:
        theirs = [[row.extra[name] for name in method.remembers] for row in rows]
    slack, share = (0.0, 0.0) if exact else (1e-3, 1e-5) if job.plan.resolved.precision == "fp32" else (0.5, 1e-2)
    for row, ours, others in zip(rows, policy, theirs, strict=True):
        for a, b in zip(ours, others, strict=True):
            if not abs(a - b) <= slack + share * abs(b):  # not a number is wrong too
                raise TrainError(
                    f"before the first step the policy gives row {row.source} log-probability {a:.6g} and its "
                    f"reference {b:.6g}: the reference is not what the policy starts from",
                    "Please report this; method.precompute_ref_log_probs and method.ref_model choose another way.",
                )
