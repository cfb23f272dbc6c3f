"""An update of the weights: what every process computes for it, and what it finds on the way."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finetune_cli.types import Counts, Row

if TYPE_CHECKING:
    from finetune_cli.engine.job import Job


class Sums:
    """Sums and counts of logged numbers, over batches and then over processes; one division at the end."""

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None) -> None:
        self._sums: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0.0])
        self._sums.update({name: list(pair) for name, pair in (sums or {}).items()})

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (total, count) in metrics.items():
            self._sums[name][0] += total
            self._sums[name][1] += count

    def join(self, other: "Sums") -> None:
        self.add({name: (total, count) for name, (total, count) in other._sums.items()})

    def finite(self) -> bool:
        return all(math.isfinite(float(total)) for total, _ in self._sums.values())

    def own(self) -> dict[str, list[float]]:
        """name -> [sum, count] of this process."""
        return {name: [float(x) for x in pair] for name, pair in self._sums.items()}

    def over_processes(self, job: "Job") -> dict[str, list[float]]:
        """name -> [sum, count] of all processes. Collective: every process must call it with the same names."""
        names = sorted(self._sums)
        flat = torch.tensor([float(x) for name in names for x in self._sums[name]], dtype=torch.float64)
        total = job.sum_over_processes(flat)
        return {name: total[2 * i : 2 * i + 2] for i, name in enumerate(names)}

    def means(self, job: "Job") -> dict[str, float]:
        """Collective, like `over_processes`. Starts anew."""
        pairs = self.over_processes(job)
        self._sums.clear()
        return {name: total / count for name, (total, count) in pairs.items() if count}


@dataclass
class Update:
    """One step of the optimiser."""

    forwards: list[list[Row]]
    """The rows of this process, forward by forward."""
    counts: Counts
    """What the sums are divided by, over all processes."""
    tokens: int
    """That are computed in it, over all processes."""
    said: dict[str, Any] = field(default_factory=dict)
    """By role, what it has said of the first forward already."""
    found: Sums = field(default_factory=Sums)
    """What is logged of it; filled while it is computed."""
