"""Keyed random draws: every number is a function of (stream, seed, iteration, prompt, sample, frame, step).

Each use of a stream has keys of one fixed length: numpy's SeedSequence pads short keys with zeros, so (7,) and (7, 0)
name the same draws.

No call in this project relies on a global generator. A resumed run, another batch split or another number of
processes therefore draws the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Stream(IntEnum):
    """Independent families of draws. The values are part of every run's identity: never renumber them."""

    INITIAL_NOISE = 0
    TRANSITION_NOISE = 1
    REFERENCE_NOISE = 2
    SCHEDULE = 3
    DATA = 4
    TRAINING = 5


def generator(stream: Stream, *key: int) -> np.random.Generator:
    """Return the generator that belongs to `stream` and `key` (non-negative integers).

    Raises:
        ValueError: a key part is negative.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(stream), *map(int, key)])))


def normal(stream: Stream, key: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw standard normal float32 noise of `shape` for one key, on the CPU."""
    import torch

    return torch.from_numpy(generator(stream, *key).standard_normal(tuple(shape), dtype=np.float32))


def normals(stream: Stream, keys: Iterable[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """Stack `normal` over keys: `[len(keys), *shape]`, on the CPU."""
    import torch

    return torch.stack([normal(stream, key, shape) for key in keys])


def seed_of(stream: Stream, *key: int) -> int:
    """Return a 63-bit seed for libraries that want an integer (torch.Generator, Hypothesis, ...)."""
    return int(generator(stream, *key).integers(0, 2**63 - 1))
