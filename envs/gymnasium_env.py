"""Gymnasium faces of the environment: a batch on torch tensors and a single sample on numpy arrays."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDictBase
from torch import Tensor

from envs.ar_video import Scorer, Source, frame_reward, reseed, select, step
from envs.toy import ToySource

Observation = dict[str, Any]


class ARVideoVectorEnv(VectorEnv):
    """Batch of samples as torch tensors; without autoreset, since all samples end together.

    Without arguments it is the toy world of `envs/toy.py`.

    Args:
        source: returns an episode start of batch `[B]`, always of the same shapes. A source with a method
            `seed(int)` can be seeded through `reset(seed=...)`. The constructor asks once, for the shapes and
            the first reset.
        scorer: scores a finished frame; None leaves every reward 0.
        num_envs: B of the toy world; with a source it must be left out or agree.

    Observations are the state's tensors, `action [B, C, h, w]`, reward, termination and truncation `[B]`, and
    `info["finished"] [B]` tells where a frame was finished.
    """

    def __init__(self, source: Source | None = None, scorer: Scorer | None = None, num_envs: int | None = None) -> None:
        if source is None:
            source = toy = ToySource(prompts=num_envs or 1)
            scorer = scorer or toy.score
        first = select(source())
        if num_envs is not None and num_envs != first.shape[0]:
            raise ValueError(f"num_envs is {num_envs}, but the source starts {first.shape[0]} samples")
        self.source, self.scorer = source, scorer
        self.num_envs = first.shape[0]
        self.autoreset_mode = AutoresetMode.DISABLED
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space, self.single_action_space = _spaces(first[0])
        self.observation_space, self.action_space = _spaces(first)
        self._pending: TensorDictBase | None = first
        self._state: TensorDictBase | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the source's next episode, for all samples."""
        super().reset(seed=seed)
        if seed is not None:
            reseed(self.source, seed)
            self._pending = None
        self._state = self._pending if self._pending is not None else select(self.source())
        self._pending = None
        return dict(self._state.items()), {}

    def step(self, actions: Tensor) -> tuple[Observation, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Apply x[m, n+1] of every sample.

        Raises:
            ValueError: the episode has ended or has not begun.
        """
        before = self._state
        if before is None or int(before["frame"][0]) == before["latents"].shape[1]:
            raise ValueError("the episode has ended or not begun: call reset() before step()")
        self._state, finished, done = step(before, actions)
        reward = frame_reward(self.scorer, before, self._state)
        done = done[:, 0]
        return dict(self._state.items()), reward, done, torch.zeros_like(done), {"finished": finished[:, 0]}


class ARVideoEnv(gymnasium.Env):
    """One sample as numpy arrays, registered as `ardrag/ARVideo-v0`.

    Without arguments it is the toy world of `envs/toy.py`.

    Args:
        source: returns an episode start of batch `[1]`; otherwise as in `ARVideoVectorEnv`.
        scorer: scores a finished frame.

    Raises:
        ValueError: the source's batch is not 1.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, source: Source | None = None, scorer: Scorer | None = None) -> None:
        self._vector = ARVideoVectorEnv(source, scorer)
        if self._vector.num_envs != 1:
            raise ValueError(f"ARVideoEnv is a single sample, but its source starts {self._vector.num_envs}")
        self.observation_space = self._vector.single_observation_space
        self.action_space = self._vector.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start the source's next episode."""
        super().reset(seed=seed)
        state, info = self._vector.reset(seed=seed)
        return _numpy(state), info

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply x[m, n+1] `[C, h, w]`."""
        device = self._vector._state["latents"].device if self._vector._state is not None else None
        batch = torch.as_tensor(action, device=device).unsqueeze(0)
        state, reward, done, truncated, info = self._vector.step(batch)
        return (
            _numpy(state),
            float(reward[0]),
            bool(done[0]),
            bool(truncated[0]),
            {"finished": bool(info["finished"][0])},
        )


def _spaces(start: TensorDictBase) -> tuple[spaces.Dict, spaces.Box]:
    """Observation and action space of a start, with the batch dimension it has."""
    latents = start["latents"]
    shape = (*latents.shape[:-4], *latents.shape[-3:])
    action = spaces.Box(-np.inf, np.inf, shape, np.float32)
    return spaces.Dict({key: _space(key, value, start) for key, value in start.items()}), action


def _space(key: str, value: Tensor, start: TensorDictBase) -> spaces.Space:
    if value.dtype == torch.bool:
        return spaces.Box(0, 1, value.shape, np.bool_)
    if value.dtype == torch.int64:
        frames, steps = start["stochastic"].shape[-2:]
        high = {"frame": frames, "step": steps - 1}.get(key, np.iinfo(np.int64).max)
        return spaces.Box(0, high, value.shape, np.int64)
    low, high = (0.0, 1.0) if key == "sigma" else (-np.inf, np.inf)
    return spaces.Box(low, high, value.shape, np.float32)


def _numpy(state: Observation) -> Observation:
    return {key: value[0].cpu().numpy().copy() for key, value in state.items()}
