"""Rollouts of the student in training (AR-Drag Algorithm 1).

All end in one parallel pass with gradient, over frames at their exit step given a history without gradient. That is the
gradient of the frame-by-frame passes with a bounded, detached cache, in one forward; nothing can leak through a cache,
and gradient checkpointing has no cache to disagree with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from algorithms.distillation.noise import noised
from data.draws import Stream, generator
from envs.control import restarted
from envs.transitions import Transition
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.sampler import act, generate


@dataclass(frozen=True)
class Student:
    """The student at the start of a batch of clips.

    Attributes:
        network: the causal model.
        kernel: of the steps that `state["stochastic"]` marks; `CPS(eta=1)` re-noises as Algorithm 1 does.
        causality: chunk, window and sink; history carries no gradient, whatever it says.
        state: an episode's start (`envs.ar_video.start`).
        truth: the true frames `[B, M, C, h, w]`.
    """

    network: CausalWanTransformer3DModel
    kernel: Transition
    causality: Causality
    state: TensorDictBase
    truth: Tensor

    def predict(self, history: Tensor, x: Tensor, sigma: Tensor, history_sigma: Tensor | None = None) -> Tensor:
        """Predict x0 `[B, M, C, h, w]` of frames x at noise levels `sigma [B, M]`, given a history."""
        v = self.velocity(history, x, sigma, history_sigma)
        return x.detach() - sigma[..., None, None, None] * v

    def velocity(self, history: Tensor, x: Tensor, sigma: Tensor, history_sigma: Tensor | None = None) -> Tensor:
        """Velocity `[B, M, C, h, w]` of frames x at noise levels `sigma [B, M]`, given a history without gradient."""
        rule = replace(self.causality, history_gradient=False)
        clean, noisy = (torch.cat([frames.detach(), self.state["condition"]], 2) for frames in (history, x))
        return self.network.parallel(
            clean, noisy, sigma, self.state["text"], causality=rule, history_sigma=history_sigma
        )

    def levels(self, steps: Tensor) -> Tensor:
        """Noise levels `[B, M]` before the given steps."""
        return self.state["sigma"].gather(2, steps[..., None])[..., 0]


class Generated(NamedTuple):
    """What the student made.

    Attributes:
        x0: its predictions at the exit steps, with gradient, `[B, M, C, h, w]`.
        frames: what later frames saw, `[B, M, C, h, w]`.
        exits: the exit steps, `[B, M]`.
        window: the frames that are judged, as a clip of their own; only their predictions learn.
    """

    x0: Tensor
    frames: Tensor
    exits: Tensor
    window: slice


class Judged(NamedTuple):
    """A window of W frames as teacher, fake score and discriminator see it: a clip that begins there.

    Attributes:
        x0: the student's predictions, with gradient, `[B, W, C, h, w]`.
        condition: of the generated clip, `[B, W, Cc, h, w]`.
        truth: the true frames, `[B, W, C, h, w]`.
        true_condition: of the true clip, `[B, W, Cc, h, w]`.
    """

    x0: Tensor
    condition: Tensor
    truth: Tensor
    true_condition: Tensor


def exit_steps(student: Student, scope: str, clean: bool = False) -> Tensor:
    """Draw exit steps s in {0 .. N-1}, uniform: `[B, M]`, one for a video or one for every chunk of it.

    With `clean` N is among them, noise level 0. Keyed by the state's (seed, iteration, prompt, sample), so that a
    rollout is a function of its key.
    """
    state, rule = student.state, student.causality
    frames, steps = state["stochastic"].shape[1:]
    chunks = rule.chunks(frames)
    rows = []
    for key in state["key"].tolist():
        drawn = generator(Stream.TRAINING, *key, 9).integers(steps + clean, size=1 if scope == "per_video" else chunks)
        rows.append(rule.spread(torch.from_numpy(drawn).expand(chunks), frames))
    return torch.stack(rows).to(state["sigma"].device)


def at_exits(student: Student, exits: Tensor, collapse: bool) -> Generated:
    """Roll out without gradient, then predict every frame at its exit step, given the finished frames, with gradient.

    Args:
        student: see `Student`.
        exits: `[B, M]`, the same for all frames of a chunk.
        collapse: end a frame with its prediction at the exit step (Self-Forcing); otherwise it goes on to noise
            level 0 (Self-Rollout).
    """
    ends = exits if collapse else None
    chain, at = generate(student.network, student.kernel, student.causality, student.state, collapse=ends), exits
    frames, x, x0 = chain.latents[:, :, -1], _pick(chain.latents, at), _pick(chain.x0, at)
    if torch.is_grad_enabled():  # otherwise the rollout has predicted it already
        x0 = student.predict(frames, x, student.levels(exits))
    return Generated(x0, frames, exits, _whole(exits))


def on_truth(student: Student, exits: Tensor) -> Generated:
    """Denoise every frame to its exit step given the true history, and predict it there (teacher forcing)."""
    x = student.state["latents"]
    for n in range(int(exits.max())):
        with torch.no_grad():
            moved = _step(student, x, n)
        x = torch.where((exits > n)[..., None, None, None], moved, x)
    x0 = student.predict(student.truth, x, student.levels(exits))
    return Generated(x0, student.truth, exits, _whole(exits))


def on_noised_truth(student: Student, steps: Tensor) -> Generated:
    """Predict noised true frames given noised true frames, each at the level of its own step in {0 .. N}.

    A frame at step N is clean for those after it, as every frame is at inference; its own prediction is from step N-1.
    """
    last = student.state["stochastic"].shape[2]
    exits = steps.clamp(max=last - 1)
    noise, levels = student.state["latents"], (student.levels(steps), student.levels(exits))
    seen, x = (noised(student.truth, noise, sigma) for sigma in levels)
    x0 = student.predict(seen, x, levels[1], history_sigma=levels[0])
    return Generated(x0, seen, exits, _whole(exits))


def window(student: Student, frames: int) -> slice:
    """A random window of `frames` frames, in whole chunks, the same for all samples.

    The last chunk of a clip may be cut short; every chunk is in some window.
    """
    whole, rule = student.truth.shape[1], student.causality
    chunk, chunks, wide = rule.chunk, rule.chunks(whole), rule.chunks(frames)
    rng = generator(Stream.TRAINING, *student.state["key"][0].tolist(), 10)
    first = int(rng.integers(max(1, chunks - wide + 1))) * chunk
    return slice(first, min(first + wide * chunk, whole))


def judged(student: Student, made: Generated) -> Judged:
    """Cut the window out, with what its clip is conditioned on.

    The judges are bidirectional image-to-video models: they know clips that begin with their reference image, under
    mask 1. A window that begins later therefore has its own first frame as its reference, not the image that the whole
    clip began with, of which it is no continuation: the generated clip the frame that the student's later ones saw, the
    true clip the true one, or a mismatch would tell them apart. That latent stands for four pixel frames where the
    judges know one of a single image; decoding and encoding the image anew would be exact, and costs the VAE at every
    step. Control is cut as it is.
    """
    cut = made.window
    condition, x0, truth = student.state["condition"][:, cut], made.x0[:, cut], student.truth[:, cut]
    if cut.start == 0:
        return Judged(x0, condition, truth, condition)
    seen = made.frames[:, cut.start].detach()
    return Judged(x0, restarted(condition, seen), truth, restarted(condition, truth[:, 0]))


def _whole(exits: Tensor) -> slice:
    return slice(0, exits.shape[1])


def _pick(chain: Tensor, steps: Tensor) -> Tensor:
    """Gather `[B, M, ...]` at `steps [B, M]` from `[B, M, N, ...]`."""
    return chain.take_along_dim(steps[..., None, None, None, None], 2).squeeze(2)


def _step(student: Student, x: Tensor, n: int) -> Tensor:
    """Take step n of all frames at once, given the true history."""
    state, frames = student.state, range(x.shape[1])
    now, later, chosen = state["sigma"][..., n], state["sigma"][..., n + 1], state["stochastic"][..., n]
    v = student.velocity(student.truth, x, now).float()
    keys = state["key"].tolist()
    moved = [
        act(student.kernel, x[:, m], v[:, m], now[:, m], later[:, m], chosen[:, m], [(*key, m, n) for key in keys])[0]
        for m in frames
    ]
    return torch.stack(moved, 1)
