"""metrics.jsonl survives whatever a run says and however it dies."""

import json

import pytest

from finetune_cli.engine.events import Journal

ODD = "{ \u2028 \x85 日本 🙂 \n }"


def line(step, **fields):
    return {"event": "sample", "step": step, "epoch": 0.0, **fields}


def written(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_lines_are_flushed_and_events_of_the_screen_left_out(tmp_path):
    journal = Journal(tmp_path / "m.jsonl", keep_through=None)
    for event in ({"event": "progress", "step": 1}, line(1, answer=ODD), {"event": "train", "step": 1, "loss": 0.5}):
        journal(event)
    assert written(tmp_path / "m.jsonl") == [line(1, answer=ODD), {"event": "train", "step": 1, "loss": 0.5}]
    assert journal.lines == written(tmp_path / "m.jsonl")
    journal.close()


def test_a_number_that_is_not_finite_is_null(tmp_path):
    """JSON has no NaN; other readers than Python's refuse the whole line."""

    def refuse(name):
        raise AssertionError(name)

    journal = Journal(tmp_path / "m.jsonl", keep_through=None)
    journal({"event": "train", "step": 1, "loss": float("nan"), "more": [{"a": float("-inf")}, 0.5]})
    journal.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "event": "train", "step": 1, "loss": None, "more": [{"a": None}, 0.5]
    }  # fmt: skip


@pytest.mark.parametrize("cut", range(1, 60, 3))
def test_resume_cuts_back_to_the_step_and_leaves_a_torn_line_out(tmp_path, cut):
    """The last line was cut anywhere, in the middle of a character too."""
    path = tmp_path / "m.jsonl"
    journal = Journal(path, keep_through=None)
    for step in range(5):
        journal(line(step, answer=ODD, more={"a": 1}))
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(path, keep_through=3)
    again(line(4, answer="new"))
    again.close()
    assert written(path) == [*(line(step, answer=ODD, more={"a": 1}) for step in range(4)), line(4, answer="new")]


def test_a_fresh_run_starts_empty(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"event": "train", "step": 1}\n')
    Journal(tmp_path / "m.jsonl", keep_through=None).close()
    assert (tmp_path / "m.jsonl").read_text() == ""
