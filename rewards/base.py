"""What a reward is and what it returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from data.clip import ClipBatch
    from tracking.trackers import Tracker


class RewardFailed(RuntimeError):
    """A reward could not be computed for a whole batch (a server is down, say). It never counts as zero."""


@dataclass(frozen=True)
class RewardContext:
    """What rewards may use.

    Attributes:
        device: where networks go, such as `cpu` or `cuda:0`.
        tracker: the point tracker that rewards (never the one that evaluates).
        assets: folder of the embedded weights.
    """

    device: str
    tracker: Tracker
    assets: Path


@dataclass(frozen=True)
class RewardTerm:
    """The result of one reward.

    Attributes:
        value: `[B, M]`, one unweighted number per latent frame; 0 where the frame has no such term.
        valid: `[B, M]` bool, False where the number could not be computed.
        metrics: what to log beside it.
    """

    value: Tensor
    valid: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


class Reward(Protocol):
    """One thing that is good about a video. A frozen dataclass whose first field is `weight`.

    One that needs files or packages may have `check(assets)`, which looks for them before anything heavy loads.
    """

    @property
    def weight(self) -> float:
        """Factor in the weighted sum."""
        ...

    def prepare(self, context: RewardContext) -> None:
        """Load what scoring needs; called once."""
        ...

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """Score `video [B, 3, T, H, W]` in [-1, 1] against what `batch` asked for.

        Of the true clips in `batch.video` only frame 0 may be looked at.
        """
        ...


def check_weight(name: str, weight: float) -> None:
    """Raise ValueError unless `weight` is finite."""
    if not math.isfinite(weight):
        raise ValueError(f"reward.{name}.weight must be finite, got {weight}")


def are_metrics(found: object) -> bool:
    """Whether these are numbers by name."""
    return isinstance(found, dict) and all(isinstance(value, (int, float)) for value in found.values())


def latent_frames(length: int) -> int:
    """Number of latent frames M of `length` pixel frames T = 1 + 4 (M - 1).

    Raises:
        ValueError: the length is not of that form.
    """
    if length < 1 or length % 4 != 1:
        raise ValueError(f"a video has 1 + 4 k frames (latent frame m covers frames 4m-3..4m), got {length}")
    return 1 + (length - 1) // 4


def finite_samples(video: Tensor) -> Tensor:
    """Samples `[B]` of `video [B, 3, T, H, W]` whose pixels are all finite."""
    return video.isfinite().flatten(1).all(1)


def per_latent_mean(value: Tensor, counts: Tensor) -> Tensor:
    """Average `value [B, K, T]` over tracks and the pixel frames 4m-3..4m of each latent frame m: `[B, M]`.

    `counts [B, K, T]` bool says which entries take part; a latent frame with none gets 0.
    """
    from torch.nn.functional import pad

    blocks = latent_frames(value.shape[-1])

    def fold(x: Tensor) -> Tensor:
        return pad(x, (3, 0)).unflatten(-1, (blocks, 4)).sum((1, 3))

    weight = counts.to(value.dtype)
    return fold(value.where(counts, 0)) / fold(weight).clamp(min=1)
