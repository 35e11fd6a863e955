"""GRPO for autoregressive video diffusion (AR-Drag section 3.3, Eq. 13-14)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from data.draws import Stream, seed_of

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import Tensor

    from policies.actor import Actor
    from policies.adapters import ReferencePolicy


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimisation with one advantage per latent frame.

    Attributes:
        clip: trust region of the ratio, as a multiple of 1 / sqrt(D): it means the same at every latent size D.
        kl_weight: factor of the KL to the initial policy, in closed form between Gaussians; 0 keeps no reference.
        epochs: passes over a rollout.
        minibatches: optimizer steps per pass; divides the samples of an update.
        history_baseline: take out of a frame's reward what the reward of the frame before it predicts.
        advantage_std: `unbiased` (n - 1) or `biased` (n) standard deviation of a group.
        advantage_eps: added to that standard deviation, in units of reward.
        step_rescaling: weight the loss of a step by mean(k) / k, k its gradient scale.
        log_ratio_clamp: log-ratios are limited to +- this before exp.
        shuffle_advantages: permute advantages inside each group: the control in which nothing can be learned.
    """

    group_relative: ClassVar[bool] = True
    needs_log_prob: ClassVar[bool] = True

    clip: float = 0.02
    kl_weight: float = 0.01
    epochs: int = 1
    minibatches: int = 1
    history_baseline: bool = True
    advantage_std: str = "unbiased"
    advantage_eps: float = 0.05
    step_rescaling: bool = True
    log_ratio_clamp: float = 5.0
    shuffle_advantages: bool = False

    def __post_init__(self) -> None:
        for name in ("clip", "advantage_eps", "log_ratio_clamp"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"algorithm.{name} must be positive and finite, got {value}")
        if not (math.isfinite(self.kl_weight) and self.kl_weight >= 0):
            raise ValueError(f"algorithm.kl_weight must be 0 or more and finite, got {self.kl_weight}")
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"algorithm.{name} must be at least 1, got {getattr(self, name)}")
        if self.advantage_std not in ("unbiased", "biased"):
            raise ValueError(f"algorithm.advantage_std must be unbiased or biased, got {self.advantage_std!r}")

    def prepare(self, rollout: TensorDictBase, group_size: int) -> dict[str, float]:
        """Add `advantage [B, M]` and `mask [B, M, N]` (stochastic steps of groups that are valid) to a scored rollout.

        Returns:
            Numbers to log: spread inside the groups kept (nan where none is), groups dropped.
        """
        from algorithms.advantages import group_advantage, group_valid, shuffle_in_groups, without_history

        valid = group_valid(rollout["valid"], group_size)
        reward = rollout["reward"]
        if self.history_baseline:
            reward = without_history(reward, valid, group_size)
        advantage = group_advantage(reward, group_size, self.advantage_std, self.advantage_eps)
        if self.shuffle_advantages:
            seed, iteration = rollout["key"][0, :2].tolist()
            advantage = shuffle_in_groups(advantage, group_size, seed_of(Stream.TRAINING, seed, iteration, 1))
        rollout["advantage"] = advantage
        rollout["mask"] = rollout["stochastic"] & valid[..., None]
        kept = valid[::group_size, 0]
        spread = rollout["reward"].unflatten(0, (-1, group_size)).std(dim=1)[kept]
        return {"group_std": float(spread[:, 1:].mean()), "groups_dropped": float((~kept).sum())}

    def loss_module(self, actor: Actor, reference: ReferencePolicy | None) -> Any:
        """The TorchRL `LossModule` of this algorithm."""
        from algorithms.grpo_loss import GRPOLoss

        return GRPOLoss(self, actor, reference)

    def loss(
        self, scores: TensorDictBase, batch: TensorDictBase, weight: Tensor | None, kl: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Pure loss of a mini-batch.

        Args:
            scores: `log_prob [B, M, N]` under the weights being trained.
            batch: `log_prob`, `advantage [B, M]`, `mask [B, M, N]`, `latents` (for D).
            weight: factor of each step's objective, `[B, M, N]`.
            kl: KL to the reference per step, `[B, M, N]`.

        Returns:
            The objective and the weighted KL, to be added, and metrics; all scalars.
        """
        from algorithms.losses import clipped_surrogate, masked_mean

        dimensions = batch["latents"].shape[3:].numel()
        objective, metrics = clipped_surrogate(
            scores["log_prob"],
            batch["log_prob"],
            batch["advantage"],
            batch["mask"],
            self.clip / math.sqrt(dimensions),
            self.log_ratio_clamp,
            weight,
        )
        divergence = masked_mean(kl, batch["mask"]) if kl is not None else objective.new_zeros(())
        return objective, self.kl_weight * divergence, {**metrics, "kl": divergence.detach()}
