"""Trajectories in another frame size, at another length, at another pace.

Everywhere pixel centres are integers, so a point x of a frame W pixels wide lies at (x + 0.5) / W of its
width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tracking.trajectory import Trajectory

if TYPE_CHECKING:
    import numpy as np


def cover_box(height: int, width: int, bucket: tuple[int, int]) -> tuple[int, int, int, int]:
    """The centred part (top, left, height, width) of a frame that has the shape of `bucket` = (H, W).

    Cropping to it and resizing to the bucket is what both videos and trajectories go through.
    """
    scale = min(height / bucket[0], width / bucket[1])
    inner = (min(height, max(1, round(bucket[0] * scale))), min(width, max(1, round(bucket[1] * scale))))
    return (height - inner[0]) // 2, (width - inner[1]) // 2, *inner


def resize(trajectory: Trajectory, height: int, width: int) -> Trajectory:
    """Stretch to another frame size; each axis by its own factor."""
    return _crop(trajectory, (0, 0, trajectory.height, trajectory.width), (height, width))


def to_bucket(trajectory: Trajectory, bucket: tuple[int, int]) -> Trajectory:
    """Centre-crop to the bucket's shape and resize, as a video is; what falls outside becomes absent."""
    moved = _crop(trajectory, cover_box(trajectory.height, trajectory.width, bucket), bucket)
    return replace(moved, presence=moved.presence & inside(moved))


def inside(trajectory: Trajectory) -> Tensor:
    """`[..., K, T]` bool: the position lies in the frame, [-0.5, W - 0.5) by [-0.5, H - 0.5)."""
    size = trajectory.xy.new_tensor([trajectory.width, trajectory.height])
    return ((trajectory.xy >= -0.5) & (trajectory.xy < size - 0.5)).all(-1)


def cut(trajectory: Trajectory, frames: int, start: int = 0, step: int = 1) -> Trajectory:
    """Keep `frames` frames from `start`, every `step`-th. A shorter trajectory stays shorter."""
    picks = slice(start, start + frames * step, step)
    return replace(
        trajectory,
        xy=trajectory.xy[..., picks, :],
        intensity=trajectory.intensity[..., picks],
        presence=trajectory.presence[..., picks],
        fps=trajectory.fps / step,
    )


def extend(trajectory: Trajectory, frames: int) -> Trajectory:
    """Append frames in which nothing is asked for, up to `frames`."""
    extra = max(0, frames - trajectory.num_frames)
    lead = trajectory.presence.shape[:-1]
    return replace(
        trajectory,
        xy=torch.cat([trajectory.xy, trajectory.xy[..., -1:, :].expand(*lead, extra, 2)], -2),
        intensity=torch.cat([trajectory.intensity, trajectory.intensity.new_zeros(*lead, extra)], -1),
        presence=torch.cat([trajectory.presence, trajectory.presence.new_zeros(*lead, extra)], -1),
    )


def resample_time(trajectory: Trajectory, frames: int) -> Trajectory:
    """Go through the same motion in `frames` frames, linearly between the given ones; first and last stay.

    A new position is asked for where both given ones around it are.
    """
    at = torch.linspace(0, trajectory.num_frames - 1, frames, dtype=torch.float64)
    low = at.floor().long()
    high = at.ceil().long()
    share = (at - low).to(trajectory.xy)
    xy, force, here = trajectory.xy, trajectory.intensity, trajectory.presence
    seconds = max(trajectory.num_frames - 1, 1) / trajectory.fps
    return replace(
        trajectory,
        xy=torch.lerp(xy[..., low, :], xy[..., high, :], share[:, None]),
        intensity=torch.lerp(force[..., low], force[..., high], share),
        presence=here[..., low] & here[..., high],
        fps=max(frames - 1, 1) / seconds,
    )


def resample_arc_length(trajectory: Trajectory, frames: int) -> Trajectory:
    """Go along the same path at constant speed: `frames` points at equal distances along it.

    Each track runs through its present positions; a track without any stays absent. A point that never
    moves stays. The duration in seconds stays.
    """
    lead = trajectory.presence.shape[:-1]
    rows = zip(
        trajectory.xy.flatten(0, -3),
        trajectory.intensity.flatten(0, -2),
        trajectory.presence.flatten(0, -2),
        strict=True,
    )
    paths = [_even(xy[here], force[here], frames) if bool(here.any()) else None for xy, force, here in rows]
    absent = trajectory.xy.new_zeros(frames, 3)
    points = torch.stack([absent if path is None else path for path in paths]).reshape(*lead, frames, 3)
    here = torch.tensor([path is not None for path in paths], device=points.device)
    seconds = max(trajectory.num_frames - 1, 1) / trajectory.fps
    return replace(
        trajectory,
        xy=points[..., :2],
        intensity=points[..., 2],
        presence=here.reshape(*lead, 1).expand(*lead, frames),
        fps=max(frames - 1, 1) / seconds,
    )


# Pixel frames between two independent errors of a weak tracker: one latent frame.
ERROR_SPACING = 4


def jittered(trajectory: Trajectory, std: float, rng: np.random.Generator) -> Trajectory:
    """Positions as a weak tracker finds them: off by normal errors of `std` pixels, drawn anew each latent frame.

    Between those frames the error changes linearly; the first position, the touch itself, stays exact. Presence stays.
    """
    lead, frames = trajectory.xy.shape[:-2], trajectory.num_frames
    knots = -(-(frames - 1) // ERROR_SPACING) + 1
    error = torch.from_numpy(rng.standard_normal((*lead, knots, 2), dtype="float32")) * std
    error[..., 0, :] = 0
    at = torch.arange(frames) / ERROR_SPACING
    low = at.floor().long()
    offset = torch.lerp(error[..., low, :], error[..., (low + 1).clamp(max=knots - 1), :], (at - low)[:, None])
    return replace(trajectory, xy=trajectory.xy + offset.to(trajectory.xy))


def _crop(trajectory: Trajectory, box: tuple[int, int, int, int], size: tuple[int, int]) -> Trajectory:
    top, left, height, width = box
    corner = trajectory.xy.new_tensor([left, top])
    factor = trajectory.xy.new_tensor([size[1] / width, size[0] / height])
    return replace(trajectory, xy=(trajectory.xy + 0.5 - corner) * factor - 0.5, height=size[0], width=size[1])


def _even(xy: Tensor, force: Tensor, frames: int) -> Tensor:
    """Points `[frames, 3]` (x, y, intensity) at equal distances along the polyline `xy [n, 2]`."""
    steps = (xy[1:] - xy[:-1]).norm(dim=-1).double()
    travelled = torch.cat([steps.new_zeros(1), steps.cumsum(0)])
    at = torch.linspace(0, float(travelled[-1]), frames, dtype=torch.float64, device=xy.device)
    high = torch.searchsorted(travelled, at).clamp(max=len(xy) - 1)
    low = (high - 1).clamp(min=0)
    gap = travelled[high] - travelled[low]
    share = ((at - travelled[low]) / gap.where(gap > 0, 1)).to(xy)[:, None]
    points = torch.cat([xy, force[:, None]], 1)
    return torch.lerp(points[low], points[high], share)
