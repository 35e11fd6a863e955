"""What a point tracker is, what it returns, and the tracker that already knows the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tracks:
    """Where points were found.

    Attributes:
        xy: `[B, K, T, 2]` float32 pixel coordinates (x right, y down; pixel centres are integers).
        visible: `[B, K, T]` bool, the point was found in that frame.
        confidence: `[B, K, T]` in [0, 1].
    """

    xy: Tensor
    visible: Tensor
    confidence: Tensor


class Tracker(Protocol):
    """Follows points from frame 0 on."""

    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        """Follow `queries [B, K, 2]` (pixels, in frame 0) through `video [B, 3, T, H, W]` in [-1, 1].

        The position in frame 0 is the query itself. Every tracker here but `cotracker3` is causal: the tracks of the
        first frames of a video are the first frames of its tracks.
        """
        ...

    def reach(self, height: int, width: int) -> float:
        """Half the side in pixels of what it looks at around a point to know it again, at least 1.

        Where a policy's frame 0 shows something else there, tracking starts in the reference image
        (`metrics.anchor`).
        """
        ...


def make_ready(tracker: Tracker, device: str) -> None:
    """Load what a tracker needs, so that what is wrong with it shows before anything runs; most need nothing.

    Raises:
        ValueError: its weights are not what it takes.
    """
    prepare = getattr(tracker, "prepare", None)
    if prepare is not None:
        prepare(device)


def check_input(video: Tensor, queries: Tensor) -> None:
    """Raise ValueError unless shapes are `[B, 3, T, H, W]` and `[B, K, 2]` with one B."""
    if video.ndim != 5 or video.shape[1] != 3 or queries.ndim != 3 or queries.shape[-1] != 2:
        raise ValueError(
            f"a tracker takes video [B,3,T,H,W] and queries [B,K,2], "
            f"got {tuple(video.shape)} and {tuple(queries.shape)}"
        )
    if video.shape[0] != queries.shape[0]:
        raise ValueError(f"{video.shape[0]} videos but queries for {queries.shape[0]}; one row of queries per video")


@dataclass(frozen=True)
class Truth:
    """Returns tracks that are known already; an oracle for tests and for the ground-truth row of a table.

    Attributes:
        xy: `[B, K, T, 2]` pixels.
        visible: `[B, K, T]` bool; None means always.
    """

    xy: Tensor
    visible: Tensor | None = None

    def reach(self, height: int, width: int) -> float:
        """See `Tracker.reach`: it looks at nothing."""
        return 1.0

    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        """Return the known tracks, cut to the video's length. See `Tracker.track`."""
        import torch

        check_input(video, queries)
        xy = self.xy[:, :, : video.shape[2]]
        known = torch.ones(xy.shape[:-1], dtype=torch.bool) if self.visible is None else self.visible
        visible = known[:, :, : video.shape[2]]
        return Tracks(xy, visible, visible.float())
