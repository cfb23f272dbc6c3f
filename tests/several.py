"""Several recipes, one after the other, in the processes of one launcher: starting processes is what costs time.

`python -m finetune_cli.engine.launcher ... -m tests.several RECIPE[=CHECKPOINT] ...`; the first process leaves the
events of each run beside its recipe. CHUNK_LOGITS in the environment makes the head's chunks small.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def play(recipe: Path, resume: Path | None = None) -> list[dict[str, Any]]:
    """The events of a whole run in this process."""
    from finetune_cli import commands
    from finetune_cli.data.rows import load_rows
    from finetune_cli.engine import loop, prepare

    plan, _, _ = commands.planned(recipe, ())
    plan.run.mkdir(parents=True, exist_ok=True)
    words = prepare.bind(plan.recipe, plan.facts)
    events: list[dict[str, Any]] = []
    job, progress = prepare.build(
        plan, words, load_rows(plan.recipe, words.chat), lambda event: events.append(event), resume=resume
    )
    pieces = sum(job.pieces.is_piece(p) for p in job.policy.parameters())
    events.append(
        {"event": "made", "as": type(job.policy).__name__, "pieces": pieces, "weights": len([*job.policy.parameters()])}
    )
    loop.train(job, progress)
    return events


def main() -> None:
    from finetune_cli import log
    from finetune_cli.engine import score

    log.quiet_libraries()
    score.CHUNK_LOGITS["cpu"] = int(os.environ.get("CHUNK_LOGITS", score.CHUNK_LOGITS["cpu"]))
    for argument in sys.argv[1:]:
        recipe, _, resume = argument.partition("=")
        events = play(Path(recipe), Path(resume) if resume else None)
        if log.rank() == 0:
            text = "".join(json.dumps(event) + "\n" for event in events)
            Path(recipe).with_suffix(".events").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
