"""A very small AR environment whose best policy is known: every frame has a target latent that its condition
shows.

For testing algorithms in milliseconds. The reward of a finished frame is minus its mean squared distance to
the target; `best_velocity` (the exact velocity of a point mass at the target) reaches 0, with stochastic
steps as well under `CPS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from data.draws import Stream, normals
from envs.ar_video import start
from envs.schedules import Schedule, Single, draw_batch


@dataclass
class ToySource:
    """Episode source and scorer of the toy world; every call is the next iteration.

    Attributes:
        prompts, group: P targets with G samples each, batch B = P x G.
        frames, channels, side: M, C and h = w of the latents; the condition has the same shape.
        sigmas: noise table, falling to 0.
        schedule: which steps are marked stochastic.
        value: seed of all draws.
        iteration: of the next episode.
    """

    prompts: int = 1
    group: int = 1
    frames: int = 3
    channels: int = 2
    side: int = 4
    sigmas: tuple[float, ...] = (1.0, 0.755, 0.522, 0.0)
    schedule: Schedule = field(default_factory=Single)
    value: int = 0
    iteration: int = 0

    def seed(self, value: int) -> None:
        """Begin again at iteration 0 of another seed."""
        self.value, self.iteration = value, 0

    def __call__(self) -> TensorDict:
        """Start the next episode."""
        keys = [(self.value, self.iteration, p, g) for p in range(self.prompts) for g in range(self.group)]
        self.iteration += 1
        latent = (self.channels, self.side, self.side)
        targets = normals(Stream.DATA, [key[:3] for key in keys], (self.frames, *latent))
        self._targets = targets
        sigma = torch.tensor(self.sigmas)
        key = torch.tensor(keys)
        stochastic = draw_batch(self.schedule, sigma.expand(self.frames, -1), key)
        return start(targets, torch.zeros(len(keys), 1, 1), sigma, stochastic, key, latent)

    def score(self, latents: Tensor, frame: int) -> Tensor:
        """Score frame m of the current episode: latents `[B, m+1, C, h, w]` -> `[B]`, at most 0."""
        return -((latents[:, frame] - self._targets[:, frame]) ** 2).mean((1, 2, 3))


def best_velocity(state: TensorDictBase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read a toy state: x, the best velocity `(x - target) / sigma`, sigma and sigma' (`[B, 1, 1, 1]`)."""
    rows = torch.arange(state.shape[0])
    frame, n = state["frame"][:, 0], state["step"][:, 0]
    levels = state["sigma"][rows, frame]
    x, target = state["latents"][rows, frame], state["condition"][rows, frame]
    sigma, after = levels[rows, n].view(-1, 1, 1, 1), levels[rows, n + 1].view(-1, 1, 1, 1)
    return x, (x - target) / sigma, sigma, after
