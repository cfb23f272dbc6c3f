"""Curves: which numbers of a run share a chart, and each chart as the paths of an SVG.

However long a run, a line keeps at most two points a bucket, the lowest and the highest, so that no spike is lost; a
long line is drawn faint, with the mean of its buckets over it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import floor, isfinite, log10
from statistics import median
from typing import Any, TypeVar

from finetune_cli.use.record import NOT_A_METRIC, Event, Record

T = TypeVar("T")
Point = tuple[float, float | None]
"""(step, value); None where the value was not finite."""
WIDTH, HEIGHT = 420, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24
BUCKETS = 300
"""Of a line; twice as many points stay."""
MEANS = 80
"""Buckets of the mean line over a long one."""
LONG = 160
"""Points from which a line gets a mean line."""
DOTS = 40
"""Points up to which each is marked."""
LOG_FROM = 50
"""Highest over median from which a chart is logarithmic."""
MARKS = 60
"""Health events shown in a chart."""
ALWAYS_LAST = ("grad_norm", "learning_rate", "tokens_per_second", "memory_gib")
LEFT_OUT = (*NOT_A_METRIC, "num_tokens", "seconds")


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    colour: int
    path: str
    mean: str
    """The path of its mean line; empty where it is short."""
    dots: list[tuple[float, float]]
    last: float | None
    lost: list[float]
    """Places of values that were not finite."""


@dataclass(frozen=True)
class Chart:
    """A chart in the coordinates of its viewBox, WIDTH by HEIGHT."""

    title: str
    lines: list[Line]
    steps: tuple[float, float]
    values: tuple[float, float]
    logarithmic: bool
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    marks: list[tuple[float, str]] = field(default_factory=list)
    """Health events."""


def of_run(record: Record) -> list[Chart]:
    """Every number of a run: the losses first, then the method's, then those of the machine."""
    series = series_of(record.events)
    marks = [(event["step"], str(event.get("message", ""))) for event in record.of("health")]
    charts = [chart(title, {name: series[name] for name in names}, marks=marks) for title, names in shared(series)]
    return [one for one in charts if one is not None]


def of_runs(records: Sequence[Record], names: Sequence[str]) -> list[Chart]:
    """Every number of several runs, one chart a number, one line a run that has it."""
    every = [series_of(record.events) for record in records]
    keys = dict.fromkeys(key for series in every for key in series)
    charts = []
    for key in sorted(keys, key=_place):
        lines = {name: series.get(key, []) for name, series in zip(names, every, strict=True)}
        charts.append(chart(key, lines))
    return [one for one in charts if one is not None]


def series_of(events: Sequence[Event]) -> dict[str, list[Point]]:
    """Metric -> its points, in the order of steps."""
    series: dict[str, list[Point]] = {}
    for event in events:
        if event["event"] in ("train", "eval"):
            for key, value in event.items():
                if key not in LEFT_OUT and (value is None or isinstance(value, int | float)):
                    finite = float(value) if value is not None and isfinite(value) else None
                    series.setdefault(key, []).append((event["step"], finite))
    return series


