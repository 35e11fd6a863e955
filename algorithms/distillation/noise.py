"""Noising of clips: which levels are drawn, and `(1 - sigma) x0 + sigma eps`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.draws import Stream, generator


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise levels `shift u / (1 + (shift - 1) u)` of uniform u in [0, 1]: above 1, more weight to high ones."""
    return shift * u / (1 + (shift - 1) * u)


def noised(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) x0 + sigma eps` with `sigma [B, M]`."""
    level = sigma[..., None, None, None]
    return (1 - level) * x0 + level * eps


@dataclass(frozen=True)
class Noise:
    """How clips are noised before they are judged: `sigma [B, M]`, one level for all frames of a clip, and `eps`."""

    sigma: Tensor
    eps: Tensor

    @staticmethod
    def draw(like: Tensor, key: tuple[int, ...], shift: float, low: float = 0.02, high: float = 0.98) -> Noise:
        """Draw levels `shift u / (1 + (shift - 1) u)` for uniform u, limited to [low, high], and noise.

        Args:
            like: clips `[B, M, C, h, w]`.
            key: of the TRAINING stream.
            shift: above 1, more weight to high levels.
            low, high: limits of the level.
        """
        rng = generator(Stream.TRAINING, *key)
        u = torch.from_numpy(rng.uniform(size=(len(like), 1))).float()
        sigma = shifted(u, shift).clamp(low, high).expand(like.shape[:2])
        eps = torch.from_numpy(rng.standard_normal(tuple(like.shape), dtype="float32"))
        return Noise(sigma.to(like.device), eps.to(like.device))

    def on(self, x0: Tensor) -> Tensor:
        """Noise a clip."""
        return noised(x0, self.eps, self.sigma)

    def cut(self, frames: slice) -> Noise:
        """The noise of some frames."""
        return Noise(self.sigma[:, frames], self.eps[:, frames])
