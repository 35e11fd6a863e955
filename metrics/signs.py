"""Signs of reward hacking: cheap numbers of generated videos that honest learning changes little."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

_SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8


def signs(video: Tensor, group: int) -> dict[str, float]:
    """Edge density, motion magnitude and diversity of a batch.

    Args:
        video: `[B, 3, T, H, W]` in [-1, 1]; samples of a group stand together.
        group: samples of a group, dividing B.

    Returns:
        `edges`: mean slope of brightness, per pixel (noise and grids raise it, blur lowers it). `motion`: mean absolute
        change from frame to frame (a frozen clip has 0). `diversity`: mean standard deviation of a pixel inside a group
        (0 where all samples are one), absent for groups of one. All for pixels in [0, 1].
    """
    pixels = video.float() / 2 + 0.5
    kernel = _SOBEL.to(pixels)
    grey = pixels.mean(1).flatten(0, 1)[:, None]
    slopes = conv2d(grey, torch.stack([kernel, kernel.T])[:, None])
    found = {
        "edges": float(slopes.square().sum(1).sqrt().mean()),
        "motion": float(pixels.diff(dim=2).abs().mean()),
    }
    if group > 1:
        found["diversity"] = float(pixels.unflatten(0, (-1, group)).std(1).mean())
    return found
