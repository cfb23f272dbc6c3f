"""The memory estimate as people see it: a table, the GPUs that it fits, and what would save most."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from finetune_cli.plan.footprint import GIB
from finetune_cli.plan.memory import GPUS, estimate, fits, knobs, on_gpu, setup
from finetune_cli.plan.resolve import Plan

UNKNOWN = "memory  not estimated: the configuration of the model is not on this machine, or of no kind that is known"


def memory_table(plan: Plan) -> RenderableType:
    """Of one process at its worst moment."""
    found, basis = plan.memory, setup(plan)
    if found is None or basis is None:
        return Text(UNKNOWN)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory of one process")
    table.add_column("GiB", justify="right")
    table.add_column("")
    for line in found.lines:
        table.add_row(line.what, f"{line.bytes / GIB:.2f}", Text(line.about, style="dim"))
    table.add_row("together", f"{found.gib:.2f}", f"where a forward is {found.rows.tokens:,} tokens", style="bold")
    saving = [Text(f"  {knob.setting:<45} saves {knob.saving:.2f} GiB") for knob in knobs(basis)[:3]]
    return Group(
        table,
        *map(Text, notes(plan, estimate(on_gpu(basis)).gib)),
        *([Text("to need less:"), *saving] if saving else []),
    )


def notes(plan: Plan, gib: float) -> Iterator[str]:
    """`gib` of one process on a GPU."""
    sizes = fits(gib)
    small = [f"{size}" for size in GPUS if size not in sizes]
    if not sizes:
        yield f"{gib:.2f} GiB on a GPU: fits no single GPU up to {GPUS[-1]} GB"
    elif small:
        yield f"{gib:.2f} GiB on a GPU: fits those of {sizes[0]} GB and more, not of {', '.join(small)} GB"
    else:
        yield f"{gib:.2f} GiB on a GPU: fits every one of {sizes[0]} GB and more"
    if plan.machine.gpus:
        smallest = min(gpu.memory_gib for gpu in plan.machine.gpus)
        yield f"here: {plan.machine.gpus[0].name}, {smallest:.0f} GiB"
    if plan.memory is not None and not plan.memory.sure:
        yield "roughly: this family, or padded rows, were not measured"
