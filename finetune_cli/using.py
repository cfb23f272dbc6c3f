"""What the commands on finished runs do."""

from collections.abc import Sequence
from pathlib import Path

from finetune_cli import show


def report(runs: Sequence[Path], output: Path | None, *, as_json: bool) -> int:
    """The page of a run, or of several beside one another; what differs is also told here."""
    from finetune_cli.use import report

    path = report.write(runs, output)
    told = report.summary(runs, path)
    if as_json:
        show.to_stdout(told)
        return 0
    if len(runs) > 1:
        show.beside(told)
    show.out.print(f"wrote {show.short(str(path))}", markup=False)
    return 0
