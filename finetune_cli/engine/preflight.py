"""The checks that need a tokenizer and the rows, and no weights: what `validate` and every run do first."""

from dataclasses import dataclass
from typing import Any

from finetune_cli.checks import model as model_rules
from finetune_cli.checks import stages
from finetune_cli.checks.raw import tables_of
from finetune_cli.checks.rule import Seen, SeenModel, SeenRaw, SeenRows
from finetune_cli.data.rows import RowSets, load_rows
from finetune_cli.engine import meta, models, reference
from finetune_cli.engine.prepare import Words, bind
from finetune_cli.errors import DataError
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.sections import Model


@dataclass(frozen=True)
class Examined:
    """What the checks had to read anyway, for what follows them."""

    seen: SeenRows
    words: Words
    sets: RowSets


def examine(seen: Seen, note: stages.Note) -> Examined:
    """Tokenizer and configuration, then rows. `note` hears warnings. Raises ModelError or DataError, with everything
    that is wrong in the stage."""
    loaded, plan = seen.loaded, seen.plan
    words = bind(plan.recipe, plan.facts)
    weights = meta.look(plan.recipe, words.location)
    known = (loaded, plan, words.tokenizer, words.chat, words.stops, weights, reference_tokens(plan))
    stages.model(SeenModel(*known), note)
    files = SeenRaw(*known, tables_of(plan.recipe))
    errors = stages.raw(files, note)
    try:
        sets = load_rows(plan.recipe, words.chat)
    except DataError as error:
        raise stages.together(errors, error) from error
    rows = SeenRows(*known, files.tables, sets)
    stages.rows(rows, note, errors)
    return Examined(rows, words, sets)


def reference_tokens(plan: Plan) -> dict[str, int]:
    """The vocabulary of a reference that is another model."""
    wanted = plan.resolved.reference
    if wanted is None or wanted.model is None:
        return {}
    tokenizer = models.load_tokenizer(Model(name_or_path=wanted.model), reference.located(wanted.model))
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return vocabulary


def sizes(found: Examined) -> dict[str, Any]:
    """Numbers of weights, and GiB by use and number format."""
    weights = found.seen.weights
    return {"total": weights.total, "trained": weights.trained, "gib": model_rules.memory(found.seen)}
