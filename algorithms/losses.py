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
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    clip: float,
    log_ratio_clamp: float,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss (AR-Drag Eq. 13-14), to be minimised.

    `- mean over stochastic (frame, step) pairs and samples of w min(r A, clip(r, 1 - c, 1 + c) A)`, `r =
    exp(log_ratio)`. Because log-probs are means over D latent values, r is the paper's ratio to the power 1 / D.

    Args:
        log_ratio: log-prob under the weights being trained less that under the weights that acted, `[B, M, N]`.
        advantage: broadcasts with it, such as `[B, M, 1]`.
        mask: the stochastic steps that take part, `[B, M, N]` bool.
        clip: half-width c of the trust region of r.
        log_ratio_clamp: log-ratios are limited to +- this before exp.
        weight: factor of a step's loss `[B, M, N]`; None is 1 everywhere.

    Returns:
        The scalar loss, and `clip_fraction`, `kl_approx` (the k3 estimator), `ratio_deviation` (largest |r - 1|).
    """
    log_ratio = torch.where(mask, log_ratio, 0.0).clamp(-log_ratio_clamp, log_ratio_clamp)
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
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


def guarded_log_ratio(log_ratio: Tensor, mean: Tensor, mean_old: Tensor, std: Tensor) -> Tensor:
    """Log-ratio `[B, M, N]`, centred and brought to one scale for all steps (GRPO-Guard, arXiv 2510.22319).

    `(log_ratio + mean over latent values of (mean - mean_old)^2 / (2 std^2)) std`: what is left is linear in the noise
    that was drawn, with mean 0 under the policy that acted.

    Args:
        log_ratio: of mean log-probs, `[B, M, N]`.
        mean, mean_old: of the kernels, `[B, M, N, C, h, w]`.
        std: `[B, M, N]`; where it is 0 the step is deterministic and the result 0.
    """
    random = std > 0
    safe = torch.where(random, std, 1.0)
    shift = (mean - mean_old).square().mean((-3, -2, -1)) / (2 * safe.square())
    return torch.where(random, (log_ratio + shift) * safe, 0.0)


def preference_loss(difference: Tensor, valid: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`- log sigmoid(difference)`, the mean over valid pairs (DPO, arXiv 2305.18290 Eq. 7).

    Args:
        difference: beta times how much more likely the preferred sample has become than the other, any shape.
        valid: pairs that count, same shape.

    Returns:
        The scalar loss, and `preference_accuracy` (share of pairs with a positive difference), `preference_margin`.
    """
    loss = masked_mean(-torch.nn.functional.logsigmoid(difference), valid)
    with torch.no_grad():
        metrics = {
            "preference_accuracy": masked_mean((difference > 0).float(), valid),
            "preference_margin": masked_mean(difference, valid),
        }
    return loss, metrics


def nft_loss(velocity: Tensor, old: Tensor, target: Tensor, advantage: Tensor, mask: Tensor, strength: float) -> Tensor:
    """DiffusionNFT's loss (arXiv 2509.16117 Eq. 5): `r |v+ - v|^2 + (1 - r) |v- - v|^2`, means over latent values.

    `v+ = (1 - b) v_old + b v_theta`, `v- = (1 + b) v_old - b v_theta`, `r = 1/2 + 1/2 clip(A, -1, 1)`. Where `v_theta =
    v_old` its gradient is `clip(A) b` times that of the flow matching loss.

    Args:
        velocity: of the policy being trained, v_theta, `[B, M, C, h, w]`.
        old: of the policy that acted, v_old.
        target: eps - x0, v.
        advantage: A, as a share of the largest, `[B, M]`.
        mask: frames that count, `[B, M]` bool.
        strength: b.
    """
    good = 0.5 + 0.5 * advantage.clamp(-1, 1)
    positive = (1 - strength) * old + strength * velocity
    negative = (1 + strength) * old - strength * velocity
    near, far = ((v - target).square().mean((2, 3, 4)) for v in (positive, negative))
    return masked_mean(good * near + (1 - good) * far, mask)


def step_weights(scale: Tensor, available: Tensor) -> Tensor:
    """Weights `mean(k) / k` that give every step the same gradient scale (facts of the kernel, not of the data).

    Args:
        scale: gradient scale k of each step, `[B, M, N]`.
        available: steps that may be stochastic, `[B, M, N]` bool; the mean of k is over those of a frame.
    """
    mean = torch.where(available, scale, 0.0).sum(-1, keepdim=True) / available.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(available, mean / torch.where(available, scale, 1.0), 0.0)
