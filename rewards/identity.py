"""Appearance of the touched object against the reference frame: it should stay what it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metrics.motion import counted
from rewards.base import RewardContext, RewardTerm, check_weight, finite_samples, per_latent_mean

if TYPE_CHECKING:
    from torch import Tensor

    from data.clip import ClipBatch
    from tracking.trackers import Tracker

# SSIM's constants (Wang et al. 2004) for pixels in [0, 1].
C1, C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Identity:
    """Structural similarity of the patch around the tracked point with the patch that was touched.

    Luminance, contrast and structure enter, colour by colour, so drifting colours, blur and a destroyed texture all
    lower it. A static clip scores 1: never use it alone. Where a point was asked for but is not visible it scores 0.
    Which frames have the term depends on the control only, and frame 0 never has it.

    Attributes:
        weight: factor in the weighted sum.
        radius: half the side of the patch, pixels.
    """

    weight: float = 1.0
    radius: float = 3.0

    def __post_init__(self) -> None:
        check_weight("identity", self.weight)
        if not (math.isfinite(self.radius) and self.radius >= 1):
            raise ValueError(f"reward.identity.radius must be at least 1 pixel, got {self.radius}")

    def prepare(self, context: RewardContext) -> None:
        """Take the tracker."""
        object.__setattr__(self, "_tracker", context.tracker)

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """See `Reward.score`. Logs the similarity where the point is visible."""
        import torch

        tracker: Tracker | None = getattr(self, "_tracker", None)
        if tracker is None:
            raise ValueError("the identity reward has no tracker; call prepare(context) before score")
        asked = batch.trajectory.to(video.device)
        counts = counted(asked)
        points = asked.xy[:, :, 0].where(asked.presence[:, :, 0, None], 0)
        tracks = tracker.track(video, points)
        now = patches(video, tracks.xy, self.radius)
        touched = patches(batch.video[:, :, :1].to(video), points[:, :, None], self.radius)
        similarity = ssim(now, touched)
        finite = finite_samples(video)
        value = per_latent_mean(similarity.where(tracks.visible, 0), counts)
        valid = (finite[:, None] & value.isfinite()).contiguous()
        seen = similarity[counts & tracks.visible & finite[:, None, None]]
        mean = float(seen.mean()) if len(seen) else float("nan")
        return RewardTerm(torch.where(valid, value, 0.0), valid, {"similarity": mean})


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
