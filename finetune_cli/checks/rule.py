"""A rule: what it looks for, why, and what to do; and what rules look at, one class a stage."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from finetune_cli.errors import Problem
from finetune_cli.plan.facts import Facts
from finetune_cli.plan.resolve import Plan
from finetune_cli.recipe.load import Loaded
from finetune_cli.recipe.sections import Recipe

if TYPE_CHECKING:
    from finetune_cli.data.cells import Raw
    from finetune_cli.data.chat import Chat
    from finetune_cli.data.encode import Encoded
    from finetune_cli.data.rows import RowSets
    from finetune_cli.data.sources import Table

Severity = Literal["error", "warning"]
EXAMPLES = 3
FEW = 0.01
"""Share of rows from which an oddity of rows is worth a warning."""


@dataclass(frozen=True)
class Found:
    """What a rule found in this recipe: the evidence, at a dotted key."""

    key: str
    evidence: str
    remedy: str = ""
    """Where the evidence says more exactly what to do than the rule does."""
    severity: Severity | None = None
    """Where it is not the rule's usual one."""


S = TypeVar("S", bound="Seen", contravariant=True)
Check = Callable[[S], Iterator[Found]]


@dataclass(frozen=True)
class Rule:
    """One way in which fine-tunes fail. It has a check in at least one stage, or is `held` by how the engine works."""

    id: str
    title: str
    severity: Severity
    why: str
    """What goes wrong, and where it was reported or measured."""
    remedy: str
    error_when: str = ""
    """When a rule that usually warns is an error."""
    lint: "Check[Seen] | None" = None
    """On the recipe alone. No torch."""
    model: "Check[SeenModel] | None" = None
    """On tokenizer and configuration; no weights."""
    raw: "Check[SeenRaw] | None" = None
    """On rows as they are in the files."""
    rows: "Check[SeenRows] | None" = None
    """On rows as they are trained."""
    held: str = ""
    """What in the engine keeps it from happening."""
    proof: str = ""
    """The test that shows it: file::name."""

    @property
    def checked(self) -> bool:
        return any((self.lint, self.model, self.raw, self.rows))

    @property
    def stages(self) -> str:
        """The stages it has a check in."""
        known = {
            "recipe": self.lint, "tokenizer and configuration": self.model, "files": self.raw, "rows": self.rows,
        }  # fmt: skip
        return ", ".join(name for name, check in known.items() if check is not None) or "the engine"

    @property
    def can_be_ignored(self) -> bool:
        return self.checked and self.severity == "warning"

    def problems(self, check: Check[S] | None, seen: S) -> Iterator[Problem]:
        for found in check(seen) if check is not None else ():
            text = "; ".join(filter(None, (found.evidence, found.remedy or self.remedy)))
            severity = found.severity or self.severity
            yield seen.loaded.problem(found.key, text, rule=self.id, severity=severity)


@dataclass(frozen=True)
class Seen:
    """A recipe, and the plan it becomes on this machine."""

    loaded: Loaded
    plan: Plan

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def facts(self) -> Facts:
        return self.plan.facts

    @property
    def adapted(self) -> bool:
        """Whether adapters are trained rather than all weights."""
        return self.recipe.lora is not None or self.facts.kind == "adapter"


@dataclass(frozen=True)
class Weights:
    """What a model's configuration says of its weights, which are not read."""

    total: int
    trained: int
    embedding_rows: int
    window: int | None
    """Longest sequence, in tokens, that the configuration names."""
    in_blocks: int = 0
    """Weights of the linear layers of the blocks."""
    linear: tuple[str, ...] = ()
    """Names of the linear layers of the blocks."""
    adapted: tuple[str, ...] = ()
    """Those of them that get an adapter."""
    refused: str = ""
    """Why adapters cannot be attached as asked."""
    misfit: str = ""
    """Why the starting adapter is not one of this model."""
    positions: int | None = None
    """Longest sequence, in tokens, that can be computed at all: rows of an embedding of positions; None where positions
    are a formula."""


@dataclass(frozen=True)
class SeenModel(Seen):
    """And its tokenizer and its sizes."""

    tokenizer: Any
    chat: "Chat"
    stops: Sequence[int]
    """Ids that inference stops on."""
    weights: Weights
    reference_tokens: "Mapping[str, int]"
    """The vocabulary of a reference that is another model; empty where there is none."""


@dataclass(frozen=True)
class SeenRaw(SeenModel):
    """And its rows, not yet encoded."""

    tables: "dict[str, list[Table]]"
    """The sources of every set, by its key in the recipe."""

    def raws(self, key: str) -> "list[Raw]":
        """The rows of a set; a row's `source` is its place in this list."""
        return [raw for table in self.tables[key] for raw in table.raws]

    def first(self, key: str, sources: Sequence[int]) -> str:
        """`first: train.jsonl:3, 9, 12`, or `first: train.json rows 2, 8, 11` where a file has no lines of rows."""
        from finetune_cli.data.cells import places

        raws = self.raws(key)
        return f"first: {places([raws[source] for source in sorted(set(sources))[:EXAMPLES]])}"


@dataclass(frozen=True)
class SeenRows(SeenRaw):
    """And its rows as they are trained."""

    sets: "RowSets"

    @property
    def encoded(self) -> "dict[str, Encoded]":
        """Every set that has a key of its own in the recipe; what `data.eval_split` holds out is in none."""
        named = {f"data.eval_sets.{name}".rstrip("."): name for name in self.recipe.data.eval_sets or {}}
        return {"data.train": self.sets.train} | {key: self.sets.evals[name][0] for key, name in named.items()}


def share(part: int, whole: int, noun: str = "rows") -> str:
    """`3 of 500 rows (0.6%)`."""
    return f"{part:,} of {whole:,} {noun} ({part / whole:.1%})"


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {noun}" + "s" * (number != 1)
