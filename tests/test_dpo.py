"""Online DPO, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from algorithms.dpo import DPO
from algorithms.losses import preference_loss
from envs.transitions import CPS
from tests.scored import GROUP, random, rewarded, scored_rollout, setting


def test_preference_loss_by_hand() -> None:
    difference = torch.tensor([0.0, 2.0, -1.0, 77.0], requires_grad=True)
    valid = torch.tensor([True, True, True, False])
    loss, metrics = preference_loss(difference, valid)
    values = [math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.e)]
    assert loss.item() == pytest.approx(sum(values) / 3)
    (gradient,) = torch.autograd.grad(loss, difference)
    assert gradient.tolist() == pytest.approx([-1 / 6, -1 / 3 / (1 + math.exp(2)), -1 / 3 / (1 + math.exp(-1)), 0])
    assert float(metrics["preference_accuracy"]) == pytest.approx(1 / 3)
    assert float(metrics["preference_margin"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("credit", ["per_frame", "clip"])
def test_dpo_by_hand(credit: str) -> None:
    """Two samples, two frames, two steps; the second step of frame 1 is deterministic."""
    settings = DPO(beta=2.0, pairs=1, credit=credit, history_baseline=False)
    stochastic = torch.tensor([[[True, True], [True, False]]]).expand(2, 2, 2).contiguous()
    rollout = rewarded(torch.tensor([[1.0, 5.0], [2.0, 1.0]]), stochastic)
    metrics = settings.prepare(rollout, 2)
    new = torch.tensor([[[0.1, 0.2], [0.3, 9.0]], [[0.5, 0.1], [0.0, 9.0]]]) * stochastic
    initial = torch.tensor([[[0.0, 0.1], [0.1, 9.0]], [[0.2, 0.2], [0.4, 9.0]]]) * stochastic
    # Gains by sample and frame: 0.2, 0.2 | 0.2, -0.4.
    scores = TensorDict({"log_prob": new, "mean": torch.zeros(2, 2, 2, 1, 1, 1), "std": torch.ones(2, 2, 2)})
    first = TensorDict({"log_prob": initial, "mean": torch.zeros(2, 2, 2, 1, 1, 1)})
    losses, _ = settings.loss(scores, rollout, CPS(), first)
    if credit == "clip":  # sums 6 and 3: sample 0 is preferred, gains 0.4 and -0.2
        assert losses["objective"].item() == pytest.approx(math.log(1 + math.exp(-2 * 0.6)))
    else:  # frame 0 prefers sample 1 (0.2 - 0.2), frame 1 sample 0 (0.2 + 0.4)
        expected = (math.log(2) + math.log(1 + math.exp(-2 * 0.6))) / 2
        assert losses["objective"].item() == pytest.approx(expected)
    assert metrics["pairs"] == (1 if credit == "clip" else 2)


def test_a_clip_is_one_decision_for_all_its_frames_and_a_frame_without_a_draw_is_none() -> None:
    rollout = rewarded(random(16, 5).cumsum(1), torch.zeros(16, 5, 2, dtype=torch.bool))
    rollout["stochastic"][:, 2, 0] = True
    DPO(credit="clip").prepare(rollout, 8)
    role = rollout["role"]
    assert torch.equal(role, role[:, :1].expand_as(role)) and role.abs().max() == 1
    metrics = DPO(margin=0.0).prepare(rollout, 8)
    assert metrics["pairs"] == 2 * 2 and not rollout["role"][:, [0, 1, 3, 4]].any()


@pytest.mark.parametrize("weight", [1.0, 1e-4])
def test_a_margin_in_units_of_spread_picks_the_same_pairs_whatever_rewards_weigh(weight: float) -> None:
    reward = random(16, 3) * torch.tensor([1.0, 0.01, 2.0])
    reward[:8] *= 3
    rollout = rewarded(reward * weight)
    rollout["valid"][8:] = False  # a failed group has no part in the spread
    settings = DPO(margin=0.5, margin_in="spread", history_baseline=False, pairs=1)
    assert settings.prepare(rollout, 8)["pairs"] == 2, "frame 1 has next to no spread"
    assert rollout["role"][:, 1].abs().max() == 0 and rollout["role"][8:].abs().max() == 0
    spread = float((reward[:8].std(0).square().mean()).sqrt())
    absolute = DPO(margin=0.5 * spread * weight, history_baseline=False, pairs=1)
    role = rollout["role"].clone()
    absolute.prepare(rollout, 8)
    assert torch.equal(role, rollout["role"])
    # In units of reward the weak rewards have no pair at all.
    assert (DPO(history_baseline=False).prepare(rollout, 8)["pairs"] == 0) == (weight < 1)
    rollout["valid"][:] = False
    assert settings.prepare(rollout, 8)["pairs"] == 0


def test_dpo_takes_whole_groups_and_starts_at_no_preference() -> None:
    settings = DPO()
    actor, module = setting(settings)
    rollout = scored_rollout(actor, settings)
    losses = module(rollout)
    assert losses["loss_objective"].item() == pytest.approx(math.log(2), abs=1e-4)
    halves = [module(part)["loss_objective"].item() for part in rollout.split(GROUP)]
    counts = [float(part["role"].clamp(min=0).sum()) for part in rollout.split(GROUP)]
    whole = sum(h * c for h, c in zip(halves, counts, strict=True)) / sum(counts)
    assert losses["loss_objective"].item() == pytest.approx(whole, rel=1e-5)
