"""Offline DPO from a file of pairs (Diffusion-DPO, arXiv 2311.12908)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from algorithms.pretraining.loop import Fit, Record
    from policies.causal_dit import CausalWanTransformer3DModel
    from policies.causality import Causality


@dataclass(frozen=True)
class Preferences:
    """Clips without trajectories have no log-prob; minus the flow matching error stands in its place. Both clips of a
    pair are noised alike, each continues its own first frame.

    How far the policy may leave the initial one is `algorithm.beta`, here the scale of the difference of errors (means
    over latent values) inside the sigmoid; how it is optimised is `optimizer`.

    Attributes:
        file: CSV with the columns path_A, path_B, prompt, verdicts, and maybe tracks; see `data/pairs.py`.
        criterion: column of the verdict.
        fps: clips play at about this rate; none keeps every frame.
        batch: pairs per step.
    """

    file: str
    criterion: str = "MQ"
    fps: float | None = None
    batch: int = 4

    def __post_init__(self) -> None:
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"stage.fps must be positive, got {self.fps}")
        if self.batch < 1:
            raise ValueError(f"stage.batch must be at least 1, got {self.batch}")


@dataclass(frozen=True)
class EncodedPairs:
    """Encoded clips, the preferred ones in row 0 and the others in row 1: `latents, condition [2, n, M, ..., h, w]`,
    `text [n, L, D]`.
    """

    latents: Tensor
    condition: Tensor
    text: Tensor


def flow_errors(
    network: CausalWanTransformer3DModel,
    pairs: EncodedPairs,
    rows: Tensor,
    sigma: Tensor,
    eps: Tensor,
    causality: Causality,
) -> Tensor:
    """Flow matching errors `[2, b]` of pairs `rows [b]`, each frame given the true ones before it.

    Args:
        network: causal.
        pairs: encoded.
        rows: which pairs.
        sigma: noise levels `[b, M]`, eps: noise `[b, M, C, h, w]`; the same for both clips of a pair.
        causality: what a frame sees.
    """
    import torch

    from algorithms.distillation.noise import noised

    x0, condition = pairs.latents[:, rows].flatten(0, 1), pairs.condition[:, rows].flatten(0, 1)
    level, noise, text = sigma.repeat(2, 1), eps.repeat(2, 1, 1, 1, 1), pairs.text[rows].repeat(2, 1, 1)
    clean, noisy = (torch.cat([frames, condition], 2) for frames in (x0, noised(x0, noise, level)))
    v = network.parallel(clean, noisy, level, text, causality=causality)
    return (v - (noise - x0)).square().mean((1, 2, 3, 4)).unflatten(0, (2, -1))


def learn_preferences(
    batch: int,
    beta: float,
    fit: Fit,
    network: CausalWanTransformer3DModel,
    pairs: EncodedPairs,
    causality: Causality,
    sigmas: list[float],
    seed: int = 0,
    report: Callable[[str], None] = print,
    state: Path | None = None,
    record: Record | None = None,
    stop: Callable[[], bool] | None = None,
) -> float:
    """Train whatever of `network` requires gradient, in place; return the seconds that it took.

    Args:
        batch: pairs per step.
        beta: see `Preferences`.
        fit: how it is optimised.
        network: the policy, which is also the initial policy.
        pairs: encoded.
        causality: chunk and window; a chunk shares its noise level.
        sigmas: the policy's noise levels.
        seed: of pairs and noise.
        report: takes a line of progress.
        state, record, stop: see `optimise`; no record: nobody's, no stop: never.
    """
    import copy

    import torch

    from algorithms.losses import preference_loss
    from algorithms.pretraining.loop import never, optimise, unrecorded
    from data.draws import Stream, generator

    initial = copy.deepcopy(network).requires_grad_(False)
    table = torch.tensor(sigmas[:-1])
    count, frames = pairs.latents.shape[1:3]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = generator(Stream.TRAINING, seed, 20, step)
        rows = torch.from_numpy(rng.choice(count, min(batch, count), replace=False))
        drawn = torch.from_numpy(rng.integers(len(table), size=(len(rows), causality.chunks(frames))))
        sigma = causality.spread(table[drawn], frames).to(pairs.latents)
        shape = (len(rows), *pairs.latents.shape[2:])
        eps = torch.from_numpy(rng.standard_normal(shape, dtype="float32")).to(pairs.latents)
        now = flow_errors(network, pairs, rows, sigma, eps, causality)
        with torch.no_grad():
            first = flow_errors(initial, pairs, rows, sigma, eps, causality)
        gain = first - now
        difference = beta * (gain[0] - gain[1])
        loss, metrics = preference_loss(difference, torch.ones_like(difference, dtype=torch.bool))
        return loss, {name: float(value) for name, value in metrics.items()}

    trained = [p for p in network.parameters() if p.requires_grad]
    how: dict[str, Any] = {"state": state, "record": record or unrecorded, "stop": stop or never}
    return optimise(trained, fit, loss_of, "preferences", report, **how)
