"""What people see: the plan, the problems, the live run; plain lines where there is no terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from finetune_cli.errors import FinetuneError, Problem
from finetune_cli.log import to_json
from finetune_cli.plan.changes import leaves
from finetune_cli.plan.resolve import Plan

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from finetune_cli.checks.rule import Rule
    from finetune_cli.recipe.fix import Fixed

Sink = Callable[[dict[str, Any]], None]
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def error(failure: FinetuneError) -> None:
    """An error on one screen: every problem on a line, then what to do."""
    for problem in failure.problems:
        err.print(problem_line(problem))
    count = sum(p.severity == "error" for p in failure.problems)
    text = failure.message if not count else f"{count} problem{'s' if count > 1 else ''}: {failure.message}"
    err.print(f"[bold red]{failure.kind}[/]  {escape(text)}")
    if failure.hint:
        err.print(f"  {escape(failure.hint)}")


def problem_line(problem: Problem) -> Text:
    """`file:line:col  key  what is wrong; what to do`, the same text with and without colours."""
    colour = "red" if problem.severity == "error" else "yellow"
    line = str(problem) + (f"  [{problem.rule}]" if problem.rule else "")
    before, key, after = line.partition(problem.key) if problem.key else (line, "", "")
    return Text.assemble(before, (key, f"bold {colour}"), after)


def warnings(problems: Iterable[Problem]) -> None:
    """A line each, on stderr."""
    for problem in problems:
        err.print(problem_line(problem))


def fixed(recipe: Path, found: "Fixed") -> None:
    """What `--fix` has done to the file, and what it has not."""
    for move in found.moves:
        out.print(f"{recipe}: {move.key} is now {move.written}", markup=False)
    for move, reason in found.left:
        err.print(f"{recipe}:{move.place.line}:{move.place.column}  {move.key}  left as it is: {reason}", markup=False)
    if not found.moves:
        out.print(f"{recipe}: nothing to put right", markup=False)


def validated(recipe: Path, told: Mapping[str, Any], *, fast: bool, warnings: int) -> None:
    """The end of a check that found no error."""
    for name, report in told["rows"].items():
        out.print(escape(f"{name}: {rows_line(report)}"))
    if told["weights"]:
        out.print(escape(f"weights: {weights_line(told['weights'])}"))
    if told["run"]:
        out.print(escape(f"run: {takes_line(told['run'])}"))
    stages = "schema, lints and files" if fast else "schema, lints, files, tokenizer and rows"
    count = f", {warnings} warning{'s' * (warnings != 1)}" if warnings else ""
    out.print(f"{escape(str(recipe))}: fine ({stages}){count}")


def takes_line(run: Mapping[str, Any]) -> str:
    """Steps and tokens; where they were measured, time and memory."""
    said = f"{run['steps']:,} steps, {run['tokens']:,} tokens"
    if "seconds" not in run:
        return said
    estimated = run["estimated_memory_gib"]
    beside = f" ({estimated:.2f} estimated)" if estimated is not None else ""
    return (
        f"{said}; {run['seconds_per_step']:.3g} s a step, {run['seconds'] / 60:.3g} minutes without evaluations, "
        f"{run['tokens_per_second']:,.0f} tokens/s; {run['peak_memory_gib']:.2f} GiB{beside}"
    )


def weights_line(sizes: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{size:.2f} GiB {name}" for name, size in sizes["gib"].items())
    share = sizes["trained"] / sizes["total"]
    return f"{sizes['trained']:,} of {sizes['total']:,} are trained ({share:.2%}); {parts}"


def rules(known: Iterable["Rule"]) -> None:
    """Every rule on a line."""
    for one in known:
        severity = (one.severity if one.checked else "held") + ("!" if one.error_when else "")
        out.print(f"{one.id}  {severity:9} {one.title}", markup=False)
    out.print(
        "\nerror: stops a run; warning: `ignore: [ID]` accepts it; warning!: an error when it is bad; held: the "
        "engine is made so\nfinetune explain ID says why, and what to do",
        markup=False,
    )


def rule(one: "Rule") -> None:
    """One rule: what, why, what is looked at, what to do."""
    severity = one.severity + (f"; an error when {one.error_when}" if one.error_when else "")
    rows = {
        "severity": severity,
        "why": one.why,
        "looked at": one.stages,
        "held by": one.held,
        "shown by": one.proof,
        "what to do": one.remedy,
        "accept it": f"ignore: [{one.id}]" if one.can_be_ignored else "",
    }
    out.print(Text(f"{one.id}  {one.title}", style="bold"))
    for name, text in rows.items():
        if text:
            out.print(Text.assemble((f"  {name:11}", "bold"), text))


def origins(plan: Plan) -> None:
    """Every value with where it comes from."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "value", "origin"):
        table.add_column(column, overflow="fold")
    for key, value in effective(plan).items():
        origin = plan.origins.get(key, "default")
        style = {"recipe": "", "default": "dim"}.get(origin, "cyan")
        table.add_row(key, escape(_plain(value)), escape(origin), style=style)
    out.print(table)


