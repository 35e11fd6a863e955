"""Advantages and the clipped surrogate: values worked out by hand, and TorchRL as a second opinion."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss

from algorithms.advantages import group_advantage, group_valid, shuffle_in_groups, without_history
from algorithms.losses import clipped_surrogate, masked_mean, step_weights
from envs.transitions import CPS, FlowSDE, gradient_scale, log_prob


def test_group_advantage_by_hand() -> None:
    reward = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 6.0], [6.0, 6.0]])
    # Frame 0: mean 3, squares 4 + 1 + 0 + 9 = 14; frame 1: mean 3, squares 36.
    unbiased = group_advantage(reward, 4, "unbiased", eps=0.5)
    torch.testing.assert_close(unbiased[:, 0], torch.tensor([-2.0, -1.0, 0.0, 3.0]) / (math.sqrt(14 / 3) + 0.5))
    torch.testing.assert_close(unbiased[:, 1], torch.tensor([-3.0, -3.0, 3.0, 3.0]) / (math.sqrt(36 / 3) + 0.5))
    biased = group_advantage(reward, 4, "biased", eps=1e-6)
    torch.testing.assert_close(biased[:, 1], torch.tensor([-1.0, -1.0, 1.0, 1.0]))
    # The convention alone changes the scale by 15 % at G = 4.
    ratio = biased / group_advantage(reward, 4, "unbiased", eps=1e-6)
    torch.testing.assert_close(ratio[reward != 3], torch.full((7,), math.sqrt(4 / 3)), atol=1e-5, rtol=0)


def test_groups_are_their_own() -> None:
    reward = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    whole = group_advantage(reward, 4)
    for g in range(3):
        rows = slice(4 * g, 4 * g + 4)
        torch.testing.assert_close(whole[rows], group_advantage(reward[rows] + g, 4), atol=1e-3, rtol=0)
        torch.testing.assert_close(whole[rows].mean(0), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_a_group_without_spread_has_no_advantage(size: int) -> None:
    """Exactly: the mean of equal numbers is rounded, and a small eps would blow the rounding up."""
    reward = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(size, 0)
    assert torch.equal(group_advantage(reward, size, eps=1e-8), torch.zeros_like(reward))


def test_history_is_taken_out_by_hand() -> None:
    reward = torch.tensor([[0.0, 1.0], [2.0, 5.0], [10.0, 3.0], [14.0, 5.0]])
    # Deviations before: -1, 1 | -2, 2; now: -2, 2 | -1, 1. beta = (2 + 2 + 2 + 2) / (1 + 1 + 4 + 4).
    whole = torch.ones(4, 2, dtype=torch.bool)
    torch.testing.assert_close(without_history(reward, reward, whole, 2)[:, 1], reward[:, 1] - 0.8 * reward[:, 0])
    assert torch.equal(without_history(reward, reward, whole, 2)[:, 0], reward[:, 0])
    # The second group does not count: beta is that of the first, 4 / 2.
    some = whole & (torch.arange(4) < 2)[:, None]
    torch.testing.assert_close(without_history(reward, reward, some, 2)[:, 1], reward[:, 1] - 2 * reward[:, 0])
    flat = torch.ones(4, 3)
    assert torch.equal(without_history(flat, flat, torch.ones(4, 3, dtype=torch.bool), 2), flat)


def test_history_baseline_keeps_the_policy_gradient_and_lowers_its_noise() -> None:
    """Actions add up: R[m] = sum of a[k] for k <= m. The score-function gradient of frame m's own action is 1."""
    actions = torch.randn(4096, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward = actions.cumsum(-1).flatten(0, 1)
    valid = torch.ones_like(reward, dtype=torch.bool)
    plain, residual = reward, without_history(reward, reward, valid, 8).double()
    score = actions.flatten(0, 1)  # d log N(a; mu, 1) / d mu
    estimates = [(score * r)[:, -1].unflatten(0, (-1, 8)).mean(1) for r in (plain, residual)]
    for estimate in estimates:
        assert abs(estimate.mean() - 1) < 4 * estimate.std() / 64
    # Variance of score * R[5] is 7 with the history in it and 2 without.
    assert estimates[1].var() < 0.4 * estimates[0].var()


def test_group_valid_drops_whole_groups() -> None:
    valid = torch.ones(6, 3, dtype=torch.bool)
    valid[3, 1] = False
    assert group_valid(valid, 2).tolist() == [[True] * 3] * 2 + [[False] * 3] * 2 + [[True] * 3] * 2
    assert group_valid(valid, 3)[:3].all() and not group_valid(valid, 3)[3:].any()


def test_shuffling_keeps_the_rows_of_each_group() -> None:
    advantage = torch.arange(64.0).view(32, 2)
    shuffled = shuffle_in_groups(advantage, 8, seed=3)
    assert torch.equal(shuffled, shuffle_in_groups(advantage, 8, seed=3))
    assert not torch.equal(shuffled, shuffle_in_groups(advantage, 8, seed=4))
    orders = set()
    for before, after in zip(advantage.split(8), shuffled.split(8), strict=True):
        order = after[:, 0].argsort()
        assert torch.equal(after[order], before), "whole rows, of the same group"
        orders.add(tuple(order.tolist()))
    assert len(orders) == 4, "every group is shuffled in its own way"


@pytest.mark.parametrize(
    ("size", "std", "message"),
    [
        (1, "biased", "groups of 2 or more"),
        (4, "biased", "divide 6 samples"),
        (3, "sample", "std convention"),
    ],
)
def test_bad_groups_are_refused(size: int, std: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantage(torch.zeros(6, 2), size, std)


def test_clipped_surrogate_by_hand() -> None:
    """Ratios 1.2, 1.2, 0.8, 0.8 against advantages 1, -1, 1, -1, with clip 0.1."""
    ratio = torch.tensor([1.2, 1.2, 0.8, 0.8])[:, None, None]
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    mask = torch.ones(4, 1, 1, dtype=torch.bool)
    new = ratio.log().requires_grad_()
    loss, metrics = clipped_surrogate(new, advantage[..., None], mask, 0.1, 5.0)
    # min(rA, clip(r)A) = 1.1, -1.2, 0.8, -0.9: clipping is one-sided, a pessimistic bound.
    assert loss.item() == pytest.approx(-(1.1 - 1.2 + 0.8 - 0.9) / 4, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, new)
    # Where clipping is active there is no gradient; elsewhere -rA / 4.
    torch.testing.assert_close(gradient.flatten(), torch.tensor([0.0, 0.3, -0.2, 0.0]))
    assert float(metrics["clip_fraction"]) == 1.0
    assert float(metrics["ratio_deviation"]) == pytest.approx(0.2, abs=1e-6)
    k3 = (0.2 - math.log(1.2) + -0.2 - math.log(0.8)) / 2
    assert float(metrics["kl_approx"]) == pytest.approx(k3, abs=1e-6)


def test_log_ratio_is_clamped() -> None:
    new = torch.tensor([100.0, -100.0])[:, None, None].requires_grad_()
    mask = torch.ones(2, 1, 1, dtype=torch.bool)
    loss, _ = clipped_surrogate(new, torch.tensor([-1.0, 1.0])[:, None, None], mask, 0.1, 2.0)
    assert loss.item() == pytest.approx((math.exp(2) - math.exp(-2)) / 2, rel=1e-5)
    assert torch.autograd.grad(loss, new)[0].abs().max() == 0


def test_masked_steps_enter_neither_gradient_nor_metrics() -> None:
    draw = torch.Generator().manual_seed(0)
    shape = (4, 3, 3)
    mask = torch.rand(shape, generator=draw) < 0.5
    old, advantage = torch.randn(shape, generator=draw), torch.randn(4, 3, generator=draw)
    step = 0.2 * torch.randn(shape, generator=draw)
    new = (old + step).requires_grad_()
    loss, metrics = clipped_surrogate(new - old, advantage[..., None], mask, 0.1, 5.0)
    (gradient,) = torch.autograd.grad(loss, new)
    assert torch.equal(gradient[~mask], torch.zeros_like(gradient[~mask])) and gradient[mask].abs().max() > 0
    # What stands at masked places does not matter, not even infinities and NaN of dead rewards.
    dead = mask.clone()
    dead[0] = False
    spoilt = torch.where(dead, new.detach(), math.inf).requires_grad_()
    poisoned = torch.where(torch.arange(4)[:, None] == 0, math.nan, advantage)
    loss2, metrics2 = clipped_surrogate(spoilt - old, poisoned[..., None], dead, 0.1, 5.0)
    (gradient2,) = torch.autograd.grad(loss2, spoilt)
    kept = [t[dead].flatten()[:, None, None] for t in (new.detach(), old, advantage[..., None].expand(shape))]
    everything = torch.ones_like(kept[0], dtype=torch.bool)
    expected, expected_metrics = clipped_surrogate(kept[0] - kept[1], kept[2], everything, 0.1, 5.0)
    torch.testing.assert_close(loss2.detach(), expected)
    assert gradient2.isfinite().all() and gradient2[~dead].abs().max() == 0
    for name, value in expected_metrics.items():
        torch.testing.assert_close(metrics2[name], value)
    assert metrics["clip_fraction"] > 0
    none = torch.zeros_like(mask)
    empty, _ = clipped_surrogate(new - old, advantage[..., None], none, 0.1, 5.0)
    assert empty.item() == 0 and torch.autograd.grad(empty, new)[0].abs().max() == 0


def test_masked_mean() -> None:
    value, mask = torch.tensor([1.0, math.nan, 5.0]), torch.tensor([True, False, True])
    assert float(masked_mean(value, mask)) == 3.0


@pytest.mark.parametrize("kernel", [CPS(), FlowSDE()], ids=lambda kernel: kernel.name)
def test_step_weights_even_the_gradient_out(kernel: Any) -> None:
    """The root mean square of d log-prob / d v is k / D; weighted it is the same at every step."""
    sigma = torch.tensor([1.0, 0.755, 0.522, 0.0]).expand(1, 1, 4)
    now, later = sigma[..., :-1], sigma[..., 1:]
    k = gradient_scale(kernel, now, later)
    weight = step_weights(k, later > 0)
    torch.testing.assert_close(weight[0, 0, :2], k[0, 0, :2].mean() / k[0, 0, :2])
    assert weight[0, 0, 2] == 0
    assert not torch.isclose(k[0, 0, 0], k[0, 0, 1], rtol=0.2), "there is something to even out"
    size = 100_000
    draw = torch.Generator().manual_seed(0)
    norms = []
    for n in range(2):
        x, noise = torch.randn(2, 1, 1, size, generator=draw)
        v = torch.randn(1, 1, size, generator=draw).requires_grad_()
        mean, std = kernel.moments(x, v, now[0, 0, n], later[0, 0, n])
        value = log_prob((mean + std * noise).detach(), mean, std)
        (gradient,) = torch.autograd.grad(value * weight[0, 0, n], v)
        norms.append(float(gradient.norm()) * math.sqrt(size))
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    assert norms[0] == pytest.approx(float(k[0, 0, :2].mean()), rel=0.02)


class MeanNormal(torch.distributions.Distribution):
    """What TorchRL needs to know of a kernel: a Gaussian whose log-prob is ours."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012  torch's own class attribute

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape[:-3], loc.shape[-3:], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        return log_prob(value, self.loc, self.scale)


def test_equals_clip_ppo_of_torchrl() -> None:
    """Value and gradient, on the same tensors, clipped on both sides for both signs of advantage."""
    draw = torch.Generator().manual_seed(0)
    count, latent, clip = 64, (2, 4, 4), 0.01
    state, noise = torch.randn(2, count, *latent, generator=draw)
    net = nn.Conv2d(2, 2, 3, padding=1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    std = torch.full((count, 1, 1, 1), 0.5)
    with torch.no_grad():
        action = net(state) + std * noise
        old = log_prob(action, net(state), std)
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=draw))
    advantage = torch.randn(count, generator=draw)

    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["state"], ["loc"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=MeanNormal, return_log_prob=True
        ),
    )
    theirs = ClipPPOLoss(actor, critic_network=None, clip_epsilon=clip, entropy_bonus=False, functional=False)
    theirs.set_keys(sample_log_prob="old")
    data = {"state": state, "scale": std, "action": action, "old": old, "advantage": advantage[:, None]}
    out = theirs(TensorDict(data, [count]))

    new = log_prob(action, net(state), std)
    everything = torch.ones(count, 1, 1, dtype=torch.bool)
    ours, metrics = clipped_surrogate((new - old)[:, None, None], advantage[:, None, None], everything, clip, 5.0)
    for side in (new - old > math.log1p(clip), new - old < math.log1p(-clip)):
        assert (side & (advantage > 0)).any() and (side & (advantage < 0)).any()
    assert 0 < float(metrics["clip_fraction"]) < 1
    torch.testing.assert_close(ours, out["loss_objective"], atol=1e-6, rtol=0)
    torch.testing.assert_close(metrics["clip_fraction"], out["clip_fraction"], atol=1e-6, rtol=0)
    expected = torch.autograd.grad(out["loss_objective"], list(net.parameters()))
    found = torch.autograd.grad(ours, list(net.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
