"""Rows a second of tokenising and masking conversations, ours beside TRL's, in turns, on the same rows and template.

    python scripts/bench_masks.py                      synthetic conversations of one and of four turns
    python scripts/bench_masks.py --rows mine.json     conversations of your own (any columns that `finetune` reads)

Ours is what a run does between its file's rows and its rows of tokens (`data.encode.encode_table`): renders in the
templates' process, proofs, ids and masks, notes, length. TRL's is `SFTTrainer._prepare_dataset` with
assistant_only_loss and its `_training` twin of the template, as `train()` calls it: tokenise, labels, cut to
max_length, drop what has no label left; `trl_tokenise` is the first of these passes alone. One process on each side
(ours has its child; `dataset_num_proc` is none), the same tokenizer. Both have read their rows from disk before.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import bench

TEMPLATE = "qwen2_5"
MAX_LENGTH = 2048
SETS = {"one turn": 1, "four turns": 4}


def conversations(count: int, turns: int) -> list[dict[str, Any]]:
    draw = random.Random(f"masks {turns}")
    said = [("user", 40), ("assistant", 150)] * turns
    return [
        {"messages": [{"role": role, "content": bench.sentence(draw, words)} for role, words in said]}
        for _ in range(count)
    ]


def template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def table_of(path: Path) -> Any:
    from finetune_cli.data.sources import load
    from finetune_cli.methods.sft import Sft
    from finetune_cli.recipe.sections import Source

    return load(Source(path=str(path)), accepts=Sft.shapes, first=0)


def ours(tokenizer: Any, table: Any, name: str) -> Callable[[], list[Any]]:
    from finetune_cli.data.chat import Chat
    from finetune_cli.data.encode import encode_table
    from finetune_cli.methods.sft import Sft
    from finetune_cli.recipe.sections import Data, Source

    chat = Chat.bind(tokenizer, template=template(name))
    data = Data(train=[Source(path=table.file)], max_length=MAX_LENGTH)
    return lambda: [
        (row.branches[0].ids, row.branches[0].trained)
        for outcome in encode_table(Sft(), table, chat, data)
        for row in outcome.rows
    ]


def trl(tokenizer: Any, rows: list[dict[str, Any]], name: str) -> Callable[[], Any]:
    from datasets import Dataset
    from trl import SFTTrainer

    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=template(f"{name}_training"), completion_only_loss=False
    )
    args = SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=True, max_length=MAX_LENGTH,
        truncation_mode="keep_start", shuffle_dataset=False,
    )  # fmt: skip
    dataset = Dataset.from_list(rows)
    return lambda: SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "train")


@contextmanager
def tokenise_seconds() -> Iterator[list[float]]:
    """Seconds of the first `map` that TRL makes: tokenising and masking, without the labels."""
    from datasets import Dataset

    kept, seconds = Dataset.map, []

    def timed(self: Any, *args: Any, **named: Any) -> Any:
        started = time.perf_counter()
        found = kept(self, *args, **named)
        seconds.append(time.perf_counter() - started)
        return found

    Dataset.map = timed
    try:
        yield seconds
    finally:
        Dataset.map = kept


def compare(tokenizer: Any, path: Path, rounds: int, name: str) -> dict[str, Any]:
    table = table_of(path)
    rows = [table.canonical(raw) for raw in table.raws]
    sides = {"ours": ours(tokenizer, table, name), "trl": trl(tokenizer, rows, name)}
    made: dict[str, Any] = {side: run() for side, run in sides.items()}  # also what each side does once
    told: list[dict[str, float]] = []
    for k in range(rounds):
        seconds = {}
        with tokenise_seconds() as maps:
            for side in sorted(sides, reverse=k % 2 == 1):
                started = time.perf_counter()
                sides[side]()
                seconds[side] = time.perf_counter() - started
        told.append({**seconds, "trl_tokenise": maps[0]})
    ratios = [one["trl"] / one["ours"] for one in told]
    theirs = [(one["input_ids"], [label != -100 for label in one["labels"]]) for one in made["trl"]]
    agree = {tuple(ids) for ids, _ in theirs}
    same = [ids for ids, _ in made["ours"] if tuple(ids) in agree]
    return {
        "rows": len(rows),
        "rows_per_second": {side: len(rows) / median(one[side] for one in told) for side in told[0]},
        "ratio": {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "ratio_to_tokenise": median(one["trl_tokenise"] / one["ours"] for one in told),
        "rows_with_the_same_ids": len(same),
        "tokens": {"ours": sum(len(ids) for ids, _ in made["ours"]), "trl": sum(len(ids) for ids, _ in theirs)},
        "trained": {"ours": sum(sum(m) for _, m in made["ours"]), "trl": sum(sum(m) for _, m in theirs)},
        "rounds": told,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--rows", type=Path, help="a file of conversations instead of synthetic ones")
    made.add_argument("--count", type=int, default=2000, help="synthetic conversations of one turn")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--template", default=TEMPLATE, help="a template of TRL's that has a `_training` twin")
    made.add_argument(
        "--model", default="builtin:smollm2-135m-instruct", help="builtin:NAME or a folder: its tokenizer"
    )
    made.add_argument("--output", type=Path, default=bench.ROOT / "benchmarks", help="folder of the result")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    asked = parser().parse_args(argv)
    from datasets import disable_caching, disable_progress_bars
    from transformers import AutoTokenizer

    from finetune_cli.data.builtin import resolve

    disable_caching()
    disable_progress_bars()
    load = os.getloadavg()
    name = asked.model.removeprefix("builtin:")
    folder = resolve(name, announce=print) if name != asked.model else asked.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    with TemporaryDirectory(prefix="finetune-bench-") as work:
        if asked.rows:
            found[asked.rows.name] = compare(tokenizer, asked.rows, asked.rounds, asked.template)
        for name, turns in {} if asked.rows else SETS.items():
            path = Path(work) / "rows.jsonl"
            rows = conversations(asked.count // turns, turns)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            found[name] = compare(tokenizer, path, asked.rounds, asked.template)
    for name, one in found.items():
        speeds, ratio = one["rows_per_second"], one["ratio"]
        print(
            f"{name}: rows/s: ours {speeds['ours']:.0f}, TRL {speeds['trl']:.0f}, its map {speeds['trl_tokenise']:.0f}"
        )
        print(f"  ratio {ratio['median']:.2f} ({ratio['lowest']:.2f} to {ratio['highest']:.2f})")
    here = bench.hardware("cpu")
    result = {
        "hardware": here, "date": datetime.now(UTC).isoformat(timespec="seconds"), "load_average_before": load,
        "commit": bench.commit(), "versions": bench.versions(),
        "settings": {"template": asked.template, "model": asked.model, "rounds": asked.rounds},
        "tokenizers_parallelism": os.environ.get("TOKENIZERS_PARALLELISM"), "sets": found,
    }  # fmt: skip
    asked.output.mkdir(parents=True, exist_ok=True)
    path = asked.output / f"masks-{here['name']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
