"""Appearance of the touched object against the reference frame: it should stay what it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metrics.anchor import anchored, touched
from metrics.appearance import patches, ssim
from metrics.motion import counted
from rewards.base import RewardContext, RewardTerm, check_weight, finite_samples, per_latent_mean

if TYPE_CHECKING:
    from torch import Tensor

    from data.clip import ClipBatch
    from tracking.trackers import Tracker


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
        """Take the tracker, and have it load what it needs."""
        from tracking.trackers import make_ready

        make_ready(context.tracker, context.device)
        object.__setattr__(self, "_tracker", context.tracker)

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """See `Reward.score`. Logs the similarity where the point is visible."""
        import torch

        tracker: Tracker | None = getattr(self, "_tracker", None)
        if tracker is None:
            raise ValueError("the identity reward has no tracker; call prepare(context) before score")
        asked = batch.trajectory.to(video.device)
        counts = counted(asked)
        points, first = touched(asked), batch.video[:, :, :1].to(video)
        tracks = tracker.track(anchored(video, first, asked, tracker)[0], points)
        now = patches(video, tracks.xy, self.radius)
        similarity = ssim(now, patches(first, points[:, :, None], self.radius))
        finite = finite_samples(video)
        value = per_latent_mean(similarity.where(tracks.visible, 0), counts)
        valid = (finite[:, None] & value.isfinite()).contiguous()
        seen = similarity[counts & tracks.visible & finite[:, None, None]]
        mean = float(seen.mean()) if len(seen) else float("nan")
        return RewardTerm(torch.where(valid, value, 0.0), valid, {"similarity": mean})
