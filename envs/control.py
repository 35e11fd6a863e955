"""Control: a trajectory drawn as a heatmap video, which the VAE encodes like any other video (AR-Drag section 3.2).

Drawing is frame by frame and the Wan VAE is causal in time, so encoding a prefix of a control is the prefix of its
encoding: a control can be given while the video is being generated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracking.trajectory import Trajectory

if TYPE_CHECKING:
    from torch import Tensor

MODES = ("presence", "grayscale")
# File beside a model's networks that names the mode they were trained on.
NOTE = "control.json"


def heatmap_width(height: int, width: int, vae_stride: int) -> float:
    """Standard deviation of a touch in pixels: 0.024 of the short edge, at least 0.6 VAE strides."""
    return max(0.024 * min(height, width), 0.6 * vae_stride)


def heatmap(trajectory: Trajectory, vae_stride: int, mode: str = "presence") -> Tensor:
    """Draw tracks as a video `[B, 3, T, H, W]` in [-1, 1].

    A touch is `exp(-d^2 / 2 s^2)` with peak 1; where tracks overlap the larger value counts. In mode `grayscale` (the
    paper's) all three channels hold intensity times touch. There zero means "no touch", "no force" and "unspecified"
    at once; mode `presence` keeps them apart: red is intensity times touch, green the touch alone, and blue tells
    whether any position is asked for in that frame.

    Raises:
        ValueError: unknown mode.
    """
    import torch

    if mode not in MODES:
        raise ValueError(f"unknown heatmap mode {mode!r}; choose one of {', '.join(MODES)}")
    height, width = trajectory.height, trajectory.width
    xy = trajectory.xy.float()[..., None, None, :]
    y = torch.arange(height, device=xy.device, dtype=torch.float32)[:, None]
    x = torch.arange(width, device=xy.device, dtype=torch.float32)
    squared = (x - xy[..., 0]) ** 2 + (y - xy[..., 1]) ** 2
    width_px = heatmap_width(height, width, vae_stride)
    present = trajectory.presence[..., None, None].float()
    touch = torch.exp(-squared / (2 * width_px**2)) * present
    force = (touch * trajectory.intensity[..., None, None]).amax(dim=1)
    if mode == "grayscale":
        planes = [force, force, force]
    else:
        asked = trajectory.presence.any(dim=1)[..., None, None].float().expand_as(force)
        planes = [force, touch.amax(dim=1), asked]
    return 2 * torch.stack(planes, dim=1) - 1


MASK_CHANNELS = 4
"""Pixel frames per latent frame: the mask of image-to-video Wan has a channel for each."""


def assemble_condition(reference: Tensor, control: Tensor, noise: Tensor) -> Tensor:
    """What each latent frame is conditioned on: `[B, M, 4 + 2C, h, w]` = mask, reference, control.

    The first frame sees the latent of the reference image under mask 1; later frames see noise in its place under
    mask 0 (AR-Drag section 3.2).

    Args:
        reference: latent of the reference image `[B, C, h, w]`.
        control: latents of the heatmap video `[B, M, C, h, w]`.
        noise: what stands in for the reference at m > 0, `[B, M, C, h, w]` (frame 0 of it is not used).
    """
    import torch

    mask = torch.zeros_like(control[:, :, :1]).repeat(1, 1, MASK_CHANNELS, 1, 1)
    mask[:, 0] = 1
    image = torch.cat([reference[:, None], noise[:, 1:]], dim=1)
    return torch.cat([mask, image, control], dim=2)


def restarted(condition: Tensor, reference: Tensor) -> Tensor:
    """The condition of a clip that begins with the first of these frames: mask 1 and its reference there.

    Args:
        condition: of the frames, `[B, M, 4 + 2C, h, w]`.
        reference: latent that the clip begins with, `[B, C, h, w]`.
    """
    import torch

    control = condition[:, :1, MASK_CHANNELS + reference.shape[1] :]
    mask = torch.ones_like(condition[:, :1, :MASK_CHANNELS])
    return torch.cat([torch.cat([mask, reference[:, None], control], dim=2), condition[:, 1:]], dim=1)
