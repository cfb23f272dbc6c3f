"""SFT's loss with numbers worked out by hand."""

import math

import pytest
import torch

from finetune_cli.data.batches import tree
from finetune_cli.methods.sft import Sft, dynamic
from finetune_cli.types import Branch, Counts, Row, Scores

BATCH = tree([Row([], (Branch([1, 2, 3], [False, True, True]),)), Row([], (Branch([4, 5], [False, True]),))])


def loss_of(method: Sft, logps, counts=None):
    logps_N = torch.tensor(logps, requires_grad=True)
    scores = Scores(logps_N, BATCH.owner_N)
    loss = method.loss(BATCH, lambda _role, _batch: scores, counts or BATCH.counts)
    loss.total.backward()
    return loss, logps_N.grad.tolist()


def test_sum_over_tokens_divided_by_the_count_of_the_whole_step():
    logps = [math.log(0.5), math.log(0.25), math.log(0.125)]
    loss, grad = loss_of(Sft(), logps)
    assert loss.total.item() == pytest.approx(6 * math.log(2) / 3)  # not the mean of the rows' means, 9/4 log 2
    assert grad == pytest.approx([-1 / 3] * 3)
    share, grad = loss_of(Sft(), logps, Counts(rows=4, tokens=12))
    assert share.total.item() == pytest.approx(6 * math.log(2) / 12)
    assert grad == pytest.approx([-1 / 12] * 3)
    assert share.metrics["loss"][1] == 3  # logged by its own count


def test_certain_tokens_cost_nothing():
    loss, _ = loss_of(Sft(), [0.0, 0.0, 0.0])
    assert loss.total.item() == 0.0


def test_dft_weighs_each_token_by_its_own_probability():
    loss, grad = loss_of(Sft(dft=True), [math.log(0.5), math.log(0.25), 0.0])
    assert loss.total.item() == pytest.approx((0.5 * math.log(2) + 0.25 * 2 * math.log(2)) / 3)
    assert grad == pytest.approx([-0.5 / 3, -0.25 / 3, -1 / 3])
    assert dynamic(torch.tensor([0.0])).item() == 0.0


def test_knobs_reach_the_engine_by_name_of_what_they_do():
    assert Sft(packing=True).bin_tokens(100) == 100
    assert Sft().bin_tokens(100) is None
    assert Sft(neftune_noise_alpha=5.0).embedding_noise() == 5.0


def test_rows_of_tokens_are_kept_under_the_knobs_that_encode_reads():
    read = set()

    class Watched(Sft):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    class Render:
        def __getattr__(self, _):
            return lambda *_, **__: iter(())

    method = Watched()
    for shape in Sft.shapes:
        list(method.encode({"input_ids": [1]}, shape, Render()))
    assert read & {*Sft.model_fields} == {*method.encoding()} == {"loss_on"}
