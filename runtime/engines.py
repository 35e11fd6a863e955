"""How an update runs on the hardware. The plain engine is the reference that others must equal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
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

    def step(self, optimizer: Optimizer, max_norm: float) -> float:
        """Clip each parameter group's gradient to an L2 norm of `max_norm`, update the weights, clear the gradient.

        Returns:
            The norm of the first group, the policy's, before clipping. Where the gradient of any group is not finite
            the weights and the optimizer's state stay as they were, and that norm is returned.
        """
        from torch.nn.utils import clip_grad_norm_

        norms = [float(clip_grad_norm_(group["params"], max_norm)) for group in optimizer.param_groups]
        if all(map(math.isfinite, norms)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return next((norm for norm in norms if not math.isfinite(norm)), norms[0])
