"""The motion reward (AR-Drag, Eq. 16): does the touched point follow the drag?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metrics.anchor import anchored, touched
from metrics.motion import counted, drag_score
from rewards.base import RewardContext, RewardTerm, check_weight, finite_samples, per_latent_mean

if TYPE_CHECKING:
    from torch import Tensor

    from data.clip import ClipBatch
    from tracking.trackers import Tracker, Tracks

# name: (alpha, lambda). The paper gives neither; each has the ceiling alpha * lambda = 5
# that its tables imply.
PROFILES = {"paper": (0.1, 50.0), "train": (0.02, 250.0), "tight": (0.0025, 2000.0)}


@dataclass(frozen=True)
class Motion:
    """lambda * max(0, alpha - d^2), d the distance of asked and tracked position, in [0, 1] coordinates.

    A latent frame m > 0 averages its pixel frames 4m-3..4m and the tracks. Asked for but not visible scores
    0 (leaving it out would reward destroying the texture under the point); not asked for is left out. Which
    latent frames have the term depends on the control only; frame 0 never has it: there the tracker returns
    the query itself. A track that is absent in frame 0 has no touched point, so it is left out. What the tracker
    follows is what was touched: see `metrics.anchor`.

    Attributes:
        weight: factor in the weighted sum.
        profile: `paper`, `train` or `tight`: how far off the reward still sees a difference.
        alpha: squared distance at which the reward reaches 0; None takes the profile's.
        scale: lambda; None takes the profile's.
        support: points followed around the touched one, besides itself; the motion is what they agree on. 0
            follows the point alone.
        support_radius: their distance from the touched point in pixels.
        agreement: how support points are summarised, `median` or `mean`, over those that are visible.
    """

    weight: float = 1.0
    profile: str = "paper"
    alpha: float | None = None
    scale: float | None = None
    support: int = 0
    support_radius: float = 1.5
    agreement: str = "median"

    def __post_init__(self) -> None:
        check_weight("motion", self.weight)
        if self.profile not in PROFILES:
            raise ValueError(f"reward.motion.profile must be one of {', '.join(PROFILES)}, got {self.profile}")
        for name in ("alpha", "scale"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"reward.motion.{name} must be positive and finite, got {value}")
        if self.support < 0:
            raise ValueError(f"reward.motion.support must not be negative, got {self.support}")
        if not self.support_radius > 0:
            raise ValueError(f"reward.motion.support_radius must be positive, got {self.support_radius}")
        if self.agreement not in ("median", "mean"):
            raise ValueError(f"reward.motion.agreement must be median or mean, got {self.agreement}")

    @property
    def constants(self) -> tuple[float, float]:
        """(alpha, lambda)."""
        alpha, scale = PROFILES[self.profile]
        return (alpha if self.alpha is None else self.alpha, scale if self.scale is None else self.scale)

    def prepare(self, context: RewardContext) -> None:
        """Take the tracker, and have it load what it needs."""
        from tracking.trackers import make_ready

        make_ready(context.tracker, context.device)
        object.__setattr__(self, "_tracker", context.tracker)

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """See `Reward.score`. Logs pixels, shares (`foreign`: of samples whose frame 0 does not show what was
        touched), and what a frozen first frame would score.
        """
        tracker: Tracker | None = getattr(self, "_tracker", None)
        if tracker is None:
            raise ValueError("the motion reward has no tracker; call prepare(context) before score")
        asked = batch.trajectory.to(video.device)
        if video.shape[2:] != (asked.num_frames, asked.height, asked.width):
            raise ValueError(
                f"the video is {tuple(video.shape[2:])} but the drag was asked for "
                f"{asked.num_frames} frames of {asked.height}x{asked.width}"
            )
        counts = counted(asked)
        shown, foreign = anchored(video, batch.video[:, :, :1].to(video), asked, tracker)
        tracks = self._follow(tracker, shown, touched(asked))
        alpha, scale = self.constants
        finite = finite_samples(video)
        gain = drag_score(asked, tracks.xy, alpha, scale)
        value = per_latent_mean(gain.where(tracks.visible, 0), counts)
        valid = (finite[:, None] & value.isfinite()).contiguous()
        rest = counts & finite[:, None, None]
        static = per_latent_mean(drag_score(asked, asked.xy[:, :, :1].expand_as(asked.xy), alpha, scale), counts)
        metrics = {
            "error_px": _mean((tracks.xy - asked.xy).norm(dim=-1), rest & tracks.visible),
            "clipped": _mean((gain == 0).float(), rest & tracks.visible),
            "visible": _mean(tracks.visible.float(), rest),
            "foreign": float(foreign.float().mean()),
            "static": _mean(static, valid),
        }
        return RewardTerm(value.where(valid, 0), valid, metrics)

    def _follow(self, tracker: Tracker, video: Tensor, points: Tensor) -> Tracks:
        """Track `points [B, K, 2]`, each with its support points."""
        if self.support == 0:
            return tracker.track(video, points)
        ring = points.new_tensor(
            [[0.0, 0.0]] + [_on_circle(self.support_radius, i, self.support) for i in range(self.support)]
        )
        queries = points[:, :, None] + ring
        tracks = tracker.track(video, queries.flatten(1, 2))
        groups = (points.shape[1], 1 + self.support)
        return self._agree(points, queries, tracks, groups)

    def _agree(self, points: Tensor, queries: Tensor, tracks: Tracks, groups: tuple[int, int]) -> Tracks:
        """Move each point by what its visible support points agree on; visible where half of them are."""
        from tracking.trackers import Tracks

        shift = tracks.xy.unflatten(1, groups) - queries[:, :, :, None]
        seen = tracks.visible.unflatten(1, groups)
        hidden = shift.where(seen[..., None], float("nan"))
        moved = hidden.nanmedian(2).values if self.agreement == "median" else hidden.nanmean(2)
        moved = moved.where(seen.any(2)[..., None], shift[:, :, 0])
        share = seen.float().mean(2)
        return Tracks(points[:, :, None] + moved, share >= 0.5, tracks.confidence.unflatten(1, groups).mean(2))


def _on_circle(radius: float, i: int, n: int) -> list[float]:
    return [radius * math.cos(2 * math.pi * i / n), radius * math.sin(2 * math.pi * i / n)]


def _mean(value: Tensor, counts: Tensor) -> float:
    """Mean of `value` where `counts`; NaN where nothing counts (a number would be made up)."""
    return float(value[counts].mean()) if bool(counts.any()) else float("nan")
