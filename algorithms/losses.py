"""Policy-gradient losses as pure functions.

Shapes: B samples, M latent frames, N denoising steps. Log-probs are means over latent dimensions, float32, and 0 at
deterministic steps, which `mask` leaves out of every mean.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(value: Tensor, mask: Tensor) -> Tensor:
    """Mean of `value` over True entries of `mask`; 0 (with gradient 0) where there are none."""
    return torch.where(mask, value, 0.0).sum() / mask.sum().clamp(min=1)


def clipped_surrogate(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: float,
    log_ratio_clamp: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss (AR-Drag Eq. 13-14), to be minimised.

    `- mean over stochastic (frame, step) pairs and samples of w min(r A, clip(r, 1 - c, 1 + c) A)`, `r = exp(log_prob -
    log_prob_old)`. Because log-probs are means over D latent values, r is the paper's ratio to the power 1 / D.

    Args:
        log_prob: under the weights being trained, `[B, M, N]`.
        log_prob_old: under the weights that acted, `[B, M, N]`.
        advantage: `[B, M]`.
        mask: the stochastic steps that take part, `[B, M, N]` bool.
        clip: half-width c of the trust region of r.
        log_ratio_clamp: log-ratios are limited to +- this before exp.
        weight: factor of a step's loss `[B, M, N]`; None is 1 everywhere.

    Returns:
        The scalar loss, and `clip_fraction`, `kl_approx` (the k3 estimator), `ratio_deviation` (largest |r - 1|).
    """
    log_ratio = torch.where(mask, log_prob - log_prob_old, 0.0).clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()
    gain = advantage[..., None]
    surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)
    if weight is not None:
        surrogate = surrogate * weight
    with torch.no_grad():
        outside = ((ratio - 1).abs() > clip).float()
        metrics = {
            "clip_fraction": masked_mean(outside, mask),
            "kl_approx": masked_mean(ratio - 1 - log_ratio, mask),
            "ratio_deviation": (ratio - 1).abs().max(),
        }
    return -masked_mean(surrogate, mask), metrics


def step_weights(scale: Tensor, available: Tensor) -> Tensor:
    """Weights `mean(k) / k` that give every step the same gradient scale (facts of the kernel, not of the data).

    Args:
        scale: gradient scale k of each step, `[B, M, N]`.
        available: steps that may be stochastic, `[B, M, N]` bool; the mean of k is over those of a frame.
    """
    mean = torch.where(available, scale, 0.0).sum(-1, keepdim=True) / available.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(available, mean / torch.where(available, scale, 1.0), 0.0)
