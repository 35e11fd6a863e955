"""Functional core: autoregressive video denoising as a Markov decision process (AR-Drag section 3.3).

A state is a TensorDict of batch `[B]` with the keys of `STATE_KEYS` (docs/architecture.md, "The
environment"). The action is the next latent of the current frame; the transition is deterministic. Samples
are batch-locked: all stand at the same (frame, step). Episodes last M * N steps; the state after the last one
has `frame = M` and takes no action.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from data.draws import Stream, normal

STATE_KEYS = ("condition", "text", "latents", "sigma", "stochastic", "frame", "step", "key")
OPTIONAL_KEYS = ("image",)
"""Keys of a state that only some models need: the embedding of the reference image."""

Source = Callable[[], TensorDictBase]
"""Returns the start of the next episode, as `start` builds it."""

Scorer = Callable[[Tensor, int], Tensor]
"""Scores a frame that has just been finished: (latents `[B, m+1, C, h, w]`, m) -> `[B]`."""


def start(
    condition: Tensor,
    text: Tensor,
    sigma_table: Tensor,
    stochastic: Tensor,
    key: Tensor,
    latent_shape: Sequence[int],
    share_initial_noise: bool = True,
    image: Tensor | None = None,
) -> TensorDict:
    """Build the state at (m, n) = (0, 0).

    Args:
        condition: `[B, M, Cc, h, w]`.
        text: `[B, L, D]`.
        sigma_table: `[N+1]`, `[M, N+1]` or `[B, M, N+1]`, falling to 0.
        stochastic: bool, broadcasts to `[B, M, N]`.
        key: `[B, 4]` int64 (seed, iteration, prompt, sample).
        latent_shape: (C, h, w).
        share_initial_noise: leave the sample out of the key, so that a prompt's group starts from the same
            noise.
        image: embedding of the reference image `[B, I, E]`, for models that look at one; the state then has it.

    Returns:
        TensorDict of batch `[B]` on the device of `condition`.

    Raises:
        ValueError: the shapes disagree, or the noise table does not fall strictly to 0.
    """
    device, (batch, frames) = condition.device, condition.shape[:2]
    steps = sigma_table.shape[-1] - 1
    if key.shape != (batch, 4) or text.shape[0] != batch or tuple(condition.shape[3:]) != tuple(latent_shape)[1:]:
        raise ValueError(
            f"start: condition {tuple(condition.shape)}, text {tuple(text.shape)}, key {tuple(key.shape)}"
            f" and latent {tuple(latent_shape)} disagree; expected [B,M,Cc,h,w], [B,L,D], [B,4] and (C,h,w)"
        )
    if bool((sigma_table.diff(dim=-1) >= 0).any()) or bool((sigma_table[..., -1] != 0).any()):
        raise ValueError("episode start: the noise levels of sigma_table must fall strictly and end at 0")
    counter = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    extra = {} if image is None else {"image": image.to(device)}
    return TensorDict(
        {
            "condition": condition,
            "text": text.to(device),
            "latents": initial_noise(key, frames, latent_shape, share_initial_noise).to(device),
            "sigma": sigma_table.float().expand(batch, frames, -1).to(device).contiguous(),
            "stochastic": stochastic.expand(batch, frames, steps).to(device).contiguous(),
            "frame": counter,
            "step": counter.clone(),
            "key": key.to(device),
            **extra,
        },
        batch_size=[batch],
        device=device,
    )


def initial_noise(key: Tensor, frames: int, latent_shape: Sequence[int], share: bool = True) -> Tensor:
    """Draw x[m, 0] of every frame: `[B, M, C, h, w]` on the CPU, each frame keyed on its own.

    With `share` the key is (seed, iteration, prompt, frame), otherwise (seed, iteration, prompt, sample,
    frame).
    """
    drawn: dict[tuple[int, ...], Tensor] = {}
    rows = [tuple(row[:3] if share else row) for row in key.tolist()]
    for row in rows:
        if row not in drawn:
            drawn[row] = torch.stack([normal(Stream.INITIAL_NOISE, (*row, m), latent_shape) for m in range(frames)])
    return torch.stack([drawn[row] for row in rows])


def select(state: TensorDictBase) -> TensorDictBase:
    """The keys of a state alone, the optional ones where there are some.

    Raises:
        KeyError: a key is missing.
    """
    return state.select(*STATE_KEYS, *(key for key in OPTIONAL_KEYS if key in state))


def step(state: TensorDictBase, action: Tensor) -> tuple[TensorDict, Tensor, Tensor]:
    """Apply an action; pure, `state` is left as it is.

    Args:
        state: a state that is not terminal.
        action: `[B, C, h, w]`, x[m, n+1].

    Returns:
        The next state, `finished [B, 1]` bool (this action was the last step of its frame) and `done [B, 1]`
        bool.
    """
    frame, n = state["frame"], state["step"]
    rows = torch.arange(action.shape[0], device=action.device)
    latents = state["latents"].clone()
    latents[rows, frame[:, 0]] = action.to(latents.dtype)
    finished = n == state["sigma"].shape[-1] - 2
    values = dict(select(state).items())
    values |= {
        "latents": latents,
        "frame": frame + finished,
        "step": torch.where(finished, 0, n + 1),
    }
    after = TensorDict(values, batch_size=state.batch_size, device=state.device)
    return after, finished, after["frame"] == latents.shape[1]


def snapshot(rollout: TensorDictBase, frame: int, step: int) -> Tensor:
    """Gather the state's X[m, n] `[B, M, C, h, w]` from a finished rollout's `latents [B, M, N+1, C, h, w]`.

    Finished frames before m, frame m at step n (0..N), initial noise after m.
    """
    latents = rollout["latents"]
    return torch.cat([latents[:, :frame, -1], latents[:, frame : frame + 1, step], latents[:, frame + 1 :, 0]], 1)


def frame_reward(scorer: Scorer | None, before: TensorDictBase, after: TensorDictBase) -> Tensor:
    """Reward `[B]` of the step between two states: the scorer's value if it finished a frame, otherwise 0.

    Raises:
        ValueError: the scorer does not return `[B]`.
    """
    latents, frame = after["latents"], before["frame"]
    batch = latents.shape[0]
    zero = torch.zeros(batch, device=latents.device)
    if scorer is None:
        return zero
    m = int(frame[0])
    if int(after["frame"][0]) == m:
        return zero
    score = scorer(latents[:, : m + 1], m)
    if score.shape != (batch,):
        raise ValueError(f"scorer returned shape {tuple(score.shape)} for frame {m}, expected ({batch},)")
    return score.to(zero)


def reseed(source: Source, seed: int) -> None:
    """Restart a source at `seed`; a source that can be seeded has a method `seed(int)`.

    Raises:
        ValueError: the source takes its seed elsewhere.
    """
    if not hasattr(source, "seed"):
        raise ValueError("this episode source cannot be seeded through reset: give it its seed where it is built")
    source.seed(seed)
