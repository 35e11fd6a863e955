"""Frames that are denoised together end together: none of a chunk is later than another, in any algorithm."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from algorithms.advantages import credited, last_finished, without_history
from algorithms.dpo import DPO
from algorithms.grpo import GRPO
from algorithms.ppo import PPO
from algorithms.ppo_loss import chain_advantage
from envs.transitions import CPS
from policies.actor import Actor
from policies.causality import Causality
from runtime.session import Session
from tests.scored import network, random, rewarded, scored_rollout
from tests.test_training import plan


def test_frames_of_a_chunk_answer_for_the_same_returns() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]])
    assert credited(reward, "return_to_go", 1).tolist() == [[63, 62, 60, 56, 48, 32]]
    assert credited(reward, "return_to_go", 2).tolist() == [[63, 63, 60, 60, 48, 48]]
    assert credited(reward, "return_to_go", 3).tolist() == [[63, 63, 63, 56, 56, 56]]
    for chunk in (1, 2, 3):
        assert torch.equal(credited(reward, "per_frame", chunk), reward)
        assert credited(reward, "clip", chunk).tolist() == [[63] * 6]


def test_history_is_what_was_finished_when_the_chunk_began() -> None:
    assert last_finished(6, 1).tolist() == [0, 1, 2, 3, 4]
    assert last_finished(6, 2).tolist() == [1, 1, 3, 3]
    assert last_finished(6, 3).tolist() == [2, 2, 2]
    reward, valid = random(8, 4), torch.ones(8, 4, dtype=torch.bool)
    found = without_history(reward, reward, valid, 4, 2)
    centred = (reward.unflatten(0, (2, 4)) - reward.unflatten(0, (2, 4)).mean(1, keepdim=True)).flatten(0, 1)
    before = centred[:, 1]
    beta = (before * (centred[:, 2] + centred[:, 3])).sum() / (2 * before.square().sum())
    assert torch.equal(found[:, :2], reward[:, :2]), "frame 1 was drawn together with frame 0"
    torch.testing.assert_close(found[:, 2:], reward[:, 2:] - beta * reward[:, 1:2])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7)])
def test_a_chunk_is_one_link_of_the_chain(gamma: float, lam: float) -> None:
    """Two chunks of two frames, three steps: six decisions, not twelve."""
    reward, value = random(3, 4), random(3, 4, 3, seed=1)
    advantage, target = chain_advantage(reward, value, gamma, lam, 2)
    for b in range(3):
        values = [*value[b].view(2, 2, 3).mean(1).flatten().tolist(), 0.0]
        paid = [0, 0, float(reward[b, :2].sum()), 0, 0, float(reward[b, 2:].sum())]
        errors = [r + gamma * after - before for r, before, after in zip(paid, values[:-1], values[1:], strict=True)]
        expected = [sum((gamma * lam) ** k * e for k, e in enumerate(errors[t:])) for t in range(6)]
        for frame in range(4):
            chunk = frame // 2
            torch.testing.assert_close(
                advantage[b, frame], torch.tensor(expected)[3 * chunk : 3 * chunk + 3], atol=1e-6, rtol=1e-5
            )
    shared = value.view(3, 2, 2, 3).mean(2).repeat_interleave(2, 1)
    torch.testing.assert_close(target, advantage + shared)


def test_the_net_critic_sees_no_frame_of_its_own_chunk_finished() -> None:
    settings = PPO(kl_weight=0.0, critic="net")
    acting = Actor(network(), CPS(), Causality())
    rollout = scored_rollout(acting, settings)
    for chunk, sees in ((1, [False, True, True]), (3, [False, False, False])):
        critic = settings.loss_module(Actor(acting.transformer, CPS(), Causality(chunk=chunk)), None).critic
        seen = critic.observe(rollout)
        other = rollout.clone()
        other["latents"][:, :, -1] += 1
        changed = (critic.observe(other) - seen).abs().amax((0, 2, 3)) > 0
        assert changed.tolist() == sees
        assert len(seen[0, :, 0, -1].unique()) == 3 // chunk, "frames of a chunk have the same share of the clip left"


def test_settings_pass_the_chunk_on() -> None:
    rollout = rewarded(random(8, 4).cumsum(1))
    GRPO(credit="return_to_go", history_baseline=False).prepare(rollout, 4, 2)
    advantage = rollout["advantage"]
    assert torch.equal(advantage[:, ::2], advantage[:, 1::2]) and not torch.equal(advantage[:, 0], advantage[:, 2])
    DPO(credit="return_to_go", history_baseline=False, margin=0.0).prepare(rollout, 4, 2)
    assert torch.equal(rollout["role"][:, ::2], rollout["role"][:, 1::2])


@pytest.mark.parametrize("options", [["algorithm=ppo", "algorithm.critic=net"], ["algorithm.credit=return_to_go"]])
def test_an_update_of_chunks(model: Path, tmp_path: Path, options: list[str]) -> None:
    small = ["rollout.chunk=2", "rollout.frames=4", "rollout.group_size=4", "reward=aesthetic"]
    made = plan(model, tmp_path, *small, *options)
    session = Session(made.settings, made.config)
    rollout = session.rollout()
    metrics = session.score(rollout, session.decode(rollout)) | session.update(rollout)
    assert metrics["log_prob_gap"] <= 1e-5 and 0 < metrics["grad_norm"] < math.inf
    advantage = rollout["advantage"]
    if options[0] == "algorithm=ppo":
        assert torch.equal(advantage[:, ::2] != 0, rollout["mask"][:, ::2])
        torch.testing.assert_close(advantage[:, ::2], advantage[:, 1::2])
