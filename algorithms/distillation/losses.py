"""Losses of step 1 (AR-Drag section 3.2) as pure functions.

Shapes: B samples, M latent frames, `[B, M, C, h, w]` latents. Each returns the scalar loss and what to log. Means are
over everything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = tuple[Tensor, dict[str, Tensor]]


def flow_matching_loss(velocity: Tensor, x0: Tensor, eps: Tensor) -> Loss:
    """Mean squared error of the velocity against `eps - x0` (AR-Drag Eq. 7)."""
    loss = (velocity - (eps - x0)).square().mean()
    return loss, {"flow_matching": loss.detach()}


def ode_regression_loss(x0: Tensor, target: Tensor) -> Loss:
    """Mean squared error of a prediction against the end of the teacher's ODE from the same noise (CausVid, 4.3)."""
    loss = (x0 - target.detach()).square().mean()
    return loss, {"ode_regression": loss.detach()}


def consistency_loss(x0: Tensor, target: Tensor, huber: float = 0.0) -> Loss:
    """Distance between predictions from two points of one ODE path (consistency distillation).

    Args:
        x0: prediction from the noisier point.
        target: prediction from the cleaner point, by averaged weights; carries no gradient.
        huber: 0 is the mean squared error; c > 0 is `sqrt(mean d^2 + c^2) - c` of a frame's difference d (pseudo-Huber,
            arXiv 2310.14189 Eq. 7, per latent value).
    """
    squared = (x0 - target.detach()).square()
    if huber > 0:
        squared = (squared.flatten(2).mean(-1) + huber**2).sqrt() - huber
    loss = squared.mean()
    return loss, {"consistency": loss.detach()}


def dmd_loss(x0: Tensor, real: Tensor, fake: Tensor, floor: float = 1e-6) -> Loss:
    """Distribution matching (DMD, arXiv 2311.18828 Eq. 7; AR-Drag Alg. 1).

    `1/2 MSE(x0, stopgrad(x0 - g))` with `g = (fake - real) / (mean |x0 - real| + floor)`, whose gradient in x0 is
    g over the number of values.

    Args:
        x0: what the student generated.
        real: x0 that the teacher predicts from a noised copy of it.
        fake: x0 that the model of the student's own clips predicts from the same copy.
        floor: keeps the normaliser from 0.
    """
    with torch.no_grad():
        scale = (x0 - real).abs().flatten(1).mean(-1) + floor
        gradient = (fake - real) / scale[:, None, None, None, None]
    loss = 0.5 * (x0 - (x0 - gradient).detach()).square().mean()
    return loss, {"dmd": loss.detach(), "dmd_gradient": gradient.abs().mean(), "dmd_distance": scale.mean()}


def generator_loss(fake_logits: Tensor) -> Loss:
    """The generator's side of the adversarial game, `softplus(-D(fake))` (non-saturating)."""
    loss = F.softplus(-fake_logits).mean()
    return loss, {"adversarial": loss.detach()}


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Loss:
    """The discriminator's side, `softplus(-D(real)) + softplus(D(fake))`."""
    loss = F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()
    right = torch.cat([(real_logits > 0).flatten(), (fake_logits < 0).flatten()]).float().mean()
    return loss, {"discriminator": loss.detach(), "discriminator_accuracy": right}


def gradient_penalty(logits: Tensor, perturbed: Tensor, std: float) -> Loss:
    """Squared slope of the discriminator, `mean ((D(x + std z) - D(x)) / std)^2` for standard normal z.

    R1 on true clips, R2 on generated ones; without second derivatives, which fused attention does not have
    (arXiv 2501.08316, section 3.3). Its expectation tends to the squared gradient norm as std goes to 0.
    """
    loss = ((perturbed - logits) / std).square().mean()
    return loss, {"gradient_penalty": loss.detach()}
