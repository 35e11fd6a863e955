"""Training clips, encoded once and drawn by key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.draws import Stream, generator
from data.pool import from_bytes, to_bytes
from envs.control import MODES, assemble_condition, heatmap
from policies.codecs import VideoCodec
from policies.features import TextEncoder
from tracking.trajectory import Trajectory
from tracking.transforms import jittered

if TYPE_CHECKING:
    from data.clip import World


# Most pixels (clips x frames x height x width) of one VAE call. The encoder takes four frames at a time, so its widest
# map at Wan's size, 96 channels of float32, is 0.8 GB for clips of 33 frames. 64 embedded clips are one call.
VAE_PIXELS = 2**24
# Clips whose prompts are encoded, and whose errors of the tracks are drawn, together.
BLOCK = 64


@dataclass(frozen=True)
class LatentPool:
    """Encoded training clips of one bucket, each distinct one once.

    Attributes:
        latents: of the `d` distinct clips, `[d, M, C, h, w]`.
        control: `[d, M, C, h, w]`, or `[rows, M, C, h, w]` where the tracks of every row have errors of their own.
        text: `[d, L, D]`.
        rows: what is drawn from; row i is clip i modulo d.
    """

    latents: Tensor
    control: Tensor
    text: Tensor
    rows: int

    def sample(self, rng_key: tuple[int, ...], count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `count` rows: latents, condition `[B, M, Cc, h, w]` and text."""
        rng = generator(Stream.TRAINING, *rng_key)
        rows = torch.from_numpy(rng.choice(self.rows, count, replace=False))
        latents, control, text = (part[rows % len(part)] for part in (self.latents, self.control, self.text))
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
        world: gives the clips; where it has fewer they come again, but are encoded once.
        video, text: encoders.
        bucket: height and width in pixels.
        count: number of rows.
        first: index of the first.
        track_noise: standard deviation in pixels of the errors of the tracks that control is drawn from, drawn for
            every row; clips and captions stay exact.
        control: how paths are drawn.
    """
    size = world.size("train")
    distinct = count if size is None else min(count, size)
    indices = [i if size is None else i % size for i in range(first, first + distinct)]
    together = _together(world, bucket, indices[0])
    latents, prompts, paths = list[Tensor](), list[str](), list[Trajectory]()
    for low in range(0, distinct, together):
        clips = world.batch("train", indices[low : low + together], bucket)
        latents.append(video.encode(from_bytes(to_bytes(clips.video))))
        prompts += clips.prompts
        paths += [clips.trajectory.row(i) for i in range(len(clips))]
    embeds = [text.encode(prompts[low : low + BLOCK]) for low in range(0, distinct, BLOCK)]
    drags, rows = list[Tensor](), count if track_noise > 0 else distinct
    for low in range(0, rows, BLOCK):
        asked = Trajectory.stack([paths[i % distinct] for i in range(low, min(low + BLOCK, rows))])
        tracks = jittered(asked, track_noise, generator(Stream.TRAINING, *bucket, first + low, 6))
        drags += _drawn(tracks, video, control, together)
    return LatentPool(torch.cat(latents), torch.cat(drags), torch.cat(embeds), count)


def _together(world: World, bucket: tuple[int, int], index: int) -> int:
    """How many clips, as long as the clip at `index`, one VAE call may take."""
    frames = world.batch("train", [index], bucket).video.shape[2]
    return min(BLOCK, max(1, VAE_PIXELS // (frames * bucket[0] * bucket[1])))


def _drawn(tracks: Trajectory, video: VideoCodec, mode: str, together: int) -> list[Tensor]:
    """Latents of the heatmaps of tracks `[B, K, T]`, `together` rows at a time."""
    rows = [tracks.row(i) for i in range(len(tracks.xy))]
    parts = (Trajectory.stack(rows[low : low + together]) for low in range(0, len(rows), together))
    return [video.encode(heatmap(part, video.stride, mode)) for part in parts]
