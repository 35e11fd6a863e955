"""The share of an update that is signal: known mixtures of one direction and noise; and the measurement end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.agreement import agreement, gradients, group_sizes, measure, run
from runtime.session import Session
from tests.test_training import plan


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_finds_the_share_of_the_common_direction(share: float) -> None:
    """g = s + noise with |s|^2 = share, |noise|^2 = 1 - share in every coordinate; scales of coordinates differ."""
    draws = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (4000,), generator=draws).float() * 2 - 1
    noise = torch.randn(24, 4000, generator=draws)
    gradients = share**0.5 * sign + (1 - share) ** 0.5 * noise
    found = agreement(gradients, gradients, gradients)
    assert abs(found["share"] - share) < 4 * found["error"] + 0.01 and found["error"] < 0.02
    rescaled = gradients * torch.logspace(-6, 6, 4000)
    assert agreement(rescaled, rescaled, rescaled)["share"] == pytest.approx(found["share"], abs=1e-4)
    low, high = np.percentile(found["replicates"], [0.5, 99.5])
    assert low - 0.01 < share < high + 0.01 and high - low < 0.2


def test_means_over_groups_have_the_share_of_one_group_and_less_noise() -> None:
    """Each prompt has 8 groups: inner products of their means estimate those of single groups."""
    share, found = 0.04 / 1.04, {"one": [], "mean": []}
    for seed in range(12):
        groups = 0.2 + torch.randn(16, 8, 3000, generator=torch.Generator().manual_seed(seed))
        first, second = groups[:, 0], groups[:, 1]
        found["one"].append(agreement(first, first, second)["share"])
        found["mean"].append(agreement(groups.mean(1), first, second)["share"])
    deviation = {name: np.std(values) for name, values in found.items()}
    assert deviation["mean"] < 0.7 * deviation["one"]
    assert np.mean(found["mean"]) == pytest.approx(share, rel=0.04), "16 prompts: no bias from the scale they give"


def test_equal_gradients_are_all_signal_and_dead_weights_do_not_count() -> None:
    same = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(4, 50).clone()
    same[:, :10] = 0
    found = agreement(same, same, same)
    assert found["share"] == pytest.approx(1)
    drawn = [value for value in found["replicates"] if value == value]
    assert drawn == pytest.approx([1.0] * len(drawn)), "a prompt drawn twice is not a pair"


def test_group_sizes_double() -> None:
    assert [group_sizes(n) for n in (2, 4, 8, 12, 32)] == [[2], [4], [4, 8], [4, 8, 12], [4, 8, 16, 32]]


def test_gradients_of_prompts_add_up_to_that_of_the_update(model: Path, tmp_path: Path) -> None:
    options = ["rollout.prompts=3", "rollout.group_size=4", "reward=aesthetic", "algorithm.kl_weight=0"]
    made = plan(model, tmp_path, *options)
    session = Session(made.settings, made.config)
    rollout = session.rollout()
    session.score(rollout, session.decode(rollout))
    loss = session.loss_module(rollout)["loss_objective"]
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(loss, session.parameters)])
    found = gradients(session, rollout, [2, 4])
    each = found[4][0]
    assert each.shape == (3, len(whole)) and whole.abs().max() > 0 and torch.equal(each, found[4][1])
    torch.testing.assert_close(each.mean(0), whole, atol=1e-6, rtol=1e-3)
    halves = rollout.clone()
    session.settings.algorithm.prepare(halves, 2)
    losses = [session.loss_module(halves[rows])["loss_objective"] for rows in ([0, 1, 2, 3], [0, 1], [2, 3])]
    for loss, expected in zip(losses, found[2], strict=True):
        slow = torch.cat([g.flatten() for g in torch.autograd.grad(loss, session.parameters)])
        torch.testing.assert_close(expected[0], slow, atol=1e-6, rtol=1e-3)
    before = [p.detach().clone() for p in session.parameters]
    found = measure(session, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, session.parameters, strict=True)), "the weights stay"
    assert found["prompts"] == 6 and list(found["signal"]) == ["4"] and found["metrics"]["return_std"] > 0


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "nft", "dpo"])
def test_the_experiment_runs_for_every_algorithm(model: Path, tmp_path: Path, algorithm: str) -> None:
    options = [f"algorithm={algorithm}", "updates=2", "rollout.prompts=2", "rollout.group_size=4", "reward=aesthetic"]
    options += ["algorithm.margin=0"] if algorithm == "dpo" else []
    run(plan(model, tmp_path, *options))
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert found["excess_noise"] == [pytest.approx(1.0)] * 2 and found["signal"]["4"]["error"] > 0
