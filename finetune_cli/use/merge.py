"""`finetune merge`: an adapter added into its base, compared with what it was, and saved as a model of its own.

The base is loaded again in 16 or 32 bits, whatever it was trained on: rounding a merged weight to 4 bits loses the
adapter. The sum is made in float32 and rounded once. What is compared is the saved model, read back by transformers.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_cli.data.rows import load_rows
from finetune_cli.engine import models
from finetune_cli.engine.prepare import Words, bind
from finetune_cli.errors import ModelError, RecipeError
from finetune_cli.plan.resolve import Plan
from finetune_cli.use.finished import plan_of

ROWS, TOKENS = 4, 256
"""What the two are compared on: rows of the run, the beginning of each."""
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05}
"""The largest difference of a logit that is rounding, as a share of the largest logit. A weight in bfloat16 is rounded
by up to 0.4%; SmolLM2-135M's logits move by 1%."""
SHARD = "5GB"


@dataclass(frozen=True)
class Agreement:
    """How near the merged model is to base and adapter."""

    largest: float
    """Difference of a logit, as a share of the largest logit."""
    same: float
    """Share of the positions whose most probable token is the same."""
    positions: int

    def __str__(self) -> str:
        return (
            f"logits differ by at most {self.largest:.2g} of the largest; the most probable token is the same at "
            f"{self.same:.1%} of {self.positions} positions"
        )


def merge(run: Path, output: Path | None = None, *, dtype: str = "auto") -> tuple[Path, str, Agreement]:
    """(folder, number format, agreement). Raises RecipeError for a run without adapter or a folder that is in use,
    ModelError where the merged model says something else than the adapter."""
    plan = plan_of(run)
    if not (run / "adapter_config.json").is_file():
        raise RecipeError(
            f"{run} holds no adapter",
            "All weights were trained: the run folder is the model already, nothing to merge.",
        )
    target = run / "merged" if output is None else output
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target} exists", "Name another folder with --output, or remove it.")
    kind = dtype if dtype != "auto" else "float32" if plan.resolved.precision == "fp32" else "bfloat16"
    words = bind(plan.recipe, plan.facts)
    ids = sequences(plan, words)
    model = adapted(plan, words, run, kind)
    before = logits(model, ids)
    beside = target.with_name(target.name + ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        write(model.merge_and_unload(), run, words, beside, kind)
        del model
        found = agreement(before, logits(read_back(plan, beside), ids))
        if not found.largest <= BOUNDS[kind]:  # not a number is wrong too
            raise ModelError(
                f"the merged model is not what base and adapter are: {found}; the bound is {BOUNDS[kind]:g}",
                "Try --dtype float32. Nothing was written.",
            )
        if target.is_dir():
            target.rmdir()
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target, kind, found


def adapted(plan: Plan, words: Words, run: Path, kind: str) -> Any:
    """Base and adapter in float32, after the base was rounded to what it is saved in; never quantised."""
    from peft import PeftModel

    whole = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"quantization": None})})
    base = models.load_stock(whole, words.location, getattr(torch, kind)).float()
    return PeftModel.from_pretrained(base, str(run)).eval()


def sequences(plan: Plan, words: Words) -> list[list[int]]:
    """The beginnings of some rows of the run: of those that were held out where there are any."""
    sets = load_rows(plan.recipe, words.chat)
    rows = next((found.rows for found, _ in sets.evals.values() if found.rows), sets.train.rows)
    # a prompt that the run answered itself has no branch
    return [[*row.prefix, *(row.branches[0].ids if row.branches else ())][:TOKENS] for row in rows[:ROWS]]


@torch.no_grad()
def logits(model: Any, ids: list[list[int]]) -> list[Tensor]:
    """Row by row, so that nothing is padded; float32."""
    return [model(input_ids=torch.tensor([one]), use_cache=False).logits[0].float() for one in ids]


def agreement(before: list[Tensor], after: list[Tensor]) -> Agreement:
    one, other = (torch.cat([x.reshape(-1, x.shape[-1]) for x in some]) for some in (before, after))
    same = (one.argmax(-1) == other.argmax(-1)).float().mean()
    return Agreement(float((one - other).abs().max() / one.abs().max()), float(same), len(one))


def write(model: Any, run: Path, words: Words, folder: Path, kind: str) -> None:
    """Model, tokenizer with its template, and the stop tokens, as plain transformers reads them."""
    from transformers import AutoTokenizer, GenerationConfig

    models.untie(model)
    model.to(getattr(torch, kind))
    model.config.use_cache = True
    tokenizer = AutoTokenizer.from_pretrained(run)
    if not model.can_generate():  # a classifier, which is read at the last token that is no pad: the run's pad
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    else:
        if (run / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(run)
        model.generation_config.eos_token_id = words.stops if len(words.stops) != 1 else words.stops[0]
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def read_back(plan: Plan, folder: Path) -> Any:
    """As anyone would load it, in float32 for the comparison."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    labels = plan.recipe.method.labels()
    kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    remote = plan.recipe.model.trust_remote_code
    return kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote).eval()
