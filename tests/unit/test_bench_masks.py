"""The benchmark of masks compares the same rows and tells where the masks differ."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_tokenizer

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_both_sides_make_the_same_ids(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("bench_masks", SCRIPTS / "bench_masks.py")
    assert spec is not None
    assert spec.loader is not None
    bench_masks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench_masks)
    sys.modules.pop("bench", None)
    rows = bench_masks.conversations(6, 2)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = bench_masks.compare(tiny_tokenizer(), path, 1, "qwen2_5")
    assert found["rows"] == found["rows_with_the_same_ids"] == 6
    assert found["tokens"]["ours"] == found["tokens"]["trl"]
    more = found["trained"]["trl"] - found["trained"]["ours"]
    assert more == 2 * 12  # of each answer: the new line that the generation prompt ends with, and that after the stop