def effective(plan: Plan) -> dict[str, Any]:
    """Dotted key -> the value that the run uses."""
    values = dict(leaves(plan.recipe.model_dump()))
    resolved = plan.resolved.model_dump()
    return {key: resolved.get(key.rpartition(".")[2], value) for key, value in values.items()} | {
        key: resolved[key.rpartition(".")[2]]
        for key in plan.origins
        if key not in values and key.rpartition(".")[2] in resolved
    }


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def recipes(listed: Iterable[tuple[tuple[str, ...], str]]) -> None:
    """What comes along: (name, method, hardware, time, memory) of each recipe, and what it is for."""
    heads, known = ("name", "method", "hardware", "time", "memory"), list(listed)
    widths = [max(len(cells[i]) for cells in (heads, *(cells for cells, _ in known))) for i in range(len(heads))]

    def line(cells: tuple[str, ...]) -> str:
        return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()

    out.print(Text(line(heads), style="bold"))
    for cells, about in known:
        out.print(Text(line(cells)))
        out.print(Text(f"    {about}", style="dim"))
    out.print("`finetune init NAME` writes one into recipes/, with the rows that it is shown on", markup=False)


def header(plan: Plan) -> Panel:
    """What was resolved, and why, before anything is loaded."""
    recipe, resolved = plan.recipe, plan.resolved
    per, acc, world = (
        recipe.train.per_device_train_batch_size,
        resolved.gradient_accumulation_steps,
        resolved.num_processes,
    )
    lora = f"LoRA r={recipe.lora.r} on {_plain(recipe.lora.target_modules)}" if recipe.lora else "full fine-tuning"
    if plan.facts.kind == "adapter":
        lora = "the adapter goes on"
    elif plan.facts.kind == "merged":
        lora += ", on the base with its adapter merged"
    table = Table.grid(padding=(0, 2))
    rows = {
        "method": f"{recipe.method.name}, {lora}",
        "model": f"{short(recipe.model.name_or_path)}, {resolved.precision}{_why(plan, 'train.precision')}",
        "rows": ", ".join(short(source.path) for source in recipe.data.train),
        "batch": f"{resolved.global_batch_size} rows = {per} per device x {acc} accumulated x {world} "
        f"process{'es' if world > 1 else ''}"
        if per != "auto"
        else f"{resolved.global_batch_size} rows, in forwards of as many as fit",
        "learning rate": f"{resolved.learning_rate:g}, {recipe.train.lr_scheduler_type}"
        f"{_why(plan, 'train.learning_rate')}",
        "attention": f"{resolved.attn_implementation}{_why(plan, 'model.attn_implementation')}",
        **({"reference": resolved.reference.about} if resolved.reference else {}),
        "run folder": short(plan.output_dir),
    }
    for key, value in rows.items():
        table.add_row(Text(key, style="bold"), Text(value))
    return Panel(table, title="finetune", title_align="left", border_style="cyan", expand=False)


def _why(plan: Plan, key: str) -> str:
    origin = plan.origins.get(key, "")
    return f" ({origin})" if origin.startswith("auto") else ""


