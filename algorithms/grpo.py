"""GRPO for autoregressive video diffusion (AR-Drag section 3.3, Eq. 13-14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from algorithms.base import GroupRelative, clipped_terms, even_weights, positive

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from algorithms.policy_loss import Terms
    from envs.transitions import Transition


@dataclass(frozen=True)
class GRPO(GroupRelative):
    """Group-relative policy optimisation with one advantage per latent frame.

    Attributes:
        clip: trust region of the ratio, as a multiple of 1 / sqrt(D): it means the same at every latent size D.
        step_rescaling: weight the loss of a step by mean(k) / k, k its gradient scale.
        log_ratio_clamp: log-ratios are limited to +- this before exp.
    """

    needs_log_prob: ClassVar[bool] = True

    clip: float = 0.02
    step_rescaling: bool = True
    log_ratio_clamp: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "clip", "log_ratio_clamp")

    def loss(
        self, scores: TensorDictBase, batch: TensorDictBase, transition: Transition, initial: TensorDictBase | None
    ) -> Terms:
        """Pure loss of a mini-batch.

        Args:
            scores: `log_prob [B, M, N]`, `mean`, `std` under the weights being trained.
            batch: `log_prob`, `advantage [B, M]`, `mask [B, M, N]`, `sigma`, `latents` (for D).
            transition: kernel of the stochastic steps.
            initial: `mean` under the initial policy; None: no KL.
        """
        log_ratio, advantage = scores["log_prob"] - batch["log_prob"], batch["advantage"][..., None]
        weight = even_weights(transition, batch) if self.step_rescaling else None
        return clipped_terms(self, log_ratio, advantage, weight, scores, batch, initial)
