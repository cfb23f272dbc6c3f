"""PPO's mathematics with numbers worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch

from finetune_cli.data.batches import padded, tree
from finetune_cli.methods.online import RewardSource, Rollout
from finetune_cli.methods.ppo import (
    Ppo,
    clipped_policy,
    clipped_value,
    divergence,
    gae,
    moments,
    token_rewards,
    whiten,
)
from finetune_cli.types import Branch, Counts, Row, Scores

PPO = Ppo(reward=[RewardSource(source="r.py:f")])


def alone(x):
    """The sum over one process."""
    return x


def close(tensor, numbers):
    assert tensor.dtype == torch.float32
    assert tensor.tolist() == [pytest.approx(row, abs=1e-6) for row in numbers]


def test_gae_by_hand():
    reward_RT = torch.tensor([[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]])  # the second answer has one token
    value_RT = torch.tensor([[0.5, 0.2, 0.4], [1.5, 0.0, 0.0]])
    # deltas of the first: 0.9*0.2-0.5 = -0.32, 0.9*0.4-0.2 = 0.16, 1-0.4 = 0.6; gamma lam = 0.45
    wanted = [[-0.32 + 0.45 * (0.16 + 0.45 * 0.6), 0.16 + 0.45 * 0.6, 0.6], [0.5, 0.0, 0.0]]
    close(gae(reward_RT, value_RT, 0.9, 0.5), wanted)


def test_gae_at_its_limits():
    reward_RT, value_RT = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 1.0, 2.0]])
    close(gae(reward_RT, value_RT, 1.0, 1.0), [[7.0 - 3.0, 6.0 - 1.0, 4.0 - 2.0]])  # what is still paid, less V
    close(gae(reward_RT, value_RT, 1.0, 0.0), [[1 + 1 - 3.0, 2 + 2 - 1.0, 4 - 2.0]])  # one step's surprise
    close(gae(reward_RT, value_RT, 0.0, 0.7), [[1 - 3.0, 2 - 1.0, 4 - 2.0]])


def test_the_score_is_paid_at_the_last_token_of_the_answer():
    mask_RT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    kl_RT = torch.tensor([[0.1, 0.2, 0.3], [0.4, 9.0, 9.0], [0.0, -0.5, 9.0]])
    wanted = [[-0.2, -0.4, 10 - 0.6], [20 - 0.8, 0.0, 0.0], [0.0, 30 + 1.0, 0.0]]
    close(token_rewards(kl_RT, torch.tensor([10.0, 20.0, 30.0]), mask_RT, 2.0), wanted)


def test_divergence():
    log_ratio = torch.tensor([math.log(2), -math.log(4), 0.0])
    zero = torch.zeros(3)
    close(divergence(log_ratio, zero, "k1")[None], [[math.log(2), -math.log(4), 0.0]])
    close(divergence(log_ratio, zero, "abs")[None], [[math.log(2), math.log(4), 0.0]])
    close(divergence(log_ratio, zero, "k2")[None], [[math.log(2) ** 2 / 2, math.log(4) ** 2 / 2, 0.0]])
    close(divergence(log_ratio, zero, "k3")[None], [[0.5 - 1 + math.log(2), 4 - 1 - math.log(4), 0.0]])


def test_whitening_is_over_real_tokens():
    mask_RT = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    x_RT = torch.tensor([[1.0, 2.0], [6.0, 100.0]])
    assert moments(x_RT, mask_RT, alone) == pytest.approx((3.0, (4 + 1 + 9) / 2))
    root = math.sqrt(7)
    close(whiten(x_RT, mask_RT, alone), [[-2 / root, -1 / root], [3 / root, 0.0]])
    close(whiten(x_RT, mask_RT, alone, shift=False), [[3 - 2 / root, 3 - 1 / root], [3 + 3 / root, 0.0]])


def test_whitening_is_over_all_processes():
    x_RT = torch.tensor([[1.0, 2.0, 6.0]])
    both = torch.cat([x_RT, torch.tensor([[5.0, -3.0, 1.0]])])
    sums = iter([torch.tensor(6.0), both.sum(), ((both - 2.0) ** 2).sum()])  # what a reduction over two would give
    close(whiten(x_RT, torch.ones_like(x_RT), lambda _: next(sums)), whiten(both, torch.ones(2, 3), alone)[:1].tolist())


def test_clipping_of_the_policy():
    """Nothing is gained beyond the clip range in the direction of the advantage; the way back is free."""
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5], requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])
    loss, clipped = clipped_policy(ratio, advantage, 0.2)
    close(loss[None], [[-2.0, -2.4, -1.0, 3.0, 1.6]])
    assert clipped.tolist() == [0, 1, 0, 0, 1]
    loss.sum().backward()
    assert ratio.grad.tolist() == [-2.0, 0.0, -2.0, 2.0, 0.0]


def test_clipping_of_the_value():
    value = torch.tensor([1.1, 2.0, 2.0, 0.0], requires_grad=True)
    old, returns = torch.ones(4), torch.tensor([2.0, 3.0, 1.1, 3.0])
    loss, clipped = clipped_value(value, old, returns, 0.2)
    close(loss[None], [[0.81 / 2, 1.8**2 / 2, 0.81 / 2, 9.0 / 2]])
    assert clipped.tolist() == [0, 1, 0, 0]
    loss.sum().backward()
    assert value.grad.tolist() == pytest.approx([-0.9, 0.0, 0.9, -3.0])


def rollout(lengths, *, width, score, ended, junk=0.0):
    """Two answers whose log-probabilities and values are simple functions of the place, `junk` behind their ends."""
    mask = torch.tensor([[float(t < n) for t in range(width)] for n in lengths])
    place = torch.arange(width, dtype=torch.float32).expand(len(lengths), width)
    real = mask > 0
    logps, values = -0.1 * (place + 1), 0.2 * place
    columns = [torch.where(real, x, torch.tensor(junk)) for x in (logps, logps - 0.05, values)]
    columns[2] = columns[2] * mask
    return Rollout(*columns, mask, torch.tensor(score), torch.tensor(ended), 1)


def test_credit_by_hand():
    method = Ppo(reward=[RewardSource(source="r.py:f")], kl_coef=2.0, lam=1.0, missing_eos_penalty=0.5)
    found = method.credit(rollout([2, 1], width=2, score=[1.0, 3.0], ended=[1.0, 0.0]), alone)
    # each token costs 2 * 0.05; the second answer was cut: 3 - 0.5
    returns = [[1 - 0.2, 1 - 0.1], [2.5 - 0.1, 0.0]]
    close(found.numbers_RT["returns"], returns)
    advantage = torch.tensor([[0.8, 0.9 - 0.2], [2.4, 0.0]])
    close(found.numbers_RT["advantages"], whiten(advantage, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), alone).tolist())
    means = {name: float(total) / count for name, (total, count) in found.metrics.items()}
    assert means == pytest.approx(
        {
            "objective/kl": 0.15 / 2,
            "objective/entropy": (0.1 + 0.2 + 0.1) / 2,
            "objective/non_score_reward": -0.3 / 2,
            "objective/rlhf_reward": (3.5 - 0.3) / 2,
            "objective/scores": 3.5 / 2,
            "val/explained_variance": 1
            - torch.tensor([0.8, 0.7, 2.4]).var().item() / torch.tensor([0.8, 0.9, 2.4]).var().item(),
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("whiten_rewards", [True, False])
def test_more_padding_changes_nothing(whiten_rewards):
    method = replace_knobs(whiten_rewards=whiten_rewards)
    kw = {"score": [1.0, 3.0], "ended": [1.0, 0.0]}
    tight = method.credit(rollout([3, 2], width=3, **kw), alone)
    wide = method.credit(rollout([3, 2], width=9, junk=7.0, **kw), alone)
    for name, x_RT in tight.numbers_RT.items():
        if name != "logps":
            assert wide.numbers_RT[name][:, :3].tolist() == x_RT.tolist(), name
            assert not wide.numbers_RT[name][:, 3:].any(), name
    assert {n: float(s) / c for n, (s, c) in wide.metrics.items()} == {
        n: float(s) / c for n, (s, c) in tight.metrics.items()
    }


def replace_knobs(**knobs):
    return PPO.model_copy(update=knobs)


def told_row(prefix, *answers):
    """A row whose branches bring numbers for each token."""
    return Row(prefix, tuple(Branch(ids, [True] * len(ids), "completion", numbers) for ids, numbers in answers))


def numbers(logps, advantages, values=None, returns=None):
    return {"logps": logps, "advantages": advantages, "values": values or logps, "returns": returns or logps}


ROWS = [
    told_row([5], ([7, 2], numbers([-1.0, -2.0], [1.0, -1.0])), ([2], numbers([-0.5], [2.0]))),
    told_row([5, 6], ([2], numbers([-3.0], [-2.0]))),
]


@pytest.mark.parametrize("batch", [tree(ROWS), padded(ROWS, 0), padded(ROWS, 2)], ids=["tree", "padded", "pad is eos"])
def test_policy_loss_is_a_mean_over_the_tokens_of_the_whole_update(batch):
    assert batch.counts.tokens == 4  # the last token counts, whatever the pad is
    logps_N = torch.tensor([-1.0, -2.0 + math.log(1.1), -0.5 + math.log(1.5), -3.0], requires_grad=True)
    loss = PPO.policy_loss(batch, Scores(logps_N, batch.owner_N), Counts(rows=4, tokens=8))
    assert loss.total.item() == pytest.approx((-1.0 + 1.1 - 2.0 * 1.2 + 2.0) / 8)
    loss.total.backward()
    assert logps_N.grad.tolist() == pytest.approx([-1 / 8, 1.1 / 8, 0.0, 2 / 8])  # up where worth more than expected
    means = {name: float(total) / count for name, (total, count) in loss.metrics.items()}
    assert means["policy/clipfrac_avg"] == 0.25
    assert means["val/ratio"] == pytest.approx((1 + 1.1 + 1.5 + 1) / 4)
    assert means["policy/approxkl_avg"] == pytest.approx((math.log(1.1) ** 2 + math.log(1.5) ** 2) / 8)


def test_value_loss_has_its_weight():
    batch = tree(ROWS)
    value_N = torch.tensor([0.0, -2.0, -0.5, -3.0], requires_grad=True)  # the first is 1 off, and 0.8 beyond the clip
    loss = PPO.value_loss(batch, value_N, Counts(rows=2, tokens=4))
    assert loss.total.item() == pytest.approx(0.1 * 0.5 * 1.0 / 4)
    loss.total.backward()
    assert value_N.grad.tolist() == pytest.approx([0.1 * 1.0 / 4, 0.0, 0.0, 0.0])
    assert float(loss.metrics["loss/value_avg"][0]) / 4 == pytest.approx(0.5 / 4)


def test_a_role_is_asked_when_the_one_before_is_done():
    asked, batch = [], tree(ROWS)

    def models(role, _batch):
        asked.append(role)
        return Scores(torch.zeros(4), batch.owner_N) if role == "policy" else torch.zeros(4)

    losses = PPO.losses(batch, models, batch.counts)
    next(losses)
    assert asked == ["policy"]
    next(losses)
    assert asked == ["policy", "value"]


def test_target_kl_ends_a_step():
    assert not PPO.enough({"policy/approxkl_avg": 9.0})
    assert replace_knobs(target_kl=0.1).enough({"policy/approxkl_avg": 0.11})
    assert not replace_knobs(target_kl=0.1).enough({"policy/approxkl_avg": 0.09})


def test_episodes_are_counted_by_answers():
    assert PPO.steps_in_all(8) is None
    assert replace_knobs(total_episodes=100, num_generations=4).steps_in_all(8) == 4  # 32 a step
    assert replace(ROWS[0], branches=()).targets == 0