def short(path: str) -> str:
    """Relative to the working directory where it is below it."""
    p = Path(path)
    return str(p.relative_to(Path.cwd())) if p.is_absolute() and p.is_relative_to(Path.cwd()) else path


def screen(plan: Plan, *, as_json: bool) -> Sink:
    """The sink of a run: JSON lines, a live bar on a terminal, or plain lines."""
    if as_json:
        return lambda event: print(to_json(event), flush=True)  # noqa: T201
    return Screen(plan, out)


class Screen:
    """Follows a run. Lines stay, the bar below them moves; without a terminal there are only lines."""

    def __init__(self, plan: Plan, console: Console, *, live: bool = True) -> None:
        self.plan, self.console, self.live = plan, console, live and console.is_terminal
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.started = time.perf_counter()
        self.samples: list[dict[str, Any]] = []
        self.before: dict[int, str] = {}
        self.told: set[str] = set()

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def on_check(self, event: dict[str, Any]) -> None:
        problem = Problem(**{name: event[name] for name in Problem.__dataclass_fields__})
        err.print(problem_line(problem))

    def on_rows(self, event: dict[str, Any]) -> None:
        for name, report in event["sets"].items():
            self.console.print(f"[bold]{name}[/]  {escape(rows_line(report))}")

    def on_start(self, event: dict[str, Any]) -> None:
        share = event["trained"] / event["weights"]
        self.console.print(
            f"[bold]weights[/]  {event['trained']:,} of {event['weights']:,} are trained ({share:.2%}), "
            f"{event['total']} steps on {event['device']}"
        )
        if self.live:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[last]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.task = self.bar.add_task("train", total=event["total"], last="")
            self.bar.start()

    def on_layout(self, event: dict[str, Any]) -> None:
        reason = event["padded_because"]
        text = "rows end to end, no padding" if reason is None else f"padded rows: {reason}"
        if "bins" in event:
            text += f"; packed into {event['bins']} bins, {event['fill']:.1%} full"
        self.console.print(f"[bold]layout[/]  {escape(text)}")

    def on_fitted(self, event: dict[str, Any]) -> None:
        size, limit = event["per_device_train_batch_size"], event["limit_gib"]
        self.console.print(f"[bold]batch[/]  {size} of the longest rows fit into {limit:.3g} GiB at once")

    def on_progress(self, event: dict[str, Any]) -> None:
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=event["step"])

    def on_train(self, event: dict[str, Any]) -> None:
        line = train_line(event)
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, last=line)
        self.console.print(f"step {event['step']:>5}  {line}")

    def on_eval(self, event: dict[str, Any]) -> None:
        numbers = {k: v for k, v in event.items() if k not in ("event", "step", "epoch")}
        text = "  ".join(f"{k.removeprefix('eval_')} {v:.4g}" for k, v in numbers.items())
        self.console.print(f"[green]eval[/] {event['step']:>5}  {escape(text)}")

    def on_sample(self, event: dict[str, Any]) -> None:
        self.samples.append(event)

    def on_looked(self, event: dict[str, Any]) -> None:
        """Samples are shown before training and at the end; in between they are in metrics.jsonl."""
        if event["step"] == 0:
            self.before = {s["row"]: s["answer"] for s in self.samples}
        elif event["final"]:
            for sample in self.samples:
                self.console.print(sample_panel(sample, self.before.get(sample["row"])))
        self.samples = []

    def on_health(self, event: dict[str, Any]) -> None:
        """Each rule's first sign; how often it was seen is told at the end."""
        if event["rule"] not in self.told:
            self.told.add(event["rule"])
            self.console.print(f"[yellow]health[/] {event['step']:>4}  {escape(event['message'])}")

    def on_interrupted(self, event: dict[str, Any]) -> None:
        self.stop()
        saved = f"saved as {event['checkpoint']}" if event["checkpoint"] else "before the first step: nothing to save"
        self.console.print(f"[yellow]interrupted[/] after step {event['step']}, {saved}")

    def on_end(self, event: dict[str, Any]) -> None:
        self.stop()
        self.console.print(closing(self.plan, event["report"]))

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def rows_line(report: Mapping[str, Any]) -> str:
    dropped = sum(report["dropped"].values())
    causes = ", ".join(f"{n} {cause}" for cause, n in report["dropped"].items())
    text = f"{report['kept']} of {report['read']} rows"
    text += f", {dropped} dropped ({causes})" if dropped else ", none dropped"
    return text + (f", {report['truncated']} cut" if report["truncated"] else "")


