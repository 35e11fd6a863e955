"""A pool of clips rendered once and kept as bytes, for supervised stages that visit each clip many times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from data.clip import ClipBatch, World

if TYPE_CHECKING:
    from torch import Tensor


class ClipPool:
    """Training clips of one bucket in memory: 100 kB a clip of 33 frames of 32x32.

    Args:
        world: where clips come from.
        bucket: frame size (H, W).
        indices: which clips of the split `train`.
    """

    def __init__(self, world: World, bucket: tuple[int, int], indices: Sequence[int]) -> None:
        parts = []
        for start in range(0, len(indices), 64):
            part = world.batch("train", indices[start : start + 64], bucket)
            parts.append(replace(part, video=to_bytes(part.video)))
        self._clips = ClipBatch.concat(parts)

    def __len__(self) -> int:
        return len(self._clips)

    def batch(self, rows: Sequence[int]) -> ClipBatch:
        """Clips by row; pixels are within half a grey level of the rendered ones."""
        picked = self._clips.select(rows)
        return replace(picked, video=from_bytes(picked.video))


def to_bytes(video: Tensor) -> Tensor:
    """[-1, 1] to uint8."""
    import torch

    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(video: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return video.float() / 127.5 - 1
