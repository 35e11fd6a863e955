"""TorchRL face of the environment."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.utils import make_composite_from_td

from envs.ar_video import Scorer, Source, frame_reward, reseed, select, step


class TorchRLEnv(EnvBase):
    """Batch-locked `EnvBase` over the functional core; every observation is the whole Markov state.

    Every reset asks `source` for the start of an episode. The constructor asks once for the shapes and keeps
    that start for the first reset, so a source that advances loses none.

    Args:
        source: returns an episode start of batch `[B]`, always of the same shapes.
        scorer: scores a frame when it is finished; None leaves every reward 0 (score the finished rollout
            instead).

    Action `[B, C, h, w]`; reward, done and terminated `[B, 1]`.
    """

    def __init__(self, source: Source, scorer: Scorer | None = None) -> None:
        first = select(source())
        super().__init__(device=first.device or first["latents"].device, batch_size=first.batch_size)
        self.source, self.scorer = source, scorer
        self._pending: TensorDictBase | None = first
        batch, (_, *latent) = first.batch_size[0], first["latents"].shape[1:]
        self.observation_spec = make_composite_from_td(first, unsqueeze_null_shapes=False)
        self.action_spec = Unbounded((batch, *latent), device=self.device, dtype=first["latents"].dtype)
        self.reward_spec = Unbounded((batch, 1), device=self.device)
        flag = {k: Unbounded((batch, 1), dtype=torch.bool, device=self.device) for k in ("done", "terminated")}
        self.full_done_spec = Composite(flag, shape=self.batch_size, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        if tensordict is not None and "_reset" in tensordict and not bool(tensordict["_reset"].all()):
            raise ValueError("ar_video is batch-locked: reset all samples of the batch together")
        start = self._pending if self._pending is not None else select(self.source())
        self._pending = None
        return start.copy()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        after, _, done = step(tensordict, tensordict["action"])
        reward = frame_reward(self.scorer, tensordict, after)
        return after.update(
            TensorDict({"reward": reward.unsqueeze(-1), "done": done, "terminated": done.clone()}, after.batch_size)
        )

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            reseed(self.source, seed)
            self._pending = None
