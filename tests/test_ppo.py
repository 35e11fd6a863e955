"""PPO and its critics, worked by hand and compared with references."""

from __future__ import annotations

import pytest
import torch

from algorithms.advantages import credited
from algorithms.losses import masked_mean
from algorithms.ppo import PPO
from algorithms.ppo_loss import chain_advantage, normalized
from envs.schedules import All, Single
from envs.transitions import CPS
from policies.actor import Actor
from policies.causality import Causality
from tests.scored import GROUP, network, random, scored_rollout, total


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (1.0, 0.0)])
def test_chain_advantage_against_the_definition(gamma: float, lam: float) -> None:
    reward, value = random(2, 3), random(2, 3, 2, seed=1)
    advantage, target = chain_advantage(reward, value, gamma, lam)
    for b in range(2):
        values = [*value[b].flatten().tolist(), 0.0]
        paid = [r if n == 1 else 0.0 for r in reward[b].tolist() for n in range(2)]
        errors = [r + gamma * after - before for r, before, after in zip(paid, values[:-1], values[1:], strict=True)]
        expected = [sum((gamma * lam) ** k * e for k, e in enumerate(errors[t:])) for t in range(6)]
        torch.testing.assert_close(advantage[b].flatten(), torch.tensor(expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(target, advantage + value)


def test_first_gradient_with_a_zero_critic_is_reinforce() -> None:
    """gamma = lambda = 1: the advantage of a decision is the sum of all rewards that come after it."""
    settings = PPO(kl_weight=0.0, gamma=1.0, lam=1.0, normalize=False, step_rescaling=False)
    actor = Actor(network(), CPS(), Causality())
    module = settings.loss_module(actor, None)
    rollout = scored_rollout(actor, settings)
    module.begin(rollout)
    found = torch.autograd.grad(module(rollout)["loss_objective"], list(actor.parameters()), allow_unused=True)
    returns = credited(rollout["reward"], "return_to_go")[..., None]
    reinforce = -masked_mean(actor.evaluate(rollout)["log_prob"] * returns, rollout["stochastic"])
    expected = torch.autograd.grad(reinforce, list(actor.parameters()), allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("critic", ["head", "net"])
def test_the_critic_learns_values_and_leaves_the_policy_alone(critic: str) -> None:
    settings = PPO(kl_weight=0.0, critic=critic, lam=1.0)
    actor = Actor(network(), CPS(), Causality())
    module = settings.loss_module(actor, None)
    rollout = scored_rollout(actor, settings, Single())
    rollout["reward"] = rollout["condition"][:, :, 0].mean((-2, -1)) + torch.arange(3.0)
    optimizer = torch.optim.AdamW(module.critic.parameters(), lr=1e-2)
    first = module.begin(rollout)
    assert first["value"] == 0 and first["explained_variance"] == pytest.approx(0, abs=1e-6)
    for _ in range(200):
        loss = module(rollout)["loss_critic"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad is None for p in actor.parameters())
    assert module.begin(rollout.exclude("observation"))["explained_variance"] > 0.9
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names == {"actor", "critic"}


def test_head_critic_reads_what_enters_the_output_layer() -> None:
    actor = Actor(network(), CPS(), Causality(window=2))
    module = PPO(critic="head").loss_module(actor, None)
    rollout = scored_rollout(actor, PPO(), All())
    seen = module.critic.observe(rollout)
    width = actor.transformer.proj_out.in_features
    assert seen.shape == (8, 3, 3, width + 2)
    torch.testing.assert_close(seen[..., -2], rollout["sigma"][..., :-1])
    assert seen[0, :, 0, -1].tolist() == pytest.approx([1, 2 / 3, 1 / 3])
    # Frame 2 at step 1 must see its history and its own latent, and nothing of later steps.
    other = rollout.clone()
    other["latents"][:, 2, 2] += 1
    assert torch.equal(module.critic.observe(other)[:, :, :2], seen[:, :, :2])
    other["latents"][:, 0, -1] += 1
    changed = (module.critic.observe(other)[:, :, 1] - seen[:, :, 1]).abs().amax((0, 2))
    assert changed[0] == 0 and changed[1:].min() > 1e-4


def test_explained_variance_is_that_of_what_was_paid() -> None:
    """A target under lambda = 0 is nearly the value itself: random values would seem to explain it."""
    settings = PPO(kl_weight=0.0, critic="net", lam=0.0, gamma=0.9)
    actor = Actor(network(), CPS(), Causality())
    module = settings.loss_module(actor, None)
    rollout = scored_rollout(actor, settings)
    rollout["reward"] = 0.01 * random(8, 3, seed=5)
    with torch.no_grad():
        module.critic.value.weight.copy_(random(1, 66, seed=6))
    found = module.begin(rollout)["explained_variance"]
    value = module.critic(rollout["observation"]).detach()
    paid = torch.zeros(8, 3, 3)
    for m in range(3):
        for n in range(3):
            steps = [3 * k + 2 - (3 * m + n) for k in range(m, 3)]
            paid[:, m, n] = sum(0.9**d * rollout["reward"][:, m + i] for i, d in enumerate(steps))
    assert found == pytest.approx(float(1 - (paid - value).var() / paid.var()), rel=1e-4) and found < 0


def test_ppo_leaves_failed_samples_out() -> None:
    settings = PPO(kl_weight=0.0, critic="net")
    actor = Actor(network(), CPS(), Causality())
    module = settings.loss_module(actor, None)
    rollout = scored_rollout(actor, settings)
    rollout["valid"][3, 1] = False
    metrics = settings.prepare(rollout, GROUP)
    assert metrics == {"samples_dropped": 1.0} and not rollout["mask"][3].any() and rollout["mask"][4].any()
    module.begin(rollout)
    expected = total(module(rollout))
    rollout["reward"][3] = 1e6
    module.begin(rollout)
    torch.testing.assert_close(total(module(rollout)), expected)


def test_normalized_advantages() -> None:
    advantage, mask = random(4, 3, 2), random(4, 3, 2, seed=1) > 0
    found = normalized(advantage, mask, 1e-9)
    assert found[~mask].abs().max() == 0
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-6) and float(found[mask].std()) == pytest.approx(1)
    assert torch.equal(
        normalized(torch.full((2, 2, 2), 0.1), torch.ones(2, 2, 2, dtype=torch.bool), 1e-9), torch.zeros(2, 2, 2)
    )
