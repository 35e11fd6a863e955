"""Whole clips from the causal transformer, chunk by chunk from a bounded cache.

For chunks of one frame it gives what the `Actor` gives, from the same passes and the same draws; larger chunks, whose
frames move together, are beyond an environment that takes one frame at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from data import draws
from envs.ar_video import OPTIONAL_KEYS
from envs.transitions import log_prob, ode_mean
from policies.causality import Causality
from policies.kv_cache import KVCache

if TYPE_CHECKING:
    from envs.transitions import Transition


def act(
    transition: Transition,
    x: Tensor,
    v: Tensor,
    now: Tensor,
    later: Tensor,
    chosen: Tensor,
    keys: list[tuple[int, ...]],
) -> tuple[Tensor, Tensor]:
    """Take one denoising step of one frame: the kernel where `chosen`, the ODE elsewhere.

    Args:
        transition: kernel of the stochastic rows.
        x: latent `[B, C, h, w]` at noise level `now`.
        v: velocity, float32.
        now, later: noise levels `[B]`.
        chosen: rows that are stochastic, `[B]` bool.
        keys: (seed, iteration, prompt, sample, frame, step) of each row's TRANSITION_NOISE.

    Returns:
        The next latent in the dtype of `x`, and the log-prob `[B]`, 0 where the step is deterministic.
    """
    now, later = (level[:, None, None, None].float() for level in (now, later))
    action = ode_mean(x.float(), v, now, later).to(x.dtype)
    scores = v.new_zeros(len(x))
    rows = chosen.nonzero().flatten()
    if len(rows):
        mean, std = transition.moments(x[rows].float(), v[rows], now[rows], later[rows])
        noise = draws.normals(draws.Stream.TRANSITION_NOISE, [keys[i] for i in rows.tolist()], x.shape[1:])
        # The density is that of the value which is stored, rounding included.
        action[rows] = (mean + std * noise.to(x.device)).to(action.dtype)
        scores[rows] = log_prob(action[rows], mean, std)
    return action, scores


class Chain(NamedTuple):
    """Every step of a generated clip.

    Attributes:
        latents: `[B, M, N+1, C, h, w]`: the noise, the latent after each step, and last the finished frame.
        log_prob: `[B, M, N]`, 0 where the step was deterministic.
        x0: what each step predicted, `[B, M, N, C, h, w]`; of no meaning after a collapse.
    """

    latents: Tensor
    log_prob: Tensor
    x0: Tensor


@torch.no_grad()
def generate(
    transformer: nn.Module,
    transition: Transition,
    causality: Causality,
    state: TensorDictBase,
    collapse: Tensor | None = None,
    on_step: Callable[[int, int], None] = lambda frame, frames: None,
) -> Chain:
    """Generate the clips of an episode's start.

    Args:
        transformer: a `CausalWanTransformer3DModel`, or a wrapper of one; it is only ever called.
        transition: kernel of the steps that `state["stochastic"]` marks; `CPS(eta=1)` re-noises.
        causality: chunk, window and sink.
        state: see `envs.ar_video.start`.
        collapse: `[B, M]`, the step at which a frame ends with its x0 prediction (Self-Forcing); None: every frame goes
            on to noise level 0.
        on_step: called with (frame, number of frames) when a step of a chunk is done.
    """
    sigma, keys = state["sigma"], state["key"].tolist()
    frames, steps = state["stochastic"].shape[1:]
    last = steps if collapse is None else int(collapse.max()) + 1
    chain = state["latents"].unsqueeze(2).repeat(1, 1, steps + 1, 1, 1, 1)
    log_prob, predicted = sigma.new_zeros(len(sigma), frames, steps), torch.zeros_like(chain[:, :, :steps])
    cache = KVCache(causality)
    for first in range(0, frames, causality.chunk):
        chunk = range(first, min(first + causality.chunk, frames))
        for n in range(last):
            v = _velocity(transformer, cache, state, chain, chunk, n)
            for i, m in enumerate(chunk):
                now, later, chosen = sigma[:, m, n], sigma[:, m, n + 1], state["stochastic"][:, m, n]
                x = chain[:, m, n]
                action, log_prob[:, m, n] = act(
                    transition, x, v[:, i], now, later, chosen, [(*key, m, n) for key in keys]
                )
                predicted[:, m, n] = x0 = x - now[:, None, None, None] * v[:, i]
                if collapse is not None:
                    exits = collapse[:, m, None, None, None]
                    action = torch.where(exits == n, x0, torch.where(exits < n, x, action))
                chain[:, m, n + 1 :] = action.unsqueeze(1)
            on_step(chunk.start, frames)
    return Chain(chain, log_prob, predicted)


def sample_rollout(
    transformer: nn.Module,
    transition: Transition,
    causality: Causality,
    state: TensorDictBase,
    on_step: Callable[[int, int], None] = lambda frame, frames: None,
) -> TensorDict:
    """Act from an episode's start to its end; returns what `envs.rollout.RolloutCollector` does, without reward."""
    chain = generate(transformer, transition, causality, state, on_step=on_step)
    kept = ("stochastic", "sigma", "condition", "text", "key", *OPTIONAL_KEYS)
    values = {key: state[key] for key in kept if key in state}
    values |= {"latents": chain.latents, "log_prob": chain.log_prob, "prompt_id": state["key"][:, 2]}
    return TensorDict(values, batch_size=state.batch_size, device=state.device)


def _velocity(
    transformer: nn.Module, cache: KVCache, state: TensorDictBase, chain: Tensor, chunk: range, n: int
) -> Tensor:
    """Velocity `[B, k, C, h, w]` of a chunk at step n; at its first step the chunk before it enters the cache."""
    commit = cache.causality.chunk if n == 0 and chunk.start else 0
    first = chunk.start - commit
    latents = torch.cat([chain[:, first : chunk.start, -1], chain[:, chunk.start : chunk.stop, n]], 1)
    level = state["sigma"][:, chunk.start : chunk.stop, n]
    level = torch.cat([level.new_zeros(len(level), commit), level], 1)
    frames = torch.cat([latents, state["condition"][:, first : chunk.stop]], 2)
    v = transformer(
        frames, level, state["text"], cache, first=first, commit=commit, image=state.get("image", None), mode="cached"
    )
    return v[:, commit:].float()
