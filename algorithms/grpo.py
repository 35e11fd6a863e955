"""GRPO for autoregressive video diffusion (AR-Drag section 3.3, Eq. 13-14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from algorithms.base import GroupRelative, even_weights, kl_loss, per_latent, positive

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from algorithms.policy_loss import Terms
    from envs.transitions import Transition
    from policies.actor import Actor
    from policies.adapters import ReferencePolicy


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

    def loss_module(self, actor: Actor, reference: ReferencePolicy | None) -> Any:
        """The TorchRL `LossModule` of this algorithm."""
        from algorithms.policy_loss import PolicyLoss

        return PolicyLoss(self, actor, reference)

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
        from algorithms.losses import clipped_surrogate

        objective, metrics = clipped_surrogate(
            scores["log_prob"] - batch["log_prob"],
            batch["advantage"][..., None],
            batch["mask"],
            per_latent(self.clip, batch),
            self.log_ratio_clamp,
            even_weights(transition, batch) if self.step_rescaling else None,
        )
        penalty, kl = kl_loss(self.kl_weight, scores, initial, batch["mask"])
        return {"objective": objective, "kl": penalty}, {**metrics, "kl": kl}
