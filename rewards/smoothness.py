"""Temporal smoothness (named under AR-Drag's Eq. 12): frames change at an even pace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewards.base import RewardContext, RewardTerm, check_weight, finite_samples, per_latent_mean

if TYPE_CHECKING:
    from torch import Tensor

    from data.clip import ClipBatch


@dataclass(frozen=True)
class Smoothness:
    """1 minus the mean absolute difference of a frame from the middle of its neighbours, pixels in [0, 1].

    The interpolator is linear, where VBench uses a network. A static clip scores 1, so never use it alone.
    Frame t is judged with frames t-2 and t-1 only, so a latent frame's value never depends on later ones.

    Attributes:
        weight: factor in the weighted sum.
        scale: factor of the difference; larger makes the term steeper.
    """

    weight: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_weight("smoothness", self.weight)
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"reward.smoothness.scale must be positive and finite, got {self.scale}")

    def prepare(self, context: RewardContext) -> None:
        """Nothing to load."""

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """See `Reward.score`. Frame 0 has no such term."""
        import torch
        from torch.nn.functional import pad

        pixels = video.float() / 2
        jerk = (pixels[:, :, :-2] / 2 + pixels[:, :, 2:] / 2 - pixels[:, :, 1:-1]).abs().mean((1, 3, 4))
        value = pad(1 - self.scale * jerk, (2, 0))[:, None]  # [B, 1, T], indexed by the last of the three frames
        counts = torch.ones_like(value, dtype=torch.bool)
        counts[..., :2] = False
        mean = per_latent_mean(value, counts)
        valid = finite_samples(video)[:, None].expand(mean.shape) & mean.isfinite()
        return RewardTerm(mean.where(valid, 0), valid)
