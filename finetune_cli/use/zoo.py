"""The recipes that come with finetune: what each is for, what it needs, and what it was measured to take.

A recipe's first comment says it, to people and to programs: some prose, then lines `# hardware:`, and where it was run
`# time:`, `# memory:` (each begins with its number) and `# result:`.
"""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from filecmp import cmp
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_cli.errors import MachineError, RecipeError
from finetune_cli.plan.changes import leaves
from finetune_cli.plan.facts import Facts
from finetune_cli.plan.machine import Gpu, Machine
from finetune_cli.plan.memory import estimate, setup
from finetune_cli.plan.resolve import resolve
from finetune_cli.recipe.load import Loaded, load
from finetune_cli.shipped import recipes_folder, schemas_folder

FACT = re.compile(r"(hardware|time|memory|result): (.+)")
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
AMOUNT = re.compile(r"(?P<number>[0-9.]+) (?P<unit>s|min|h|GiB)\b")
GPUS = re.compile(r"(?P<count>\d+) GPUs? of (?P<size>\d+) GB")
AMPERE = 8.0
"""Compute capability from which a GPU multiplies bfloat16."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Entry:
    """One recipe that comes with finetune."""

    path: Path
    about: str
    facts: dict[str, str]
    """hardware, and as far as it was measured time, memory and result, in words."""

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def loaded(self) -> Loaded:
        return load(self.path)

    @property
    def method(self) -> str:
        return self.loaded.recipe.method.name

    @property
    def model(self) -> str:
        """As the recipe has it."""
        name = self.loaded.recipe.model.name_or_path
        return Path(os.path.relpath(name, self.path.parent)).as_posix() if os.path.isabs(name) else name

    @property
    def seconds(self) -> float | None:
        """Of training, as measured."""
        return _amount(self.facts.get("time"))

    @property
    def memory_gib(self) -> float | None:
        """At the peak, as measured."""
        return _amount(self.facts.get("memory"))

    @cached_property
    def estimated_gib(self) -> float | None:
        """What `plan` says of one process on the hardware that is named; None where it was measured, or where the sizes
        of the model are not known."""
        recipe, found = self.loaded.recipe, GPUS.search(self.facts["hardware"])
        if self.memory_gib is not None or found is None:
            return None
        gpu = Gpu(name="a GPU", memory_gib=float(found["size"]) * 1e9 / 2**30, compute_capability=AMPERE)
        machine = Machine(cpus=8, memory_gib=None, gpus=[gpu] * int(found["count"]), cpu_bf16=False)
        plan = resolve(recipe, self.loaded.data, machine, Facts(kind="hub"), recipe_path=self.path, world=None)
        basis = setup(plan)
        return estimate(basis).gib if basis is not None else None

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """name, method, hardware, time, memory, in words; where memory was not measured, the estimate of it."""
        taken = f"{self.seconds:.0f} s" if self.seconds is not None else NOT_MEASURED
        memory = f"{self.memory_gib:.1f} GiB" if self.memory_gib is not None else NOT_MEASURED
        if self.estimated_gib is not None:
            memory = f"about {self.estimated_gib:.1f} GiB (estimated)"
        return self.name, self.method, self.facts["hardware"], taken, memory

    def to_json(self) -> dict[str, Any]:
        measured = {"seconds": self.seconds, "memory_gib": self.memory_gib, "result": self.facts.get("result")}
        return {
            "name": self.name, "method": self.method, "model": self.model, "hardware": self.facts["hardware"],
            "measured": measured if self.seconds is not None else None, "estimated_memory_gib": self.estimated_gib,
            "about": self.about, "path": str(self.path),
        }  # fmt: skip


def _amount(text: str | None) -> float | None:
    """Seconds or GiB at the beginning of a line."""
    found = AMOUNT.match(text or "")
    return float(found["number"]) * SECONDS.get(found["unit"], 1.0) if found is not None else None


def entries() -> list[Entry]:
    """Every recipe that comes with finetune, by name."""
    return [entry(path) for path in sorted(recipes_folder().glob("*.yaml"))]


def entry(path: Path) -> Entry:
    comment = list(_first_comment(path.read_text(encoding="utf-8")))
    facts = {found[1]: found[2] for line in comment if (found := FACT.fullmatch(line))}
    return Entry(path, " ".join(line for line in comment if not FACT.fullmatch(line)), facts)


def _first_comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("# "):
            return
        if not line.startswith("# yaml-language-server"):
            yield line.removeprefix("# ")


# ── to start from one ─────────────────────────────────────────────────────────────────────────────────────────────────


def schema_path() -> str:
    """Where an editor finds the schema, whatever folder the recipe is in."""
    return str((schemas_folder() / "recipe.schema.json").resolve().as_uri())


def copy(name: str, output: Path) -> list[Path]:
    """Write the recipe `name` with the files that it names beside it; what was written, the recipe first.

    Raises RecipeError where a file of another content is there already, MachineError where one cannot be written.
    """
    one = entry(recipes_folder() / f"{name}.yaml")
    text = re.sub(r"(?<=\$schema=)\S+", lambda _: schema_path(), one.path.read_text(encoding="utf-8"), count=1)
    runs = Path(os.path.relpath("runs", output.parent)).as_posix()
    text = text.replace("../runs/", f"{runs}/")  # runs are below the working directory, wherever the recipe is
    files = {source: output.parent / source.relative_to(recipes_folder()) for source in named(one)}
    for source, target in files.items():
        if target.exists() and not cmp(source, target, shallow=False):
            raise RecipeError(f"{target} exists and is another file", "Name another folder with --output.")
    try:
        for source, target in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{error.filename} cannot be written: {error.strerror}", "Name another --output.") from error
    return [output, *files.values()]


def named(one: Entry) -> list[Path]:
    """Files under the folder of recipes that a recipe names: rows, rewards, templates."""
    texts = [text for _, value in leaves(one.loaded.data) for text in _texts(value)]
    paths = [Path(re.sub(r"(?<=\.py):\w+$", "", text)) for text in texts]
    return sorted({path for path in paths if path.is_relative_to(recipes_folder()) and path.is_file()})


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
