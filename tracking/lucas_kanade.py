"""Pyramidal Lucas-Kanade with a forward-backward check: the tracker that evaluates and never rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracking.trackers import Tracks, check_input

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class LucasKanade:
    """OpenCV's sparse optical flow from frame to frame, corrected against frame 0.

    Each step follows the point from the previous frame, then from frame 0 with that result as the first
    guess, which takes out drift. A step holds when following it back ends within `tolerance` of where it
    began. A lost point goes on with its last velocity, slowing down, is looked for from frame 0 there, and
    counts as invisible until it is found.

    Attributes:
        window: side of the matching window in pixels of the enlarged frame (odd).
        levels: pyramid levels above the full size.
        short_edge: frames with a shorter edge are enlarged to at least this size first.
        tolerance: largest forward-backward error in pixels of the original frame.
        similarity: smallest correlation in [-1, 1] of the patch found with the patch in frame 0.
    """

    window: int = 47
    levels: int = 2
    short_edge: int = 128
    tolerance: float = 1.0
    similarity: float = 0.2

    def __post_init__(self) -> None:
        if self.window < 3 or self.window % 2 == 0:
            raise ValueError(f"tracker.window must be odd and at least 3, got {self.window}")
        if self.levels < 0:
            raise ValueError(f"tracker.levels must not be negative, got {self.levels}")
        if self.short_edge < 1:
            raise ValueError(f"tracker.short_edge must be positive, got {self.short_edge}")
        if not self.tolerance > 0:
            raise ValueError(f"tracker.tolerance must be positive, got {self.tolerance}")
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"tracker.similarity must be in [-1, 1], got {self.similarity}")

    def reach(self, height: int, width: int) -> float:
        """See `Tracker.reach`: the matching window of the full size."""
        return math.ceil(self.window / 2 / self._scale(height, width))

    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        """Follow points; see `Tracker.track`. Runs on the CPU, clip by clip."""
        import numpy as np
        import torch

        check_input(video, queries)
        pixels = ((video.detach().float().nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().byte()
        clips = pixels.permute(0, 2, 3, 4, 1).cpu().numpy()
        starts = queries.detach().float().cpu().numpy()
        rows = [self._clip(clip, start) for clip, start in zip(clips, starts, strict=True)]
        xy, visible, confidence = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return Tracks(xy.to(queries.device), visible.to(queries.device), confidence.to(queries.device))

    def _scale(self, height: int, width: int) -> int:
        """How many times frames are enlarged."""
        return max(1, -(-self.short_edge // min(height, width)))

    def _clip(self, clip: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Track `start [K, 2]` through a clip `[T, H, W, 3]` uint8: `[K, T, 2]`, `[K, T]`, `[K, T]`."""
        import numpy as np

        length, height, width = clip.shape[:3]
        scale = self._scale(height, width)
        # the centre of pixel i lies at scale * (i + 0.5) - 0.5 of the enlarged frame
        images = [_enlarged(frame, scale) for frame in clip]
        origin = ((start + 0.5) * scale - 0.5).astype(np.float32)
        point, velocity = origin.copy(), np.zeros_like(origin)
        positions, seen, scores = [start], [np.ones(len(start), bool)], [np.ones(len(start), np.float32)]
        for t in range(1, length):
            step, step_error = self._follow(images[t - 1], images[t], point, point)
            moving = step_error <= self.tolerance * scale
            guess = np.where((moving & seen[-1])[:, None], step, point + velocity)
            direct, direct_error = self._follow(images[0], images[t], origin, guess)
            near = np.linalg.norm(direct - guess, axis=-1) <= 2 * scale
            held = (direct_error <= self.tolerance * scale) & (near | ~seen[-1])
            place = np.where(held[:, None], direct, guess)
            pairs = zip(origin, place, strict=True)
            alike = np.array([_similarity(images[0], images[t], a, b, self.window) for a, b in pairs])
            error = np.where(held, direct_error, step_error) / scale
            xy = (place + 0.5) / scale - 0.5
            inside = ((xy >= -0.5) & (xy <= np.array([width, height]) - 0.5)).all(-1)
            visible = (held | (moving & seen[-1])) & inside & (alike >= self.similarity)
            new = np.where(visible[:, None], place, point + velocity).astype(np.float32)
            fresh = (visible & seen[-1])[:, None]
            velocity = np.where(fresh, (velocity + new - point) / 2, 0.9 * velocity).astype(np.float32)
            point = new
            positions.append((point + 0.5) / scale - 0.5)
            seen.append(visible)
            scores.append(np.where(visible, np.exp(-error), 0).astype(np.float32))
        return np.stack(positions, 1).astype(np.float32), np.stack(seen, 1), np.stack(scores, 1)

    def _follow(self, first: Any, second: Any, points: np.ndarray, guess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where `points [K, 2]` go from one image to another, and the forward-backward error `[K]`."""
        import cv2
        import numpy as np

        if len(points) == 0:
            return points, np.zeros(0, np.float32)
        settings: dict[str, Any] = {
            "winSize": (self.window, self.window),
            "maxLevel": self.levels,
            "criteria": (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 0.01),
            "flags": cv2.OPTFLOW_USE_INITIAL_FLOW,
        }
        column = (-1, 1, 2)
        points, guess = points.astype(np.float32), guess.astype(np.float32)
        there, found, _ = cv2.calcOpticalFlowPyrLK(
            first, second, points.reshape(column), guess.reshape(column).copy(), **settings
        )
        back, returned, _ = cv2.calcOpticalFlowPyrLK(second, first, there, points.reshape(column).copy(), **settings)
        error = np.linalg.norm(back.reshape(-1, 2) - points, axis=-1)
        lost = (found.ravel() == 0) | (returned.ravel() == 0)
        return there.reshape(-1, 2), np.where(lost, np.inf, error)


def _enlarged(frame: np.ndarray, scale: int) -> Any:
    """`frame [H, W, 3]` uint8, `scale` times as large. In colour: many sprites differ from their ground in hue only."""
    import cv2

    return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


def _similarity(first: Any, second: Any, a: np.ndarray, b: np.ndarray, side: int) -> float:
    """Correlation of the patches around `a` in `first` and `b` in `second`; 0 where one is flat."""
    import cv2

    p = cv2.getRectSubPix(first, (side, side), tuple(map(float, a))).astype(float)
    q = cv2.getRectSubPix(second, (side, side), tuple(map(float, b))).astype(float)
    p, q = p - p.mean((0, 1)), q - q.mean((0, 1))
    norm = float((p**2).sum() * (q**2).sum()) ** 0.5
    return float((p * q).sum()) / norm if norm > 0 else 0.0
