"""Schedules of stochasticity: which (frame, step) pairs of an episode are SDE steps, the others ODE steps.

A schedule chooses among the available steps, those that end at a noise level above 0. Choosing is numpy only,
so that a configuration can be checked before torch is loaded; `draw` is the same on tensors.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from data.draws import Stream, generator

if TYPE_CHECKING:
    from torch import Tensor

    from envs.transitions import Transition

SCOPES = ("same_for_all_frames", "per_frame", "one_pair")

# A kernel whose step leaves more than this multiple of the right noise is worth a warning.
_EXCESS = 1.01


class Schedule(ABC):
    """Base of all schedules. `learnable` is False where no step is ever stochastic."""

    learnable: ClassVar[bool] = True

    @abstractmethod
    def choose(self, available: np.ndarray, rng: np.random.Generator, iteration: int) -> np.ndarray:
        """Choose stochastic steps: `available [M, N]` bool -> `[M, N]` bool.

        Raises:
            ValueError: the table has fewer available steps than the schedule needs.
        """

    def draw(self, sigma: Tensor, rng: np.random.Generator, iteration: int) -> Tensor:
        """Choose a prompt's stochastic steps: table `sigma [M, N+1]` -> bool `[M, N]`, on its device."""
        import torch

        chosen = self.choose(available_steps(sigma.cpu().numpy()), rng, iteration)
        return torch.from_numpy(chosen).to(sigma.device)


@dataclass(frozen=True)
class RandomK(Schedule):
    """k random steps.

    Attributes:
        k: number of stochastic steps (of each frame; of the whole video with scope one_pair).
        scope: same_for_all_frames, per_frame (drawn for each frame) or one_pair (k pairs (m, n) in the whole
            video).
    """

    k: int = 2
    scope: str = "same_for_all_frames"

    def __post_init__(self) -> None:
        _at_least_one("random_k.k", self.k)
        _check_scope("random_k", self.scope)

    def choose(self, available: np.ndarray, rng: np.random.Generator, iteration: int) -> np.ndarray:
        """Draw the steps."""
        return _random_steps(available, self.k, self.scope, rng)


@dataclass(frozen=True)
class Single(Schedule):
    """One random step, the paper's selective stochasticity (AR-Drag section 3.3).

    Attributes:
        scope: same_for_all_frames (one n for the video), per_frame (one n for each frame) or one_pair (a
            single (m, n) in the whole video, the strictest reading of Eq. 9).
    """

    scope: str = "same_for_all_frames"

    def __post_init__(self) -> None:
        _check_scope("single", self.scope)

    def choose(self, available: np.ndarray, rng: np.random.Generator, iteration: int) -> np.ndarray:
        """Draw the step."""
        return _random_steps(available, 1, self.scope, rng)


@dataclass(frozen=True)
class All(Schedule):
    """Every step that ends above noise level 0."""

    def choose(self, available: np.ndarray, rng: np.random.Generator, iteration: int) -> np.ndarray:
        """Choose all available steps."""
        _need(available, 1)
        return available.copy()


@dataclass(frozen=True)
class First(Schedule):
    """The first available step of every frame."""

    def choose(self, available: np.ndarray, rng: np.random.Generator, iteration: int) -> np.ndarray:
        """Choose the first step."""
        _need(available, 1)
        return available & (available.cumsum(1) == 1)


@dataclass(frozen=True)
class Last(Schedule):
    """The last available step of every frame (it still ends above noise level 0)."""

    def choose(self, available: np.ndarray, rng: np.random.Generator, iteration: int) -> np.ndarray:
        """Choose the last step."""
        _need(available, 1)
        return available & (available[:, ::-1].cumsum(1)[:, ::-1] == 1)


