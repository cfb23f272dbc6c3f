"""Curves: which numbers share a chart, and that no spike is lost on the way to the page."""

import pytest

from finetune_cli.use import curves
from finetune_cli.use.curves import BUCKETS, chart, means, series_of, shared, short, spread, thinned, ticks


def test_a_spike_and_a_dip_stay_however_long_the_line():
    points = [(step, 1.0) for step in range(50_000)]
    points[31_234] = (31_234, 99.0)
    points[31_235] = (31_235, -5.0)
    kept = thinned(points)
    assert len(kept) <= 2 * BUCKETS
    assert (31_234, 99.0) in kept
    assert (31_235, -5.0) in kept
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)


def test_a_value_that_is_not_finite_stays_and_is_a_gap():
    points = [(step, 1.0 + step % 7) for step in range(5000)]
    points[2500] = (2500, None)
    assert (2500, None) in thinned(points)
    drawn = chart("loss", {"loss": [(1, 2.0), (2, None), (3, 1.0)]})
    assert drawn.lines[0].path.count("M") == 2
    assert len(drawn.lines[0].lost) == 1


def test_a_short_line_is_left_alone():
    points = [(1, 3.0), (2, 1.0), (3, 2.0)]
    assert thinned(points) == points
    assert chart("loss", {"loss": points}).lines[0].mean == ""


def test_means_of_buckets():
    assert means([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)], buckets=2) == [(0.5, 2.0), (2.5, 6.0)]


def test_numbers_share_a_chart_with_their_evaluations_and_pairs():
    names = ["loss", "eval_loss", "eval_helpful_loss", "rewards/chosen", "rewards/rejected", "eval_rewards/chosen",
             "rewards/margins", "eval_exact_match", "grad_norm", "learning_rate"]  # fmt: skip
    assert shared(dict.fromkeys(names)) == [
        ("loss", ["loss", "eval_loss", "eval_helpful_loss"]),
        ("eval_exact_match", ["eval_exact_match"]),
        ("rewards", ["rewards/chosen", "rewards/rejected", "eval_rewards/chosen"]),
        ("rewards/margins", ["rewards/margins"]),
        ("grad_norm", ["grad_norm"]),
        ("learning_rate", ["learning_rate"]),
    ]


def test_the_corners_of_a_chart():
    drawn = chart("x", {"x": [(0, 0.0), (10, 5.0)]})
    low, high = curves.HEIGHT - curves.BOTTOM, curves.TOP
    assert drawn.values == (0.0, 5.2)  # a line from zero stands on the axis, and has 4% of room above
    assert drawn.lines[0].dots[0] == (curves.LEFT, low)
    x, y = drawn.lines[0].dots[1]
    assert x == curves.WIDTH - curves.RIGHT
    assert y == pytest.approx(high + 0.2 / 5.2 * (low - high), abs=0.1)


def test_wide_spans_of_positive_numbers_are_logarithmic():
    drawn = chart("grad_norm", {"grad_norm": [(n, 1.0) for n in range(9)] + [(9, 1000.0)]})
    assert drawn.logarithmic
    assert [text for _, text in drawn.y_ticks] == ["1", "10", "100", "1000"] or len(drawn.y_ticks) > 3
    assert not chart("x", {"x": [(0, -1.0), (1, 1000.0)]}).logarithmic


def test_nothing_to_draw():
    assert chart("loss", {"loss": []}) is None
    assert chart("loss", {"loss": [(1, None)]}) is None
    assert chart("loss", {"loss": [(1, 2.0)]}).lines[0].dots  # one point is a dot


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0, 1e-7, 1e7])
def test_a_constant_has_room(value):
    drawn = chart("x", {"x": [(0, value), (1, value)]})
    assert drawn.values[0] < value < drawn.values[1]


def test_series_leave_out_what_is_no_metric():
    events = [
        {"event": "train", "step": 1, "epoch": 0.1, "loss": 2.0, "num_tokens": 9, "seconds": 1.0},
        {"event": "train", "step": 2, "epoch": 0.2, "loss": None, "num_tokens": 19, "seconds": 1.0},
        {"event": "sample", "step": 2, "row": 3},
        {"event": "eval", "step": 2, "eval_loss": 1.0},
    ]
    assert series_of(events) == {"loss": [(1, 2.0), (2, None)], "eval_loss": [(2, 1.0)]}


def test_ticks_are_round():
    assert ticks(0, 72, whole=True) == [0, 20, 40, 60]
    assert ticks(1, 3, whole=True) == [1, 2, 3]
    assert ticks(0, 0.0005, whole=False) == [0, 0.0001, 0.0002, 0.0003, 0.0004, 0.0005]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0005, "5e-4"), (0.25, "0.25"), (1234, "1234"), (12_000, "12k"), (2.5e6, "2.5M"), (-3, "-3")],
)
def test_short_numbers(value, text):
    assert short(value) == text


def test_spread_keeps_both_ends():
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert spread([1, 2], 5) == [1, 2]
