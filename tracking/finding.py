"""Finding points in a real clip that are worth dragging: textured, moving, and trackable to the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tracking.lucas_kanade import LucasKanade

if TYPE_CHECKING:
    from tracking.trajectory import Trajectory

# Who followed the points: the same tracker as a judge agrees with itself.
FOUND_BY = LucasKanade.__name__
# A point is reliable when the tracker sees it in this share of the frames.
RELIABLE = 0.8
# Corners looked at per clip, and how far from the frame's edge and from each other points are, in pixels.
CORNERS, MARGIN, APART = 64, 2.0, 3.0


def find_points(frames: NDArray[np.uint8], count: int, fps: float) -> list[tuple[Trajectory, NDArray[np.bool_]]]:
    """Find up to `count` points in `frames [T, H, W, 3]`, best first; none where nothing can be tracked.

    Candidates are corners of frame 0, followed by Lucas-Kanade with a forward-backward check. Reliable ones
    come before others, then those that move farther. Each is a one-track trajectory and the frames `[1, T]`
    in which it was seen: asked for until it is lost for good, interpolated where it is hidden.
    """
    import torch

    corners = _corners(frames[0])
    if len(corners) == 0:
        return []
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    found = LucasKanade().track(video, torch.from_numpy(corners)[None])
    xy, visible = found.xy[0].numpy(), found.visible[0].numpy()
    reach = np.where(visible, np.linalg.norm(xy - xy[:, :1], axis=-1), 0).max(1)
    reliable = visible.mean(1) >= RELIABLE
    order = np.lexsort((-reach, -visible.mean(1) * ~reliable, ~reliable))
    chosen: list[int] = []
    for i in order:
        if len(chosen) < count and all(np.linalg.norm(corners[i] - corners[j]) >= APART for j in chosen):
            chosen.append(int(i))
    return [(_trajectory(xy[i], visible[i], frames.shape[1:3], fps), visible[None, i]) for i in chosen]


def _corners(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Well-textured points `[n, 2]` of `frame [H, W, 3]`, in pixels. Small frames are enlarged for this."""
    import cv2

    scale = max(1, round(128 / min(frame.shape[:2])))
    gray = cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    mask = np.zeros_like(gray)
    edge = round(MARGIN * scale)
    mask[edge:-edge, edge:-edge] = 255
    points = cv2.goodFeaturesToTrack(gray, CORNERS, 0.02, 1.5 * scale, mask=mask, blockSize=max(3, scale))
    if points is None:
        return np.zeros((0, 2), np.float32)
    return ((points.reshape(-1, 2) + 0.5) / scale - 0.5).astype(np.float32)


def _trajectory(xy: NDArray[np.float32], visible: NDArray[np.bool_], size: tuple[int, ...], fps: float) -> Trajectory:
    import torch

    from tracking.trajectory import Trajectory

    time, seen = np.arange(len(xy)), np.flatnonzero(visible)
    path = np.stack([np.interp(time, seen, xy[seen, axis]) for axis in (0, 1)], -1).astype(np.float32)
    limit = np.array([size[1] - 1, size[0] - 1], np.float32)
    here = torch.from_numpy(time <= seen[-1])[None]
    return Trajectory(torch.from_numpy(path.clip(0, limit))[None], here.float(), here, size[0], size[1], fps)
