"""GRPO on real rollouts: it re-scores what was stored, is a TorchRL loss module, and learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from algorithms.grpo import GRPO
from algorithms.losses import masked_mean, step_weights
from algorithms.policy_loss import PolicyLoss
from envs.schedules import Single
from envs.transitions import CPS, gradient_scale
from tests.scored import rewarded, scored_rollout, setting, total
from tests.toy_training import trained


def test_prepare_drops_and_counts_groups() -> None:
    rollout = TensorDict(
        {
            "reward": torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 0.0], [0.0, 100.0]]),
            "valid": torch.tensor([[True, True], [True, True], [True, False], [True, True]]),
            "stochastic": torch.tensor([True, False]).expand(4, 2, 2).contiguous(),
            "key": torch.zeros(4, 4, dtype=torch.int64),
        },
        [4],
    )
    metrics = GRPO().prepare(rollout, 2)
    assert metrics == {"group_std": pytest.approx(math.sqrt(2)), "groups_dropped": 1.0}
    assert torch.equal(rollout["mask"][:2], rollout["stochastic"][:2]) and not rollout["mask"][2:].any()
    expected = math.sqrt(0.5) * math.sqrt(2) / (math.sqrt(2) + 0.05)
    torch.testing.assert_close(rollout["advantage"][:2], torch.tensor([[0.0, -expected], [0.0, expected]]))
    rollout["valid"][:] = False
    assert GRPO().prepare(rollout, 2)["groups_dropped"] == 2.0 and not rollout["mask"].any()


def test_prepare_shuffles_where_asked_by_iteration() -> None:
    def advantages(shuffle: bool, iteration: int) -> Tensor:
        rollout = rewarded(torch.arange(16.0).view(8, 2) ** 2)
        rollout["key"] = torch.tensor([[5, iteration, b // 4, b % 4] for b in range(8)])
        GRPO(shuffle_advantages=shuffle).prepare(rollout, 4)
        advantage: Tensor = rollout["advantage"]
        return advantage

    plain, first, second = advantages(False, 0), advantages(True, 0), advantages(True, 1)
    assert torch.equal(first, advantages(True, 0)) and not torch.equal(first, second)
    for a, b in zip(plain.split(4), first.split(4), strict=True):
        assert not torch.equal(a, b) and torch.equal(a, b[b[:, 0].argsort()])


def test_first_update_rescores_what_the_rollout_stored() -> None:
    """Ratio 1, no KL, nothing clipped: acting and re-scoring agree (compared with stored numbers)."""
    settings = GRPO()
    actor, module = setting(settings)
    rollout = scored_rollout(actor, settings)
    assert rollout["log_prob"].ne(0).eq(rollout["stochastic"]).all()
    losses = module(rollout)
    scores = actor.evaluate(rollout)["log_prob"]
    assert float(losses["log_prob_gap"]) == (scores - rollout["log_prob"]).abs().max().item()
    assert 0 <= float(losses["log_prob_gap"]) <= 1e-5
    assert float(losses["ratio_deviation"]) <= 1e-5
    assert float(losses["kl"]) <= 1e-9 and losses["loss_kl"].item() <= 1e-9
    assert float(losses["clip_fraction"]) == 0
    # A wrong stored number is noticed: the gap does not compare the module with itself.
    rollout["log_prob"][0, 1, 0] += 0.25
    assert float(module(rollout)["log_prob_gap"]) == pytest.approx(0.25, abs=1e-5)


def test_kl_grows_with_a_step_and_pulls_back() -> None:
    settings = GRPO(kl_weight=2.0)
    actor, module = setting(settings)
    rollout = scored_rollout(actor, settings)
    before = [p.detach().clone() for p in actor.parameters()]
    total(module(rollout)).backward()
    with torch.no_grad():
        for parameter in actor.parameters():
            parameter.sub_(0.05 * parameter.grad)
    actor.zero_grad()
    losses = module(rollout)
    assert float(losses["kl"]) > 1e-6
    assert losses["loss_kl"].item() == pytest.approx(2 * float(losses["kl"]))
    # By hand: half the squared distance of the means in standard deviations, over stochastic steps.
    assert module.reference is not None
    now, initial = actor.evaluate(rollout), module.reference.evaluate(rollout)
    chosen = rollout["stochastic"]
    distance = ((now["mean"] - initial["mean"])[chosen] / now["std"][chosen][:, None, None, None]).square()
    torch.testing.assert_close(losses["kl"], (distance.mean((1, 2, 3)) / 2).mean().detach())
    losses["loss_kl"].backward()
    pull = sum(float((p.grad * (p.detach() - b)).sum()) for p, b in zip(actor.parameters(), before, strict=True))
    assert pull > 0, "descending the KL moves the weights back"


def test_clip_range_means_the_same_at_every_latent_size() -> None:
    settings = GRPO(clip=0.32, step_rescaling=False)
    size = 32
    new = torch.full((1, 1, 1), math.log1p(2 * settings.clip / math.sqrt(size)))
    batch = {
        "log_prob": torch.zeros(1, 1, 1),
        "advantage": torch.ones(1, 1),
        "mask": torch.ones(1, 1, 1, dtype=torch.bool),
        "latents": torch.zeros(1, 1, 2, 2, 4, 4),
    }
    losses, metrics = settings.loss(TensorDict({"log_prob": new}), TensorDict(batch), CPS(), None)
    assert float(losses["objective"]) == pytest.approx(-(1 + 0.32 / math.sqrt(size)), abs=1e-6)
    assert losses.keys() == {"objective"} and "kl" not in metrics, "what was not measured is not logged"
    assert float(metrics["clip_fraction"]) == 1


def test_step_rescaling_weights_the_loss_not_the_ratio() -> None:
    actor, module = setting(GRPO())
    rollout = scored_rollout(actor, GRPO())
    even, plain = module(rollout), PolicyLoss(GRPO(step_rescaling=False), actor, None)(rollout)
    sigma = rollout["sigma"]
    weight = step_weights(gradient_scale(CPS(), sigma[..., :-1], sigma[..., 1:]), sigma[..., 1:] > 0)
    expected = -masked_mean(rollout["advantage"][..., None] * weight, rollout["mask"])
    torch.testing.assert_close(even["loss_objective"], expected, atol=1e-5, rtol=0)
    assert weight[0, 0, 0] != weight[0, 0, 1] and "loss_kl" in even.keys()  # noqa: SIM118
    for name in ("clip_fraction", "ratio_deviation", "kl_approx"):
        assert torch.equal(even[name], plain[name])


def test_is_a_loss_module_of_torchrl() -> None:
    settings = GRPO()
    actor, module = setting(settings)
    losses = module(scored_rollout(actor, settings))
    assert isinstance(losses, TensorDict) and losses.batch_size == torch.Size([])
    names = {key for key in losses.keys() if key.startswith("loss_")}  # noqa: SIM118
    assert names == {"loss_objective", "loss_kl"}
    assert all(losses[key].requires_grad == (key in names) for key in losses.keys())  # noqa: SIM118
    assert [id(p) for p in module.parameters()] == [id(p) for p in actor.parameters()]
    assert len(list(module.parameters())) == len({id(p) for p in module.parameters()})
    assert {f"actor.{key}" for key in actor.state_dict()} == set(module.state_dict())
    total(losses).backward()
    assert all(p.grad is not None for p in actor.parameters() if p.requires_grad)


def test_accumulated_halves_are_the_whole() -> None:
    settings = GRPO()
    actor, module = setting(settings)
    rollout = scored_rollout(actor, settings)

    def gradient(parts: list[TensorDict]) -> list[Tensor]:
        actor.zero_grad()
        for part in parts:
            (total(module(part)) / len(parts)).backward()
        return [p.grad.clone() for p in actor.parameters()]

    for whole, halves in zip(gradient([rollout]), gradient(list(rollout.split(4))), strict=True):
        torch.testing.assert_close(halves, whole, atol=1e-6, rtol=1e-4)


def test_epochs_and_minibatches_improve_the_surrogate() -> None:
    """Later passes are off-policy: the ratio leaves 1 and the loss falls."""
    settings = GRPO(epochs=2, minibatches=2)
    actor, module = setting(settings)
    rollout = scored_rollout(actor, settings, Single())
    optimizer = torch.optim.AdamW(actor.parameters(), lr=2e-4, weight_decay=0.0)
    with torch.no_grad():
        first = float(module(rollout)["loss_objective"])
    gaps = []
    for epoch in range(settings.epochs):
        for rows in torch.arange(8).roll(epoch).chunk(settings.minibatches):
            losses = module(rollout[rows])
            gaps.append(float(losses["ratio_deviation"]))
            optimizer.zero_grad()
            total(losses).backward()
            optimizer.step()
    assert gaps[0] <= 1e-5 and all(gap > 1e-4 for gap in gaps[1:])
    with torch.no_grad():
        assert float(module(rollout)["loss_objective"]) < first - 1e-4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip", 0.0),
        ("clip", math.nan),
        ("advantage_eps", -1.0),
        ("log_ratio_clamp", math.inf),
        ("kl_weight", -0.1),
        ("kl_weight", math.nan),
        ("epochs", 0),
        ("minibatches", 0),
        ("advantage_std", "sample"),
    ],
)
def test_bad_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^algorithm\.{name} must be [^\n]+$"):
        replace(GRPO(), **{name: value})


@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_learns_and_shuffled_advantages_do_not(seed: int) -> None:
    before, after = trained(GRPO(kl_weight=0.0), seed)
    assert after > 0.2 * before, f"reward {before:.3f} -> {after:.3f}: most of the error should be gone"
    start, control = trained(GRPO(kl_weight=0.0, shuffle_advantages=True), seed)
    assert control < 0.9 * start, f"reward {start:.3f} -> {control:.3f} with nothing to learn from"
