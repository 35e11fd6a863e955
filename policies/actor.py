"""The policy as TorchRL sees it: acts step by step, re-scores a finished rollout in a few parallel passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from envs.ar_video import OPTIONAL_KEYS
from envs.transitions import log_prob
from policies.causality import Causality
from policies.kv_cache import KVCache
from policies.sampler import act

if TYPE_CHECKING:
    from envs.transitions import Transition

STATE_KEYS = ["condition", "text", "latents", "sigma", "stochastic", "frame", "step", "key"]


class Actor(TensorDictModuleBase):
    """Acts on the environment's state and scores rollouts, with one set of weights.

    All samples of a batch stand at the same (frame, step). The cache of finished frames is memory, not
    state: it is reset at the start of an episode and rebuilt from the snapshot alone when it does not belong
    to the state given (another episode, position, text, condition or past). Weights must not change within
    an episode.

    `transformer` may be a wrapper (a DeepSpeed engine) of a `CausalWanTransformer3DModel`; it is only ever
    called.

    Attributes:
        transformer: the network.
        transition: the kernel of stochastic steps.
        causality: what a frame sees.
    """

    def __init__(self, transformer: nn.Module, transition: Transition, causality: Causality) -> None:
        super().__init__()
        self.transformer = transformer
        self.transition = transition
        self.causality = causality
        self.in_keys = STATE_KEYS
        self.out_keys = ["action", "log_prob"]
        self.reset()

    def reset(self) -> None:
        """Forget the finished frames; needed only where weights changed in the middle of an episode."""
        self._cache = KVCache(self.causality)
        self._finished: list[Tensor] = []
        self._episode: tuple[Tensor, ...] | None = None

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Add `action` `[B,C,h,w]` = x[m, n+1] and `log_prob` `[B,1]` (0 where the step is deterministic).

        A stochastic step draws from TRANSITION_NOISE at (seed, iteration, prompt, sample, frame, step).
        """
        state = tensordict
        m, n = _position(state)
        x, v = state["latents"][:, m], self.velocity(state, m, n)
        keys = [(*key, m, n) for key in state["key"].tolist()]
        now, later, chosen = state["sigma"][:, m, n], state["sigma"][:, m, n + 1], state["stochastic"][:, m, n]
        action, log_probs = act(self.transition, x, v, now, later, chosen, keys)
        return tensordict.set("action", action).set("log_prob", log_probs[:, None])

    def velocity(self, state: TensorDictBase, m: int, n: int) -> Tensor:
        """Velocity `[B,C,h,w]` of frame m at step n, float32; keeps the cache in step with the state.

        At the first step of a frame, the frame before it enters the cache in the same pass.

        Raises:
            ValueError: `causality.chunk` is not 1; scoring takes any, acting one frame at a time.
        """
        if self.causality.chunk != 1:
            raise ValueError(
                f"the actor takes one frame at a time; chunks of {self.causality.chunk} are for generate()"
            )
        if m == n == 0 or not self._remembers(state, m):
            self.reset()
            self._episode = _episode(state)
        for frame in range(self._cache.end, m - 1 if n == 0 else m):
            self._pass(state, frame, frame, state["sigma"].new_zeros(state["sigma"].shape[0], 1), commit=1)
        sigma = state["sigma"][:, m, n : n + 1]
        if self._cache.end == m:
            return self._pass(state, m, m, sigma, commit=0)[:, 0]
        return self._pass(state, m - 1, m, torch.cat([torch.zeros_like(sigma), sigma], 1), commit=1)[:, 1]

    def _pass(self, state: TensorDictBase, first: int, last: int, sigma: Tensor, commit: int) -> Tensor:
        frames = _inputs(state, first, last + 1)
        v = self.transformer(
            frames,
            sigma,
            state["text"],
            self._cache,
            first=first,
            commit=commit,
            image=state.get("image", None),
            mode="cached",
        )
        if commit:
            self._finished.append(frames[:, 0])
        return v.float()

    def _remembers(self, state: TensorDictBase, m: int) -> bool:
        """Whether the cache was made from the finished frames of this very state, and of no later ones."""
        end = self._cache.end
        if self._episode is None or end > m:
            return False
        here = _episode(state)
        if len(here) != len(self._episode) or not all(map(torch.equal, self._episode, here)):
            return False
        return end == 0 or torch.equal(torch.stack(self._finished, 1), _inputs(state, 0, end))

    def evaluate(self, rollout: TensorDictBase) -> TensorDict:
        """Score a rollout under the current weights; see `evaluate`."""
        return evaluate(self.transformer, self.transition, self.causality, rollout)

    def replay(self, rollout: TensorDictBase) -> TensorDict:
        """Score a rollout by the very passes that acting took: the slow reference of `evaluate`.

        Same returns, same gradient. On the rollout's own batch and weights the log-probs equal those of
        acting bit for bit.
        """
        frames, steps = rollout["stochastic"].shape[1:]
        actor = Actor(self.transformer, self.transition, self.causality)
        state = rollout.select("condition", "text", "sigma", "key", "image", strict=False)
        velocities = []
        for m in range(frames):
            for n in range(steps):
                x = rollout["latents"][:, :, -1].clone()
                x[:, m] = rollout["latents"][:, m, n]
                velocities.append(actor.velocity(state.set("latents", x), m, n))
        v = torch.stack(velocities, 1).unflatten(1, (frames, steps))
        latents, sigma = rollout["latents"].float(), rollout["sigma"].float()[..., None, None, None]
        scores = _scores(self.transition, latents[:, :, :-1], v, sigma[:, :, :-1], sigma[:, :, 1:], latents[:, :, 1:])
        kept = {name: _where(rollout["stochastic"], score) for name, score in scores.items()}
        return TensorDict(kept, batch_size=rollout.batch_size)