def train_line(event: Mapping[str, Any]) -> str:
    told = {"loss": "loss", "accuracy": "accuracy", "objective/scores": "reward", "objective/kl": "kl"}
    head = [f"{short_name} {event[name]:.4f}" for name, short_name in told.items() if name in event]
    head.append(f"grad {event['grad_norm']:.3g}")
    head.append(f"lr {event['learning_rate']:.2e}")
    head.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    head.append(f"{event['memory_gib']:.1f} GiB")
    return "  ".join(head)


def sample_panel(sample: Mapping[str, Any], before: str | None) -> Panel:
    """One prompt with its answers before and after, and the data's own."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")
    rows = {"asked": sample["prompt"], "before": before, "after": sample["answer"], "wanted": sample["reference"]}
    styles = {"asked": "", "before": "red", "after": "green", "wanted": "dim"}
    for name, text in rows.items():
        if text is not None:
            table.add_row(Text(name, style="bold"), Text(_cut(text), style=styles[name]))
    return Panel(table, border_style="dim")


def _cut(text: str, limit: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit] + " ..."


def closing(plan: Plan, report: Mapping[str, Any]) -> Group:
    """Before and after, the result, and what to do next."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "before", "after"):
        table.add_column(column)
    after = {**report["last"], **report["result_metrics"]}
    for name, value in report["first"].items():
        if name.startswith("eval_") or name == "loss":
            table.add_row(name, f"{value:.4g}", f"{after[name]:.4g}")
    run = short(str(plan.run))
    signs = ", ".join(f"{rule} {count}x" for rule, count in report["health"].items())
    lines = [
        *([f"health: {signs}"] if signs else []),
        f"{report['steps']} steps in {report['seconds']:.0f} s of training, "
        f"{report['tokens_per_second'] or 0:,.0f} tokens/s, peak memory {report['peak_memory_gib']:.1f} GiB",
        f"the result is {report['result']['checkpoint']} ({report['result']['is']}), in {run}",
        "next:",
        f"  open {run}/report.html in a browser",
        f"  tensorboard --logdir {run}/tensorboard",
        f"  {load_line(plan, run)}",
    ]
    return Group(table, Text("\n".join(lines)))


def beside(told: Mapping[str, Any]) -> None:
    """Several runs: the keys that differ, and the numbers at their ends."""
    names = [one["name"] for one in told["runs"]]
    keys = dict.fromkeys(key for one in told["runs"] for key in one["last"] if key == "loss" or key.startswith("eval_"))
    ends = {key: {one["name"]: one["last"].get(key, "") for one in told["runs"]} for key in keys}
    for title, rows in (("what differs", told["differing"]), ("at the end", ends)):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in (title, *names):
            table.add_column(escape(column), overflow="fold")
        for key, values in rows.items():
            cells = (values[name] for name in names)
            table.add_row(key, *(f"{cell:.4g}" if isinstance(cell, float) else escape(_plain(cell)) for cell in cells))
        out.print(table)


def load_line(plan: Plan, run: str) -> str:
    adapted = plan.recipe.lora is not None or plan.facts.kind == "adapter"
    kind = "CausalLM" if plan.recipe.method.generates else "SequenceClassification"
    loader = f"peft.AutoPeftModelFor{kind}" if adapted else f"transformers.AutoModelFor{kind}"
    labels = plan.recipe.method.labels()
    return f'in Python: {loader}.from_pretrained("{run}"{"" if labels is None else f", num_labels={labels}"})'


def to_stdout(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(to_json(value) + "\n")


def piece(text: str) -> None:
    """A piece of an answer, at once; control characters would reach the terminal."""
    out.file.write("".join(c for c in text if c in "\n\t" or c.isprintable()))
    out.file.flush()


def asked() -> Iterator[str]:
    """What a person types, until an empty line or the end of the input."""
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text:
            return
        yield text
