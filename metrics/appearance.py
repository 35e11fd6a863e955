"""What pixels around a point look like, and how alike two such patches are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# SSIM's constants (Wang et al. 2004) for pixels in [0, 1].
C1, C2 = 0.01**2, 0.03**2


def patches(video: Tensor, xy: Tensor, radius: float) -> Tensor:
    """Square patches around points, sampled bilinearly; beyond the border the nearest pixel stands.

    Args:
        video: `[B, 3, T, H, W]`.
        xy: centres in pixels, `[B, K, T, 2]`.
        radius: half the side, pixels.

    Returns:
        `[B, K, T, 3, P * P]` with P = 2 ceil(radius) + 1.
    """
    import torch
    from torch.nn.functional import grid_sample

    side = 2 * math.ceil(radius) + 1
    line = torch.linspace(-radius, radius, side, device=video.device)
    offsets = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1)
    batch, _, frames = xy.shape[:3]
    size = torch.tensor([video.shape[4] - 1, video.shape[3] - 1], device=video.device).clamp(min=1)
    grid = (xy[:, :, :, None].float() + offsets) / size * 2 - 1  # [B, K, T, P * P, 2]
    grid = grid.transpose(1, 2).flatten(0, 1)
    images = video.float().transpose(1, 2).flatten(0, 1)
    found = grid_sample(images, grid, padding_mode="border", align_corners=True)  # [B * T, 3, K, P * P]
    return found.unflatten(0, (batch, frames)).permute(0, 3, 1, 2, 4)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of patches in [-1, 1] `[..., 3, n]`: one number per patch, the mean over colours."""
    a, b = a.float() / 2 + 0.5, b.float() / 2 + 0.5
    mean_a, mean_b = a.mean(-1), b.mean(-1)
    var_a, var_b = a.var(-1, unbiased=False), b.var(-1, unbiased=False)
    shared = (a * b).mean(-1) - mean_a * mean_b
    light = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return (light * (2 * shared + C2) / (var_a + var_b + C2)).mean(-1)
