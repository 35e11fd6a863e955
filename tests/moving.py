"""A textured disc that moves over a textured background: the smallest clip whose tracks are known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from data.clip import ClipBatch
from tracking.trajectory import Trajectory


def line(start: tuple[float, float], velocity: tuple[float, float], frames: int = 17) -> Tensor:
    """A straight path `[T, 2]`."""
    return torch.tensor(start) + torch.arange(frames)[:, None] * torch.tensor(velocity)


def texture(seed: int, cells: int) -> Tensor:
    """Smooth random colours `[1, 3, 64, 64]` in [-1, 1]."""
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.uniform(-1, 1, (1, 3, cells, cells)).astype(np.float32))
    return interpolate(noise, size=(64, 64), mode="bicubic").clamp(-1, 1)


def render(path: Tensor, size: tuple[int, int] = (32, 32), radius: float = 5.0, seed: int = 0) -> Tensor:
    """Video `[3, T, H, W]` of a disc of `radius` pixels whose centre follows `path [T, 2]`."""
    height, width = size
    skin, ground = texture(seed, 10), texture(seed + 1000, 5) * 0.5
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x, y], -1).float()
    back = grid_sample(ground, (pixels / max(size) * 2 - 1)[None], align_corners=True)[0]
    frames = []
    for centre in path:
        local = pixels - centre
        front = grid_sample(skin, (local / (2 * radius))[None], align_corners=True)[0]
        cover = (radius + 0.5 - local.norm(dim=-1)).clamp(0, 1)
        frames.append(back * (1 - cover) + front * cover)
    return torch.stack(frames, 1)


def carried(still: Tensor, other: Tensor, path: Tensor, radius: float, first: int) -> Tensor:
    """A clip `[3, T, H, W]` in which a disc of another one is carried along the path, from frame `first` on."""
    video = still.clone()
    for t in range(first, len(path)):
        near = (torch.hypot(*_offsets(video, path[t])) <= radius).expand(3, -1, -1)
        video[:, t][near] = other[:, t][near]
    return video


def ringed(still: Tensor, path: Tensor, hole: float, rim: float) -> Tensor:
    """A clip in which black and white wedges around an untouched square are carried along the path, from frame 0 on."""
    video = still.clone()
    for t in range(len(path)):
        x, y = _offsets(video, path[t].round())
        far = torch.maximum(x.abs(), y.abs())
        ring = ((far > hole) & (far <= rim)).expand(3, -1, -1)
        video[:, t][ring] = torch.sign(torch.sin(4 * torch.atan2(y, x) + 0.5)).expand(3, -1, -1)[ring]
    return video


def _offsets(video: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel `[H, W]` lies from a point, x and y."""
    height, width = video.shape[-2:]
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return x - centre[0], y - centre[1]


def asking(path: Tensor, size: tuple[int, int] = (32, 32), video: Tensor | None = None) -> ClipBatch:
    """A batch of one clip that asks for `path [T, 2]`."""
    frames = len(path)
    here = torch.ones(1, 1, frames, dtype=torch.bool)
    trajectory = Trajectory(path[None, None], here.float(), here, size[0], size[1], 8.0)
    clip = torch.zeros(3, frames, *size) if video is None else video
    return ClipBatch(clip[None], trajectory, ["a disc moves"], here, ["moving/0"], [""])
