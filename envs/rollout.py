"""Acting: a policy and an episode source become one finished rollout, through TorchRL's `Collector`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import ListStorage, ReplayBuffer

from envs.ar_video import OPTIONAL_KEYS, STATE_KEYS, Scorer, Source, select
from envs.torchrl_env import TorchRLEnv

Policy = Callable[[TensorDictBase], TensorDictBase]
"""Reads a state, writes `action [B, C, h, w]` and `log_prob [B, 1]`; its other outputs are kept too."""

_DERIVED = (*STATE_KEYS, *OPTIONAL_KEYS, "done", "terminated", ("next", "done"), ("next", "terminated"))


class RolloutCollector:
    """Collects one whole episode per call, asking `source` exactly once for each.

    The TorchRL environment and collector behind it are made at the first call, and again whenever the
    source's shapes change (another resolution bucket).

    Args:
        policy: the actor.
        source: returns an episode start of batch `[B]`.
        scorer: optional, adds `reward [B, M]`; None where the trainer scores the finished rollout.
    """

    def __init__(self, policy: Policy, source: Source, scorer: Scorer | None = None) -> None:
        self.policy, self.source, self.scorer = policy, source, scorer
        self._collector: Collector | None = None
        self._iterator: Iterator[None]
        self._steps: _StepStore
        self._start: TensorDictBase

    def collect(self) -> TensorDict:
        """Act from the source's next start to the end; return the rollout of `assemble_rollout`."""
        start = select(self.source())
        if self._collector is None or _layout(start) != _layout(self._start):
            self.close()
            self._build(start)
        self._start = start
        next(self._iterator)
        rollout = assemble_rollout(start, torch.stack(self._steps.steps, 1))
        self._steps.empty()
        return rollout if self.scorer is not None else rollout.exclude("reward")

    def close(self) -> None:
        """Release the collector."""
        if self._collector is not None:
            self._collector.shutdown()
            self._collector = None

    def _build(self, start: TensorDictBase) -> None:
        self._start = start
        env = TorchRLEnv(lambda: self._start, self.scorer)
        self._steps = _StepStore()
        self._collector = Collector(
            env,
            self.policy,
            frames_per_batch=start["stochastic"].numel(),
            total_frames=-1,
            reset_at_each_iter=True,  # what the last episode left would make a resumed run differ
            compact_obs=True,
            track_traj_ids=False,
            replay_buffer=self._steps,
            extend_buffer=False,
            trust_policy=True,
            auto_register_policy_transforms=False,
        )
        self._iterator = iter(self._collector)


def assemble_rollout(start: TensorDictBase, trajectory: TensorDictBase) -> TensorDict:
    """Turn an episode's start and its steps into the rollout of docs/architecture.md; pure.

    Args:
        start: the state at (0, 0), batch `[B]`.
        trajectory: batch `[B, M * N]` in the order of acting, with `action`, `log_prob [.., 1]`, `("next",
            "reward")` and whatever else the policy wrote. TorchRL's own output for one episode will do.

    Returns:
        TensorDict of batch `[B]`: `latents [B,M,N+1,C,h,w]`, `log_prob [B,M,N]`, `reward [B,M]`,
        `stochastic`, `sigma`, `condition`, `text`, `key`, `prompt_id [B]`, `image`
        where the start has one, and the policy's other outputs as `[B,M,N,...]`.

    Raises:
        ValueError: the number of steps is not M * N.
    """
    batch, frames, steps = start["stochastic"].shape
    if trajectory.shape != (batch, frames * steps):
        raise ValueError(
            f"a rollout of {batch} samples, {frames} frames and {steps} steps needs a trajectory of batch "
            f"({batch}, {frames * steps}), got {tuple(trajectory.shape)}"
        )
    grid = trajectory.exclude(*_DERIVED).reshape(batch, frames, steps)
    others = {key: value for key, value in grid.items() if key not in ("action", "log_prob", "next", "collector")}
    values = others | {
        "latents": torch.cat([start["latents"].unsqueeze(2), grid["action"]], 2),
        "log_prob": grid["log_prob"].squeeze(-1),
        "reward": grid["next", "reward"][:, :, -1, 0],
        "prompt_id": start["key"][:, 2],
    }
    kept = ("stochastic", "sigma", "condition", "text", "key", *OPTIONAL_KEYS)
    values |= {key: start[key] for key in kept if key in start}
    return TensorDict(values, batch_size=[batch], device=start.device)


class _StepStore(ReplayBuffer):
    """Keeps, of each step, only what the start of the episode does not imply.

    The state is large and the collector would hold M * N copies of it (at 480p gigabytes). Condition, text
    and noise table never change, and every snapshot follows from the first one and the actions.
    """

    def __init__(self) -> None:
        super().__init__(storage=ListStorage(1))
        self.steps: list[TensorDictBase] = []

    def add(self, data: TensorDictBase) -> int:
        self.steps.append(data.exclude(*_DERIVED))
        return len(self.steps) - 1

    def empty(self) -> None:
        self.steps.clear()


def _layout(start: TensorDictBase) -> dict[str, tuple[object, ...]]:
    return {key: (value.shape, value.dtype, value.device) for key, value in start.items()}
