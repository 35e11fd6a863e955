"""Guard, DPO, NFT, PPO and their parts: worked by hand, compared with references, and learning what is best."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from algorithms.advantages import credited, group_advantage, pair_roles, without_history
from algorithms.dpo import DPO
from algorithms.grpo import GRPO
from algorithms.guard import Guard
from algorithms.losses import guarded_log_ratio, masked_mean, nft_loss, preference_loss
from algorithms.nft import NFT
from algorithms.ppo import PPO
from algorithms.ppo_loss import chain_advantage, normalized
from envs.schedules import All, Deterministic, Single
from envs.transitions import CPS, log_prob
from policies.actor import Actor
from policies.adapters import Adaptation, ReferencePolicy
from policies.causality import Causality
from tests.test_algorithms import GROUP, network, scored_rollout, setting, total
from tests.toy_training import trained

EVERY: dict[str, Any] = {
    "grpo": GRPO(kl_weight=0.0),
    "guard": Guard(kl_weight=0.0),
    "dpo": DPO(beta=20.0, margin=0.02),
    "nft": NFT(),
    "ppo": PPO(kl_weight=0.0, critic="net"),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Credit and advantages.


def test_credit_by_hand() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0]])
    assert credited(reward, "per_frame").tolist() == [[1, 2, 4]]
    assert credited(reward, "return_to_go").tolist() == [[7, 6, 4]]
    assert credited(reward, "clip").tolist() == [[7, 7, 7]]


def test_global_spread_is_one_number_for_the_valid_groups() -> None:
    score = torch.tensor([[0.0, 5.0], [2.0, 5.0], [0.0, 5.0], [6.0, 5.0], [0.0, 0.0], [99.0, 7.0]])
    valid = torch.tensor([True, True, True, True, False, False])[:, None].expand(6, 2)
    # Standard deviations sqrt(2), 0, 3 sqrt(2), 0: root mean square sqrt(5).
    found = group_advantage(score, 2, normalize="global", eps=1e-9, valid=valid)
    expected = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-3.0, 0.0], [3.0, 0.0]]) / math.sqrt(5)
    torch.testing.assert_close(found[:4], expected)


def test_history_of_returns_is_the_reward_of_the_frame_before() -> None:
    """What is taken out of a return-to-go must be known before the action; the return of the frame before is not."""
    reward = random(4096 * 4, 3)
    valid = torch.ones_like(reward, dtype=torch.bool)
    score = credited(reward, "return_to_go")
    kept = without_history(score, reward, valid, 4)
    torch.testing.assert_close(kept, score, atol=0.2, rtol=0)  # rewards are independent: nothing to take out
    assert kept[:, 0].equal(score[:, 0])


def test_pairs_by_hand() -> None:
    score = torch.tensor([[3.0], [1.0], [2.0], [0.0]])
    assert pair_roles(score, 4, 2, 0.0)[:, 0].tolist() == [[1, 0], [0, -1], [0, 1], [-1, 0]]
    assert pair_roles(score, 4, 2, 1.0)[:, 0].tolist() == [[1, 0], [0, 0], [0, 0], [-1, 0]]
    assert pair_roles(torch.ones(4, 2), 4, 2, 0.0).abs().max() == 0, "equal scores are no preference"
    with pytest.raises(ValueError, match=r"algorithm\.pairs=3 needs groups of 6"):
        pair_roles(score, 4, 3, 0.0)


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


# Guard.


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


# DPO.


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
    rollout = TensorDict(
        {
            "reward": torch.tensor([[1.0, 5.0], [2.0, 1.0]]),
            "valid": torch.ones(2, 2, dtype=torch.bool),
            "stochastic": stochastic,
        },
        [2],
    )
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
    rollout = TensorDict(
        {
            "reward": random(16, 5).cumsum(1),
            "valid": torch.ones(16, 5, dtype=torch.bool),
            "stochastic": torch.zeros(16, 5, 2, dtype=torch.bool),
        },
        [16],
    )
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
    rollout = TensorDict(
        {
            "reward": reward * weight,
            "valid": torch.ones(16, 3, dtype=torch.bool),
            "stochastic": torch.ones(16, 3, 2, dtype=torch.bool),
        },
        [16],
    )
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


# NFT.


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


# PPO.


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


# Settings, and learning.


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
