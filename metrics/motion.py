"""How far tracked points are from where they were asked to be, in pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from tracking.trackers import Tracks
    from tracking.trajectory import Trajectory


def endpoint_error(asked: Trajectory, found: Tracks) -> Tensor:
    """Distance `[B, K, T]` in pixels between asked and tracked positions."""
    return (found.xy - asked.xy).norm(dim=-1)


def counted(asked: Trajectory, found: Tracks | None = None, reference: Tensor | None = None) -> Tensor:
    """Positions `[B, K, T]` bool that a mean takes in: asked for, of a track there in frame 0, not frame 0.

    `found` leaves out what the tracker did not see; `reference [B, K, T]` (a true clip's `visible`) what
    cannot be seen even there. A mean over what was seen must stand beside the share that was seen, or
    losing points looks like a gain.
    """
    counts = asked.presence & asked.presence[..., :1]
    counts = counts.index_fill(-1, counts.new_zeros(1).long(), False)
    if found is not None:
        counts = counts & found.visible
    return counts if reference is None else counts & reference


def drag_score(asked: Trajectory, xy: Tensor, alpha: float, scale: float) -> Tensor:
    """How well positions follow the asked ones: `scale max(0, alpha - squared distance)`, `[B, K, T]` (AR-Drag Eq. 16).

    Coordinates are (x / (W - 1), y / (H - 1)). Over visible positions of true pixels this is the paper's motion
    consistency.

    Args:
        asked: where points were asked to be.
        xy: where they are, `[B, K, T, 2]` in pixels.
        alpha: squared distance at which it reaches 0.
        scale: its factor, lambda.
    """
    size = asked.xy.new_tensor([asked.width - 1, asked.height - 1])
    return scale * (alpha - ((xy - asked.xy) / size).square().sum(-1)).clamp(min=0)


def by_latent_frame(value: Tensor, counts: Tensor) -> Tensor:
    """Mean of `value [B, K, T]` over what `counts` for each latent frame after the first: `[M - 1]`, NaN for none."""
    weight = counts.to(value.dtype)[..., 1:].unflatten(-1, (-1, 4)).sum((0, 1, 3))
    return value.where(counts, 0)[..., 1:].unflatten(-1, (-1, 4)).sum((0, 1, 3)) / weight


def per_clip(value: Tensor, counts: Tensor) -> Tensor:
    """Mean of `value [B, K, T]` over what `counts`, per clip: `[B]`, NaN where nothing does."""
    weight = counts.to(value.dtype)
    return value.where(counts, 0).sum((1, 2)) / weight.sum((1, 2))
