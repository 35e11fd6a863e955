"""Every algorithm: what its settings refuse, and that it learns what is best."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from algorithms.dpo import DPO
from algorithms.grpo import GRPO
from algorithms.guard import Guard
from algorithms.nft import NFT
from algorithms.ppo import PPO
from envs.transitions import CPS
from policies.actor import Actor
from policies.adapters import Adaptation, ReferencePolicy
from policies.causality import Causality
from tests.scored import GROUP, network, scored_rollout
from tests.toy_training import trained

EVERY: dict[str, Any] = {
    "grpo": GRPO(kl_weight=0.0),
    "guard": Guard(kl_weight=0.0),
    "dpo": DPO(beta=20.0, margin=0.02),
    "nft": NFT(),
    "ppo": PPO(kl_weight=0.0, critic="net"),
}


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (DPO(), "beta", 0.0),
        (DPO(), "pairs", 0),
        (DPO(), "margin", -1.0),
        (DPO(), "margin_in", "std"),
        (DPO(), "credit", "frame"),
        (NFT(), "strength", math.inf),
        (NFT(), "advantage_max", 0.0),
        (NFT(), "draws", 0),
        (Guard(), "clip", -1.0),
        (Guard(), "normalize", "all"),
        (PPO(), "gamma", 1.5),
        (PPO(), "lam", -0.1),
        (PPO(), "critic", "value"),
        (PPO(), "critic_lr", 0.0),
        (PPO(), "critic_width", 0),
    ],
)
def test_bad_settings_are_refused(settings: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^algorithm\.{name} must [^\n]+$"):
        replace(settings, **{name: value})


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("credit", ["per_frame", "return_to_go", "clip"])
def test_constant_rewards_teach_nothing_and_break_nothing(name: str, credit: str) -> None:
    settings = EVERY[name]
    if name == "ppo":
        if credit != "per_frame":
            pytest.skip("a critic has no credit to assign")
    else:
        settings = replace(settings, credit=credit)
    actor = Actor(network(), CPS(), Causality())
    module = settings.loss_module(actor, ReferencePolicy(actor, Adaptation()))
    rollout = scored_rollout(actor, settings)
    rollout["reward"] = torch.full_like(rollout["reward"], 0.3)
    settings.prepare(rollout, GROUP)
    module.begin(rollout)
    losses = module(rollout)
    assert all(bool(value.isfinite().all()) for value in losses.values())
    if name != "ppo":
        losses["loss_objective"].backward()
        assert max(float(p.grad.abs().max()) for p in actor.parameters() if p.grad is not None) < 1e-6


STEPS = {"grpo": (2e-2, 100), "guard": (2e-2, 100), "dpo": (2e-2, 100), "nft": (3e-2, 150), "ppo": (5e-3, 100)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", EVERY)
def test_every_algorithm_finds_the_best_policy(name: str, seed: int) -> None:
    """At least 95 % of the way from the first policy's return to the best, which is 0."""
    lr, updates = STEPS[name]
    before, after = trained(EVERY[name], seed, updates, lambda parameters: torch.optim.Adam(parameters, lr=lr))
    assert after > 0.05 * before, f"return {before:.3f} -> {after:.3f}"


@pytest.mark.parametrize("name", ["guard", "dpo", "nft"])
def test_shuffled_scores_teach_nothing(name: str) -> None:
    settings = replace(EVERY[name], shuffle_advantages=True)
    before, after = trained(settings, 0, 60, lambda parameters: torch.optim.SGD(parameters, lr=0.05))
    assert after < 0.9 * before, f"return {before:.3f} -> {after:.3f} with nothing to learn from"