def shared(series: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(title, names) of each chart: a number with its evaluations, what is chosen with what is rejected."""
    groups: dict[str, list[str]] = {}
    for name in sorted(series, key=lambda name: name.startswith("eval_")):
        groups.setdefault(_title(name, series), []).append(name)
    return sorted(groups.items(), key=lambda group: _place(group[0]))


def _title(name: str, series: Mapping[str, Any]) -> str:
    if name.startswith("eval_"):
        plain = [key for key in series if not key.startswith("eval_") and name.endswith("_" + key)]
        name = max(plain, key=len) if plain else name
    head, _, tail = name.rpartition("/")
    return head if head and tail in ("chosen", "rejected") else name


def _place(title: str) -> tuple[int, str]:
    """Losses, evaluations, the method's own, then what every run has."""
    if title in ALWAYS_LAST:
        return 4 + ALWAYS_LAST.index(title), ""
    return (0 if title == "loss" else 1 if title == "eval_loss" else 2 if title.startswith("eval_") else 3), title


def chart(
    title: str, series: Mapping[str, Sequence[Point]], *, marks: Sequence[tuple[float, str]] = ()
) -> Chart | None:
    """None where there is nothing to draw."""
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points if value is not None]
    if not values:
        return None
    logarithmic = min(values) > 0 and max(values) > LOG_FROM * median(values)
    low, high = (log10(min(values)), log10(max(values))) if logarithmic else (min(values), max(values))
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-9):
        room = 0.5 if logarithmic else abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    else:
        room = (high - low) * 0.04
        low, high = (low if not logarithmic and low == 0 else low - room), high + room
    frame = Frame(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, low, high, logarithmic)
    lines = [frame.line(name, n, points) for n, (name, points) in enumerate(series.items()) if points]
    return Chart(
        title=title,
        lines=lines,
        steps=(frame.x0, frame.x1),
        values=(low, high),
        logarithmic=logarithmic,
        x_ticks=[(frame.x(v), short(v)) for v in ticks(frame.x0, frame.x1, whole=True)],
        y_ticks=[(frame.height(v), short(10**v if logarithmic else v)) for v in ticks(low, high, whole=False)],
        marks=[(frame.x(step), said) for step, said in spread(marks, MARKS) if frame.x0 <= step <= frame.x1],
    )


@dataclass(frozen=True)
class Frame:
    """From steps and values to the places of a chart."""

    x0: float
    x1: float
    y0: float
    y1: float
    logarithmic: bool

    def x(self, step: float) -> float:
        return round(LEFT + (step - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT), 1)

    def height(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM), 1)

    def y(self, value: float) -> float:
        return self.height(log10(value) if self.logarithmic else value)

    def path(self, points: Sequence[Point]) -> str:
        """Moves and lines; a value that is not finite is a gap."""
        parts: list[str] = []
        pen = "M"
        for step, value in points:
            if value is None:
                pen = "M"
                continue
            parts.append(f"{pen}{self.x(step):g} {self.y(value):g}")
            pen = "L"
        return "".join(parts)

    def line(self, name: str, colour: int, points: Sequence[Point]) -> Line:
        finite = [(step, value) for step, value in points if value is not None]
        kept = thinned(points)
        return Line(
            name=name,
            colour=colour % 8,
            path=self.path(kept),
            mean=self.path(means(finite)) if len(finite) > LONG else "",
            dots=[(self.x(step), self.y(value)) for step, value in finite] if len(finite) <= DOTS else [],
            last=finite[-1][1] if finite else None,
            lost=sorted({self.x(step) for step, value in kept if value is None}),
        )


def thinned(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """At most two values a bucket, the lowest and the highest, where they are; and one that is not finite, if any."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for bucket in split(points, buckets):
        finite = [place for place, (_, value) in enumerate(bucket) if value is not None]
        lost = next((place for place, (_, value) in enumerate(bucket) if value is None), None)
        places = {lost} if lost is not None else set()
        if finite:
            places |= {min(finite, key=lambda i: bucket[i][1] or 0.0), max(finite, key=lambda i: bucket[i][1] or 0.0)}
        kept += [bucket[place] for place in sorted(places)]
    return kept


def means(points: Sequence[tuple[float, float]], buckets: int = MEANS) -> list[Point]:
    """The mean step and value of each bucket."""
    return [
        (sum(step for step, _ in bucket) / len(bucket), sum(value for _, value in bucket) / len(bucket))
        for bucket in split(points, buckets)
    ]


def split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Consecutive parts of alike sizes, none empty."""
    edges = [len(items) * n // parts for n in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(edges) if b > a]


def spread(items: Sequence[T], most: int) -> list[T]:
    """At most so many, from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]


def ticks(low: float, high: float, *, whole: bool) -> list[float]:
    """Three to seven round numbers between two."""
    raw = (high - low) / 5
    base = 10.0 ** floor(log10(raw))
    step = next(base * n for n in (1, 2, 5, 10) if base * n >= raw)
    step = max(1.0, step) if whole else step
    first = -(-low // step)
    return [round(n * step, 12) for n in range(int(first), floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number of a few letters."""
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 10 or (abs(value) >= limit and unit != "k"):
            return f"{value / limit:.3g}{unit}"
    return f"{value:.4g}"
