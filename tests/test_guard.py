"""Guard: its ratio and its lengths, worked by hand."""

from __future__ import annotations

import pytest
import torch

from algorithms.guard import Guard
from algorithms.losses import guarded_log_ratio, masked_mean
from envs.transitions import log_prob
from tests.scored import random, scored_rollout, setting


def test_guarded_log_ratio_is_linear_in_the_noise() -> None:
    """log N(a; m, s) - log N(a; m_old, s) + (m - m_old)^2 / (2 s^2) = (m - m_old) noise / s, and times s."""
    mean_old, shift, noise = (random(2, 3, 2, 4, 4, 4, seed=seed) for seed in range(3))
    std = torch.tensor([[0.3, 0.0], [0.5, 0.9], [0.1, 0.2]]).expand(2, 3, 2)
    wide = std[..., None, None, None]
    action = mean_old + wide * noise
    ratio = log_prob(action, mean_old + shift, wide) - log_prob(action, mean_old, wide)
    found = guarded_log_ratio(ratio, mean_old + shift, mean_old, std)
    expected = torch.where(std > 0, (shift * noise).mean((-3, -2, -1)), 0.0)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_guard_divides_a_steps_loss_by_its_length() -> None:
    settings = Guard(kl_weight=0.0)
    actor, module = setting(settings)
    rollout = scored_rollout(actor, settings)
    module.begin(rollout)
    losses = module(rollout)
    assert float(losses["ratio_deviation"]) <= 1e-5 and float(losses["log_prob_gap"]) <= 1e-5
    length = -rollout["sigma"].diff(dim=-1)
    mean = length[..., :2].mean(-1, keepdim=True)  # the last step of three is never stochastic
    expected = -masked_mean(rollout["advantage"][..., None] * mean / length, rollout["mask"])
    torch.testing.assert_close(losses["loss_objective"], expected, atol=1e-5, rtol=0)
    # A policy that has moved: the guarded ratio, not the plain one.
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.01)
        now = actor.evaluate(rollout)
    guarded = guarded_log_ratio(now["log_prob"] - rollout["log_prob"], now["mean"], rollout["mean_old"], now["std"])
    assert float(module(rollout)["ratio_deviation"]) == pytest.approx(float((guarded.exp() - 1).abs().max()), rel=1e-4)
