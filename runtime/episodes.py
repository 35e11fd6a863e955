"""Episode starts: which clips an iteration works on, their conditions, schedules and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDict

from data.clip import ClipBatch, World
from data.draws import Stream, generator
from envs.ar_video import start
from envs.schedules import Schedule, draw_batch
from runtime.networks import Networks
from runtime.settings import Rollout

# Worlds that render on demand have no end; an iteration draws its clips from this many.
ENDLESS = 1_000_000


@dataclass(frozen=True)
class Episodes:
    """Builds episode starts; a pure function of its arguments.

    Attributes:
        world: where clips come from.
        networks: encode reference, control and prompt.
        rollout: sizes, noise table, sharing of noise.
        schedule: which steps are stochastic.
        device: torch device.
    """

    world: World
    networks: Networks
    rollout: Rollout
    schedule: Schedule
    device: str

    def training(self, seed: int, iteration: int, rank: int = 0, ranks: int = 1) -> tuple[TensorDict, ClipBatch]:
        """Start of a training iteration: P clips of one size, each G times, `[B]`, and the clips, repeated likewise.

        Of several processes each gets P / ranks of the clips, by their number; whatever is drawn for a clip depends on
        its number alone.
        """
        rng = generator(Stream.DATA, seed, iteration)
        bucket = self.world.buckets[int(rng.integers(len(self.world.buckets)))]
        size = self.world.size("train") or ENDLESS
        # Clips of one iteration differ from each other unless there are too few.
        indices = rng.choice(size, self.rollout.prompts, replace=size < self.rollout.prompts)
        share = self.rollout.prompts // ranks
        mine = indices[rank * share : (rank + 1) * share]
        clips = self.world.batch("train", [int(i) for i in mine], bucket)
        return self.begin(clips, self.rollout.group_size, seed, iteration, first_prompt=rank * share)

    def begin(
        self, clips: ClipBatch, group_size: int, seed: int, iteration: int, first_prompt: int = 0
    ) -> tuple[TensorDict, ClipBatch]:
        """Start of episodes for given clips; prompt p of the iteration is `first_prompt` + row."""
        prompts = range(first_prompt, first_prompt + len(clips))
        condition = self.networks.condition(clips, [(seed, iteration, p) for p in prompts], self.device)
        text = self.networks.text.encode(clips.prompts)
        image = self.networks.image_tokens(clips, self.device)
        repeated = clips.repeat(group_size)
        key = torch.tensor([[seed, iteration, p, g] for p in prompts for g in range(group_size)])
        frames = condition.shape[1]
        sigma = torch.tensor(self.rollout.sigmas).expand(frames, -1)
        state = start(
            condition.repeat_interleave(group_size, dim=0),
            text.repeat_interleave(group_size, dim=0),
            sigma,
            draw_batch(self.schedule, sigma, key),
            key,
            self.networks.video.latent_shape(clips.trajectory.height, clips.trajectory.width),
            self.rollout.share_initial_noise,
            None if image is None else image.repeat_interleave(group_size, dim=0),
        )
        return state, repeated


def fixed_clips(world: World, split: str, count: int) -> list[ClipBatch]:
    """The first `count` clips of a split, spread evenly over the frame sizes, one batch per size.

    Raises:
        ValueError: the split holds fewer.
    """
    buckets = world.buckets
    size = world.size(split)
    shares = [count // len(buckets) + (i < count % len(buckets)) for i in range(len(buckets))]
    if size is not None and max(shares) > size:
        raise ValueError(
            f"evaluation.clips={count}: the {split} split holds {size} clips; use at most {size * len(buckets)}"
        )
    return [world.batch(split, _first(n), bucket) for n, bucket in zip(shares, buckets, strict=True) if n]


def _first(count: int) -> Sequence[int]:
    return range(count)