@dataclass(frozen=True)
class Window(Schedule):
    """A window of neighbouring steps that slides as training goes on and begins again at its end (MixGRPO).

    Attributes:
        size: steps in the window.
        stride: steps by which it moves; the last position is shortened so that every step is reached.
        interval: iterations between two moves.
    """

    size: int = 1
    stride: int = 1
    interval: int = 25

    def __post_init__(self) -> None:
        _at_least_one("window.size", self.size)
        _at_least_one("window.stride", self.stride)
        _at_least_one("window.interval", self.interval)

    def choose(self, available: np.ndarray, rng: np.random.Generator, iteration: int) -> np.ndarray:
        """Choose the window that belongs to the iteration."""
        _need(available, self.size)
        rank = available.cumsum(1) - 1
        room = available.sum(1, keepdims=True) - self.size
        positions = -(-room // self.stride) + 1
        begin = np.minimum(iteration // self.interval % positions * self.stride, room)
        return available & (rank >= begin) & (rank < begin + self.size)


@dataclass(frozen=True)
class Deterministic(Schedule):
    """`schedule=none`: no stochastic step, for evaluation and for algorithms that need no log-probability."""

    learnable: ClassVar[bool] = False

    def choose(self, available: np.ndarray, rng: np.random.Generator, iteration: int) -> np.ndarray:
        """Choose nothing."""
        return np.zeros_like(available)


def available_steps(sigma: np.ndarray) -> np.ndarray:
    """Steps that may be stochastic: `sigma [M, N+1]` -> `[M, N]` bool, True where sigma' > 0."""
    return np.asarray(sigma)[:, 1:] > 0


def draw_batch(schedule: Schedule, sigma: Tensor, key: Tensor) -> Tensor:
    """Draw a batch's stochastic steps; the samples of a prompt share theirs, whatever batch they are in.

    Args:
        sigma: `[M, N+1]`.
        key: `[B, 4]` int64 (seed, iteration, prompt, sample); the draw's key is (seed, iteration, prompt).

    Returns:
        bool `[B, M, N]` on the device of sigma.
    """
    import torch

    rows = [tuple(row[:3]) for row in key.tolist()]
    drawn = {row: schedule.draw(sigma, generator(Stream.SCHEDULE, *row), row[1]) for row in set(rows)}
    return torch.stack([drawn[row] for row in rows])


def picture(schedule: Schedule, sigma: Tensor, transition: Transition, seed: int = 0, iteration: int = 0) -> str:
    """Draw a small text picture of one draw: rows frames, columns steps, ● stochastic, · deterministic.

    Below it stands a warning line for each stochastic step at which the kernel leaves more noise than sigma'
    asks for.

    Args:
        sigma: `[M, N+1]`.
        transition: the kernel of the stochastic steps.
    """
    chosen = schedule.draw(sigma, generator(Stream.SCHEDULE, seed, iteration, 0), iteration).tolist()
    rows = [(line, tuple(marks)) for line, marks in zip(sigma.tolist(), chosen, strict=True)]
    lines: list[str] = []
    header: list[float] = []
    begin = 0
    for m in range(1, len(rows) + 1):
        if m < len(rows) and rows[m] == rows[begin]:
            continue
        levels, marks = rows[begin]
        if levels != header:
            header = levels
            lines.append(" " * 14 + "".join(f"{f'{a:.3g}→{b:.3g}':^13}" for a, b in itertools.pairwise(levels)))
        name = f"frame {begin}" if m - begin == 1 else f"frames {begin}-{m - 1}"
        lines.append((f"{name:<14}" + "".join(f"{'●' if mark else '·':^13}" for mark in marks)).rstrip())
        begin = m
    return "\n".join(line.rstrip() for line in lines + _noise_warnings(sigma, chosen, transition))


def _noise_warnings(sigma: Tensor, chosen: list[list[bool]], transition: Transition) -> list[str]:
    from envs.transitions import excess_noise

    excess = excess_noise(transition, sigma[:, :-1], sigma[:, 1:]).tolist()
    levels = sigma.tolist()
    found = {
        (levels[m][n], levels[m][n + 1]): value
        for m, row in enumerate(excess)
        for n, value in enumerate(row)
        if chosen[m][n] and value > _EXCESS
    }
    return [
        f"warning: {transition.name} leaves {value:.3f} x the right noise at {a:.3g}→{b:.3g} (cps is exact)"
        for (a, b), value in found.items()
    ]


def _random_steps(available: np.ndarray, k: int, scope: str, rng: np.random.Generator) -> np.ndarray:
    """Choose k available steps for the video, for each frame, or in the whole table."""
    if scope == "one_pair":
        flat = np.flatnonzero(available)
        if k > flat.size:
            raise ValueError(f"schedule needs {k} stochastic steps, but the noise table leaves {flat.size}")
        chosen = np.zeros(available.size, dtype=bool)
        chosen[rng.choice(flat, k, replace=False)] = True
        return chosen.reshape(available.shape)
    if scope == "per_frame":
        _need(available, k)
        score = np.where(available, rng.random(available.shape), math.inf)
        return score.argsort(1).argsort(1) < k
    common = np.asarray(available.all(0))[None]
    _need(common, k)
    chosen = np.zeros(available.shape[1], dtype=bool)
    chosen[rng.choice(np.flatnonzero(common), k, replace=False)] = True
    return np.broadcast_to(chosen, available.shape).copy()


def _need(available: np.ndarray, k: int) -> None:
    room = int(available.sum(1).min())
    if k > room:
        raise ValueError(f"schedule needs {k} stochastic steps in each frame, but only {room} of its steps end above 0")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_scope(name: str, scope: str) -> None:
    if scope not in SCOPES:
        raise ValueError(f"{name}.scope must be one of {', '.join(SCOPES)}, got {scope!r}")
