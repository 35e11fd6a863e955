"""CLIP image embeddings of video frames, from a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from metrics.features import check_tower

# CLIP's own normalisation, used where the folder has no preprocessor_config.json.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipVision(nn.Module):
    """A frozen `CLIPVisionModelWithProjection` with its preprocessing.

    Args:
        folder: holds config.json and model.safetensors, as transformers writes them, and optionally
            preprocessor_config.json.

    Raises:
        FileNotFoundError: the folder holds no model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import CLIPVisionModelWithProjection

        check_tower(folder)
        self.model = CLIPVisionModelWithProjection.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        self.model.eval().requires_grad_(False)
        self.size: int = self.model.config.image_size
        settings = settings_of(folder)
        self.register_buffer("mean", torch.tensor(settings.get("image_mean", MEAN))[:, None, None])
        self.register_buffer("std", torch.tensor(settings.get("image_std", STD))[:, None, None])

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""
        return int(self.model.config.projection_dim)

    @torch.no_grad()
    def forward(self, frames: Tensor, batch: int = 256) -> Tensor:
        """Embed `frames [n, 3, H, W]` in [-1, 1]: `[n, D]` float32, not normalised."""
        parts = [self.model(pixel_values=self.pixels(part)).image_embeds.float() for part in frames.split(batch)]
        return torch.cat(parts) if parts else frames.new_zeros(0, self.width)

    def pixels(self, frames: Tensor) -> Tensor:
        """CLIP's preprocessing: short edge to the model's size, centre crop, normalise."""
        unit = ((frames.float().to(self.mean.device) + 1) / 2).clamp(0, 1)
        return ((square(unit, self.size).clamp(0, 1) - self.mean) / self.std).to(self.model.dtype)


def settings_of(folder: Path) -> dict[str, Any]:
    """What a folder's preprocessor_config.json says; nothing where there is none."""
    file = folder / "preprocessor_config.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def square(images: Tensor, size: int) -> Tensor:
    """Resize the short edge of `[n, 3, H, W]` to `size` (bicubic) and crop the centre to `size` x `size`."""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    resized = (max(size, round(height * scale)), max(size, round(width * scale)))
    if resized != (height, width):
        images = interpolate(images, size=resized, mode="bicubic", antialias=True)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    return images[..., top : top + size, left : left + size]
