"""Interpolators of the smoothness metric. Each has a name that stands beside every number made with it.

One that needs a package or a file says so in `check(assets)`, which is called before anything heavy loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor


class Interpolator(Protocol):
    """Makes the frames in the middle between given ones."""

    @property
    def name(self) -> str:
        """What the numbers are made with, such as `linear`."""
        ...

    def prepare(self, assets: Path, device: str) -> None:
        """Load what there is to load; called once."""
        ...

    def between(self, before: Tensor, after: Tensor) -> Tensor:
        """The frames between `before` and `after`, all `[B, 3, n, H, W]` in 0..255."""
        ...


@dataclass(frozen=True)
class Linear:
    """The mean of both neighbours: what moves far is seen twice there, so motion costs as much as unrest."""

    @property
    def name(self) -> str:
        """`linear`."""
        return "linear"

    def prepare(self, assets: Path, device: str) -> None:
        """Nothing to load."""

    def between(self, before: Tensor, after: Tensor) -> Tensor:
        """See `Interpolator.between`."""
        return (before + after) / 2


@dataclass(frozen=True)
class Flow:
    """Both neighbours moved half of the way towards each other along OpenCV's dense inverse search flow, then averaged.

    The flow of the middle is half the difference of the flows there and back, at the same pixel (as for motion that is
    locally even); what one neighbour covers and the other shows is a mixture.

    Attributes:
        short_edge: frames with a shorter edge are enlarged to at least this size to find the flow.
    """

    short_edge: int = 128

    def __post_init__(self) -> None:
        if self.short_edge < 16:
            raise ValueError(f"evaluation.interpolator.short_edge must be at least 16, got {self.short_edge}")

    @property
    def name(self) -> str:
        """`dis-flow:128`."""
        return f"dis-flow:{self.short_edge}"

    def prepare(self, assets: Path, device: str) -> None:
        """Nothing to load."""

    def between(self, before: Tensor, after: Tensor) -> Tensor:
        """See `Interpolator.between`. Runs on the CPU, frame by frame."""
        import numpy as np
        import torch

        sides = (side.float().permute(0, 2, 3, 4, 1).flatten(0, 1).cpu().numpy() for side in (before, after))
        made = [self._middle(a, b) for a, b in zip(*sides, strict=True)]
        frames = torch.from_numpy(np.stack(made)).unflatten(0, (len(before), -1))
        return frames.permute(0, 4, 1, 2, 3).to(before.device)

    def _middle(self, before: np.ndarray, after: np.ndarray) -> Any:
        """The frame between two `[H, W, 3]` float in 0..255."""
        import cv2
        import numpy as np

        height, width = before.shape[:2]
        half = (self._flow(before, after) - self._flow(after, before)) / 4
        y, x = np.mgrid[:height, :width].astype(np.float32)
        moved = [
            cv2.remap(
                frame,
                x + sign * half[..., 0],
                y + sign * half[..., 1],
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            for frame, sign in ((before, -1), (after, 1))
        ]
        return (moved[0] + moved[1]) / 2

    def _flow(self, first: np.ndarray, second: np.ndarray) -> Any:
        """Where each pixel of `first` goes in `second`: `[H, W, 2]` in pixels."""
        import cv2

        height, width = first.shape[:2]
        scale = max(1, -(-self.short_edge // min(height, width)))
        grey = [cv2.cvtColor(frame.round().astype("uint8"), cv2.COLOR_RGB2GRAY) for frame in (first, second)]
        large = [cv2.resize(g, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC) for g in grey]
        found = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(large[0], large[1], None)
        return cv2.resize(found, (width, height), interpolation=cv2.INTER_AREA) / scale
