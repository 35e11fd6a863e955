"""How an update runs on the hardware. The plain engine is the reference that others must equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Plain:
    """One process, float32.

    Attributes:
        threads: CPU threads that torch uses; none leaves torch's own choice.
    """

    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"engine.threads must be at least 1, got {self.threads}")

    def setup(self) -> None:
        """Apply settings of the process; called once, before anything is computed."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` (a scalar) to the parameters."""
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: Optimizer, parameters: Sequence[Parameter], max_norm: float) -> float:
        """Clip the gradient to an L2 norm of `max_norm`, update the weights, clear the gradient.

        Returns:
            The norm before clipping. Where it is not finite the weights and the optimizer's state stay as
            they were.
        """
        from torch.nn.utils import clip_grad_norm_

        norm = float(clip_grad_norm_(parameters, max_norm))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
