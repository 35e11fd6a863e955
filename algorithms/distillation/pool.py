"""Training clips, encoded once and drawn by key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.draws import Stream, generator
from data.pool import ClipPool
from envs.control import MODES, assemble_condition, heatmap
from policies.codecs import VideoCodec
from policies.features import TextEncoder
from tracking.transforms import jittered

if TYPE_CHECKING:
    from data.clip import World


@dataclass(frozen=True)
class LatentPool:
    """Encoded training clips of one bucket: `latents, control [n, M, C, h, w]`, `text [n, L, D]`."""

    latents: Tensor
    control: Tensor
    text: Tensor

    def sample(self, rng_key: tuple[int, ...], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `count` clips: latents, condition `[B, M, Cc, h, w]` and text."""
        rng = generator(Stream.TRAINING, *rng_key)
        rows = torch.from_numpy(rng.choice(len(self.latents), count, replace=False))
        latents, control, text = self.latents[rows], self.control[rows], self.text[rows]
        noise = torch.from_numpy(rng.standard_normal(tuple(latents.shape), dtype="float32")).to(latents.device)
        return latents, assemble_condition(latents[:, 0], control, noise), text


def encode_pool(
    world: World,
    video: VideoCodec,
    text: TextEncoder,
    bucket: tuple[int, int],
    count: int,
    first: int = 0,
    track_noise: float = 0.0,
    control: str = MODES[0],
) -> LatentPool:
    """Render and encode training clips `first .. first + count - 1` of one frame size.

    Args:
        world: gives the clips.
        video, text: encoders.
        bucket: height and width in pixels.
        count: number of clips.
        first: index of the first.
        track_noise: standard deviation in pixels of the errors of the tracks that control is drawn from; clips and
            captions stay exact.
        control: how paths are drawn.
    """
    latents, drags, embeds = [], [], []
    size = world.size("train")
    for low in range(first, first + count, 64):
        indices = [i if size is None else i % size for i in range(low, min(low + 64, first + count))]
        clips = ClipPool(world, bucket, indices).batch(range(len(indices)))
        latents.append(video.encode(clips.video))
        tracks = jittered(clips.trajectory, track_noise, generator(Stream.TRAINING, *bucket, low, 6))
        drags.append(video.encode(heatmap(tracks, video.stride, control)))
        embeds.append(text.encode(clips.prompts))
    return LatentPool(torch.cat(latents), torch.cat(drags), torch.cat(embeds))
