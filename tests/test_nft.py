"""NFT, worked by hand and compared with flow matching."""

from __future__ import annotations

import pytest
import torch

from algorithms.losses import nft_loss
from algorithms.nft import NFT
from envs.schedules import Deterministic
from envs.transitions import CPS
from policies.actor import Actor
from policies.adapters import Adaptation, ReferencePolicy
from policies.causality import Causality
from tests.scored import network, random, scored_rollout, total


def test_nft_loss_by_hand() -> None:
    """v = 3, v_old = 1, target 2, b = 1/2: v+ = 2, v- = 0; squared errors 0 and 4."""
    v, old, target = (torch.full((1, 3, 1, 1, 1), x) for x in (3.0, 1.0, 2.0))
    mask = torch.tensor([[True, True, False]])
    for advantage, expected in ((0.0, 2.0), (1.0, 0.0), (-0.5, 3.0), (9.0, 0.0), (-9.0, 4.0)):
        found = nft_loss(v, old, target, torch.full((1, 3), advantage), mask, 0.5)
        assert found.item() == pytest.approx(expected)


def test_nft_starts_as_flow_matching_weighted_by_the_advantage() -> None:
    old, target = random(4, 3, 2, 4, 4), random(4, 3, 2, 4, 4, seed=1)
    advantage, mask = random(4, 3, seed=2), torch.ones(4, 3, dtype=torch.bool)
    v = old.clone().requires_grad_()
    (found,) = torch.autograd.grad(nft_loss(v, old, target, advantage, mask, 0.3), v)
    weighted = (advantage.clamp(-1, 1) * (v - target).square().mean((2, 3, 4))).mean()
    (expected,) = torch.autograd.grad(0.3 * weighted, v)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk", [1, 3])
def test_nft_noises_by_key_at_the_policys_own_levels(chunk: int) -> None:
    settings = NFT(draws=2, kl_weight=1.0)
    actor = Actor(network(), CPS(), Causality(chunk=chunk))
    module = settings.loss_module(actor, ReferencePolicy(actor, Adaptation()))
    rollout = scored_rollout(Actor(actor.transformer, CPS(), Causality()), settings)
    module.begin(rollout)
    sigma = rollout["forward_sigma"]
    assert sigma.shape == (8, 2, 3) and set(sigma.unique().tolist()) <= set(rollout["sigma"][0, 0, :-1].tolist())
    assert len(sigma.unique()) == 3 and (chunk == 1 or torch.equal(sigma, sigma[..., :1].expand_as(sigma)))
    some = rollout[2:5].exclude("forward_sigma", "forward_eps", "forward_old")
    module.begin(some)
    assert torch.equal(some["forward_eps"], rollout["forward_eps"][2:5]), "draws do not depend on the batch"
    losses = module(rollout)
    assert float(losses["velocity_drift"]) == 0 and losses["loss_initial"].item() == 0
    total(losses).backward()
    assert all(p.grad is not None for p in actor.parameters())
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.mul_(1.1)
    moved = module(rollout)
    assert float(moved["velocity_drift"]) > 0 and "kl" not in moved.keys(), "velocities are not nats"  # noqa: SIM118
    assert moved["loss_initial"].item() == pytest.approx(float(moved["velocity_drift_initial"]))


def test_nft_needs_no_stochastic_step() -> None:
    settings = NFT()
    actor = Actor(network(), CPS(), Causality())
    module = settings.loss_module(actor, None)
    rollout = scored_rollout(actor, settings, Deterministic())
    assert not rollout["stochastic"].any() and rollout["mask"].all()
    module.begin(rollout)
    assert module(rollout)["loss_objective"].requires_grad
