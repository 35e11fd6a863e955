"""Motion smoothness in the manner of VBench."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from metrics.interpolators import Interpolator


def smoothness(video: Tensor, interpolator: Interpolator) -> Tensor:
    """Smoothness `[B]` of `video [B, 3, T, H, W]` in [-1, 1]: drop odd frames, interpolate, compare.

    `(255 - mean |odd - interpolated|) / 255` on values 0..255. VBench's interpolator is a network (AMT), so only values
    of one interpolator compare. A static clip scores 1. An odd last frame has no right neighbour and is left out.

    Args:
        video: the clips.
        interpolator: makes the frames between the even ones.

    Raises:
        ValueError: fewer than three frames.
    """
    if video.shape[2] < 3:
        raise ValueError(f"smoothness needs 3 frames or more, got {video.shape[2]}")
    pixels = (video.float().clamp(-1, 1) + 1) * 127.5
    even, odd = pixels[:, :, ::2], pixels[:, :, 1::2]
    between = interpolator.between(even[:, :, :-1], even[:, :, 1:])
    difference = (odd[:, :, : between.shape[2]] - between).abs().mean((1, 2, 3, 4))
    return (255 - difference) / 255
