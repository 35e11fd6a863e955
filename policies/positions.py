"""Which rotary positions the tokens of a frame get."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor


def absolute(rope: WanRotaryPosEmbed, first: int, frames: int, height: int, width: int) -> Tensor:
    """Rotations of frames `first .. first+frames-1` at their index in the whole video.

    Keys are rotated before they are cached, so a frame keeps its position for as long as it is held.

    Args:
        rope: the model's table, made by diffusers.
        height, width: tokens per column and row of a frame.

    Returns:
        complex64 `[frames * height * width, 1, head_dim / 2]`, to be multiplied with pairs of channels.

    Raises:
        ValueError: the video is longer than the table.
    """
    if first + frames > rope.max_seq_len:
        raise ValueError(
            f"frame {first + frames - 1} lies beyond the rotary table; rope_max_seq_len is {rope.max_seq_len}"
        )
    grid = (frames, height, width)
    starts = (first, 0, 0)
    parts = []
    for axis, size in enumerate((rope.t_dim, rope.h_dim, rope.w_dim)):
        offset = (0, rope.t_dim, rope.t_dim + rope.h_dim)[axis]
        rows = slice(starts[axis], starts[axis] + grid[axis])
        cos = rope.freqs_cos[rows, offset : offset + size : 2].float()
        sin = rope.freqs_sin[rows, offset : offset + size : 2].float()
        shape = [1, 1, 1, size // 2]
        shape[axis] = grid[axis]
        parts.append(torch.complex(cos, sin).view(shape).expand(*grid, -1))
    return torch.cat(parts, dim=-1).reshape(frames * height * width, 1, -1)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of `[B, L, heads, head_dim]` by `absolute`'s rotations."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).type_as(x)
