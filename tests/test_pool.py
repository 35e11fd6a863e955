"""Pools of encoded training clips: the same bits as ever, each clip once, and no more pixels in a call than fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from algorithms.distillation.pool import BLOCK, _together, encode_pool
from data.clip import ClipBatch
from data.draws import Stream, generator
from data.pool import ClipPool
from data.sprites import Sprites
from envs.control import heatmap
from runtime.models import Pretrained
from runtime.networks import Networks
from tracking.transforms import jittered

WORLD = Sprites(frames=5, sizes=["16x16", "16x24"], max_sprites=2)


@pytest.fixture(scope="module")
def networks(model: Path) -> Networks:
    return Pretrained(path=str(model)).load("cpu")


def encoded_as_before(
    networks: Networks, world: Sprites, bucket: tuple[int, int], count: int, first: int, track_noise: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, control and text of every row, 64 clips in one call each, as `encode_pool` made them once."""
    latents, drags, embeds = [], [], []
    for low in range(first, first + count, 64):
        indices = range(low, min(low + 64, first + count))
        clips = ClipPool(world, bucket, indices).batch(range(len(indices)))
        latents.append(networks.video.encode(clips.video))
        tracks = jittered(clips.trajectory, track_noise, generator(Stream.TRAINING, *bucket, low, 6))
        drags.append(networks.video.encode(heatmap(tracks, networks.video.stride)))
        embeds.append(networks.text.encode(clips.prompts))
    return torch.cat(latents), torch.cat(drags), torch.cat(embeds)


@pytest.mark.parametrize("track_noise", [0.0, 3.0])
def test_the_pool_of_the_embedded_world_has_the_same_bits_as_ever(networks: Networks, track_noise: float) -> None:
    bucket = WORLD.buckets[1]
    pool = encode_pool(WORLD, networks.video, networks.text, bucket, 70, first=3, track_noise=track_noise)
    latents, control, text = encoded_as_before(networks, WORLD, bucket, 70, 3, track_noise)
    for ours, theirs in zip((pool.latents, pool.control, pool.text), (latents, control, text), strict=True):
        assert torch.equal(ours, theirs)
    world = Sprites()
    assert all(_together(world, size, 0) == BLOCK for size in world.buckets), "also at its own sizes"
    rng = generator(Stream.TRAINING, 0, 15, 1)
    rows = rng.choice(70, 4, replace=False)
    drawn = pool.sample((0, 15, 1), 4)
    assert torch.equal(drawn[0], latents[rows]) and torch.equal(drawn[2], text[rows])
    assert torch.equal(drawn[1][:, :, -control.shape[2] :], control[rows])


@dataclass(frozen=True)
class Few:
    """A folder of five clips."""

    buckets: list[tuple[int, int]] = field(default_factory=lambda: WORLD.buckets)

    def size(self, split: str) -> int:
        return 5

    def batch(self, split: str, indices: Sequence[int], bucket: tuple[int, int]) -> ClipBatch:
        assert all(0 <= i < 5 for i in indices)
        return WORLD.batch(split, indices, bucket)


@pytest.mark.parametrize("track_noise", [0.0, 3.0])
def test_a_clip_is_encoded_once_and_a_call_holds_few_pixels(
    networks: Networks, track_noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, calls = WORLD.buckets[0], list[int]()
    plain = encode_pool(WORLD, networks.video, networks.text, bucket, 5)
    encode = networks.video.encode

    def counted(video: Tensor) -> Tensor:
        calls.append(video[:, 0].numel())
        return encode(video)

    monkeypatch.setattr(networks.video, "encode", counted)
    clip = 5 * 16 * 16
    monkeypatch.setattr("algorithms.distillation.pool.VAE_PIXELS", 2 * clip + 1)
    pool = encode_pool(Few(), networks.video, networks.text, bucket, 12, first=3, track_noise=track_noise)
    assert max(calls) == 2 * clip and sum(calls) == (5 + (12 if track_noise else 5)) * clip
    order = [(3 + row) % 5 for row in range(12)]
    torch.testing.assert_close(pool.latents, plain.latents[order[:5]], atol=1e-6, rtol=1e-5)
    assert pool.rows == 12 and len(pool.latents) == len(pool.text) == 5
    latents, condition, text = pool.sample((0, 15, 2), 12)
    rows = generator(Stream.TRAINING, 0, 15, 2).choice(12, 12, replace=False)
    clips = [order[row] for row in rows]
    torch.testing.assert_close(latents, plain.latents[clips])
    torch.testing.assert_close(text, plain.text[clips])
    drags = condition[:, :, -pool.control.shape[2] :]
    same = [bool((a - plain.control[i]).abs().max() < 1e-6) for a, i in zip(drags, clips, strict=True)]
    assert all(same) if track_noise == 0 else not any(same)
    assert len(drags.flatten(1).unique(dim=0)) == (5 if track_noise == 0 else 12), "errors are drawn for every row"
    monkeypatch.setattr("algorithms.distillation.pool.VAE_PIXELS", 1)
    calls.clear()
    encode_pool(Few(), networks.video, networks.text, bucket, 3)
    assert calls == [clip] * 6, "a clip that is too large goes alone"
