"""The share of an update that is signal: known mixtures of one direction and noise; and the measurement end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase

from experiments.agreement import _halved, agreement, gradients, group_sizes, measure, run
from runtime.session import Session
from tests.test_training import plan


@pytest.mark.parametrize(("own", "common"), [(0.0, 0.0), (0.1, 0.02), (0.5, 0.25)])
def test_finds_the_shares_of_the_prompt_and_of_all_prompts(own: float, common: float) -> None:
    """g = c + p + noise, energies `common`, `own` - `common` and the rest; scales of coordinates differ."""
    draws = torch.Generator().manual_seed(0)
    c, p = torch.randn(4000, generator=draws), torch.randn(12, 1, 4000, generator=draws)
    noise = torch.randn(12, 4, 4000, generator=draws)
    gradients = common**0.5 * c.sign() + (own - common) ** 0.5 * p + (1 - own) ** 0.5 * noise
    found = agreement(gradients)
    for kind, share in (("within", own), ("across", common)):
        error = found[kind]["error"]
        assert abs(found[kind]["share"] - share) < 4 * error + 0.01 and error < 0.02
        low, high = np.percentile(found[kind]["replicates"], [0.5, 99.5])
        assert low - 0.02 < share < high + 0.02 and high - low < 0.2
    rescaled = agreement(gradients * torch.logspace(-6, 6, 4000))
    assert rescaled["within"]["share"] == pytest.approx(found["within"]["share"], abs=1e-4)


def test_equal_gradients_are_all_signal_and_dead_weights_do_not_count() -> None:
    same = torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(0)).expand(4, 2, 50).clone()
    same[..., :10] = 0
    found = agreement(same)
    assert found["within"]["share"] == pytest.approx(1) == found["across"]["share"]
    drawn = [value for value in found["across"]["replicates"] if value == value]
    assert drawn == pytest.approx([1.0] * len(drawn)), "a prompt drawn twice is not a pair"


def test_group_sizes_double_and_there_are_two_of_each() -> None:
    assert [group_sizes(n) for n in (4, 6, 8, 12, 64)] == [[2], [3], [4], [4], [4, 8, 16, 32]]


def test_gradients_are_those_of_updates_of_single_groups(model: Path, tmp_path: Path) -> None:
    options = ["rollout.prompts=3", "rollout.group_size=4", "reward=aesthetic", "algorithm.kl_weight=0"]
    made = plan(model, tmp_path, *options)
    session = Session(made.settings, made.config)
    rollout = session.rollout()
    session.score(rollout, session.decode(rollout))

    def slow(batch: TensorDictBase) -> torch.Tensor:
        loss = session.loss_module(batch)["loss_objective"]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, session.parameters)])

    found, whole = gradients(session, rollout, [2, 4]), slow(rollout)
    assert found[4].shape == (3, 1, len(whole)) and whole.abs().max() > 0
    torch.testing.assert_close(found[4].mean((0, 1)), whole, atol=1e-6, rtol=1e-3)
    halves = rollout.clone()
    session.settings.algorithm.prepare(halves, 2)
    for number, rows in enumerate(torch.arange(12).split(2)):
        torch.testing.assert_close(found[2].flatten(0, 1)[number], slow(halves[rows]), atol=1e-6, rtol=1e-3)
    before = [p.detach().clone() for p in session.parameters]
    measured = measure(session, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, session.parameters, strict=True)), "the weights stay"
    assert measured["prompts"] == 6 and list(measured["signal"]) == ["2"] and measured["metrics"]["return_std"] > 0


def test_the_halves_of_a_prompt_share_the_clip_alone(model: Path, tmp_path: Path) -> None:
    options = ["rollout.prompts=6", "rollout.group_size=4", "schedule=single", "reward=aesthetic"]
    made = plan(model, tmp_path, *options)
    session = Session(made.settings, made.config)
    session.episodes = _halved(session.episodes)
    state, clips = session.episodes.training(0, 0)
    assert len(state) == len(clips) == 24 and clips.names[0] == clips.names[3] != clips.names[4]
    for key in ("stochastic", "latents"):
        halves = state[key].unflatten(0, (6, 2, 2)).flatten(3).float()
        assert torch.equal(halves[:, :, 0], halves[:, :, 1]), "a group shares its draws"
        assert not torch.equal(halves[:, 0], halves[:, 1]), "the other half has its own"


@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "nft", "dpo"])
def test_the_experiment_runs_for_every_algorithm(model: Path, tmp_path: Path, algorithm: str) -> None:
    options = [f"algorithm={algorithm}", "updates=2", "rollout.prompts=2", "rollout.group_size=4", "reward=aesthetic"]
    options += ["algorithm.margin=0", "algorithm.pairs=1"] if algorithm == "dpo" else []
    run(plan(model, tmp_path, *options))
    found = json.loads((tmp_path / "agreement.json").read_text())
    assert found["excess_noise"] == [pytest.approx(1.0)] * 2 and found["signal"]["2"]["within"]["error"] > 0