def evaluate(
    transformer: nn.Module, transition: Transition, causality: Causality, rollout: TensorDictBase
) -> TensorDict:
    """Log-probs of a rollout's stochastic steps; pass k scores the k-th of every chunk at once.

    Equal to what acting gave, up to rounding (AR-Drag Eq. 13-14 need both). Gradient flows to the weights
    through the denoised frames, and through the history where `causality.history_gradient` says so.

    Args:
        rollout: `latents [B,M,N+1,C,h,w]`, `sigma [B,M,N+1]`, `stochastic [B,M,N]`, `condition`, `text`.

    Returns:
        `log_prob [B,M,N]`, `mean [B,M,N,C,h,w]`, `std [B,M,N]`, float32 and 0 at deterministic steps.
    """
    latents, condition = rollout["latents"], rollout["condition"]
    sigma, chosen = rollout["sigma"].float(), rollout["stochastic"]
    clean = torch.cat([latents[:, :, -1], condition], 2)
    # Frames of a chunk see each other: all of them stand where any of them is scored.
    moving = torch.cat([part.any(1, keepdim=True).expand_as(part) for part in chosen.split(causality.chunk, 1)], 1)
    rank = moving.cumsum(-1)
    total = {
        "log_prob": sigma.new_zeros(chosen.shape),
        "mean": sigma.new_zeros((*chosen.shape, *latents.shape[3:])),
        "std": sigma.new_zeros(chosen.shape),
    }
    for k in range(int(rank.max())):
        hot = moving & (rank == k + 1)
        # Where a frame has fewer stochastic steps this is 0, and `hot` masks the result.
        step = hot.int().argmax(-1, keepdim=True)
        x, action = _at(latents, step), _at(latents, step + 1)
        now, later = sigma.gather(2, step), sigma.gather(2, step + 1)
        v = transformer(
            clean,
            torch.cat([x, condition], 2),
            now[..., 0],
            rollout["text"],
            causality=causality,
            image=rollout.get("image", None),
            mode="parallel",
        )
        now, later = now[..., None, None], later[..., None, None]
        for name, score in _scores(transition, x.float(), v.float(), now, later, action).items():
            total[name] = total[name] + _where(hot & chosen, score.unsqueeze(2))
    return TensorDict(total, batch_size=rollout.batch_size)


def _episode(state: TensorDictBase) -> tuple[Tensor, ...]:
    """What stays the same within an episode and is not in its frames."""
    return tuple(state[key] for key in ("key", "text", *OPTIONAL_KEYS) if key in state)


def _inputs(state: TensorDictBase, first: int, end: int) -> Tensor:
    """Latents and conditions of frames `first .. end-1` as the network takes them: `[B, F, C+Cc, h, w]`."""
    return torch.cat([state["latents"][:, first:end], state["condition"][:, first:end]], 2)


def _scores(
    transition: Transition, x: Tensor, v: Tensor, now: Tensor, later: Tensor, action: Tensor
) -> dict[str, Tensor]:
    """Score actions `[..., C, h, w]`; noise levels are `[..., 1, 1, 1]`."""
    mean, std = transition.moments(x, v, now, later)
    return {"log_prob": log_prob(action, mean, std), "mean": mean, "std": std.flatten(-4)}


def _at(latents: Tensor, step: Tensor) -> Tensor:
    """Gather `[B,M,C,h,w]` at `step [B,M,1]` from `[B,M,N+1,C,h,w]`."""
    return latents.take_along_dim(step[..., None, None, None], dim=2).squeeze(2)


def _where(mask: Tensor, values: Tensor) -> Tensor:
    """Keep `values [B,M,N or 1,...]` where `mask [B,M,N]` is true, 0 elsewhere."""
    return torch.where(mask.view(*mask.shape, *[1] * (values.ndim - mask.ndim)), values, 0.0)


def _position(state: TensorDictBase) -> tuple[int, int]:
    """Return the (frame, step) that all samples stand at."""
    both = torch.cat([state["frame"], state["step"]], -1)
    if not bool((both == both[:1]).all()):
        raise ValueError("all samples of a batch must stand at the same (frame, step); step them as separate batches")
    m, n = both[0].tolist()
    return m, n
