"""Losses of step 1: values worked by hand, and DMD's gradient in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from algorithms.distillation.losses import (
    consistency_loss,
    discriminator_loss,
    dmd_loss,
    flow_matching_loss,
    generator_loss,
    gradient_penalty,
    ode_regression_loss,
)


def clip(*values: float) -> Tensor:
    """One sample with a frame for each value, all of its latent equal to it: `[1, M, 2, 1, 1]`."""
    return torch.tensor(values)[None, :, None, None, None].expand(1, len(values), 2, 1, 1).clone()


def random(seed: int) -> Tensor:
    return torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_flow_matching_by_hand() -> None:
    x0, eps = clip(2.0, 2.0), clip(-1.0, -1.0)
    assert float(flow_matching_loss(eps - x0, x0, eps)[0]) == 0
    assert float(flow_matching_loss(torch.zeros_like(x0), x0, eps)[0]) == 9
    # Frame 1 is off by 3 and frame 0 by 1.
    assert float(flow_matching_loss(clip(-2.0, 0.0), x0, eps)[0]) == 5


def test_regression_and_consistency_by_hand() -> None:
    x0, target = clip(1.0, 5.0).requires_grad_(True), clip(4.0, 1.0).requires_grad_(True)
    assert float(ode_regression_loss(x0, target)[0]) == 12.5
    assert float(consistency_loss(x0, target)[0]) == 12.5
    # sqrt(9 + 16) - 4 = 1 and sqrt(16 + 16) - 4.
    assert float(consistency_loss(x0, target, huber=4.0)[0]) == pytest.approx((1 + math.sqrt(32) - 4) / 2)
    for loss in (ode_regression_loss(x0, target)[0], consistency_loss(x0, target)[0]):
        assert torch.autograd.grad(loss, target, allow_unused=True)[0] is None


def test_dmd_by_hand() -> None:
    x0, real, fake = clip(1.0, 1.0), clip(3.0, 1.0), clip(5.0, 2.0)
    # mean |x0 - real| = 1, so g = (2, 1): half of (4 + 1) / 2.
    loss, metrics = dmd_loss(x0, real, fake, floor=0.0)
    assert float(loss) == pytest.approx(1.25)
    assert float(metrics["dmd_gradient"]) == pytest.approx(1.5)
    assert float(dmd_loss(real, real, real)[0]) == 0


def test_the_gradient_of_dmd_is_its_closed_form() -> None:
    x0, real, fake = random(0).requires_grad_(True), random(1).requires_grad_(True), random(2).requires_grad_(True)
    found, of_real, of_fake = torch.autograd.grad(dmd_loss(x0, real, fake)[0], [x0, real, fake], allow_unused=True)
    distance = (x0 - real).abs().mean((1, 2, 3, 4))
    expected = (fake - real) / (distance[:, None, None, None, None] + 1e-6) / x0.numel()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert of_real is None and of_fake is None


def test_the_adversarial_losses_by_hand() -> None:
    assert float(generator_loss(torch.zeros(4))[0]) == pytest.approx(math.log(2))
    assert float(generator_loss(torch.full((4,), 30.0))[0]) == pytest.approx(0, abs=1e-6)
    loss, metrics = discriminator_loss(torch.tensor([1.0, -1.0]), torch.tensor([-2.0, -2.0]))
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(1))) / 2 + math.log1p(math.exp(-2))
    assert float(loss) == pytest.approx(expected)
    assert float(metrics["discriminator_accuracy"]) == 0.75
    # At the optimum of a game that nobody can win both sides are at log 2.
    assert float(discriminator_loss(torch.zeros(5), torch.zeros(5))[0]) == pytest.approx(2 * math.log(2))


def test_the_gradient_penalty_estimates_the_squared_slope() -> None:
    slope = torch.tensor([3.0, -4.0])
    x, z = torch.zeros(20_000, 2), torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    found = float(gradient_penalty(x @ slope, (x + 0.1 * z) @ slope, std=0.1)[0])
    assert found == pytest.approx(25, rel=0.03)
