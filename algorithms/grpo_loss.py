"""The TorchRL face of GRPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from algorithms.losses import masked_mean, step_weights
from envs.transitions import gaussian_kl, gradient_scale

if TYPE_CHECKING:
    from algorithms.grpo import GRPO
    from policies.actor import Actor
    from policies.adapters import ReferencePolicy


class GRPOLoss(LossModule):
    """Re-score a mini-batch of a rollout in parallel passes and return the loss terms of `GRPO`.

    Args:
        settings: the algorithm.
        actor: the policy being trained; used as it is (TorchRL's `functional=False`), so that wrappers keep working.
        reference: the initial policy; None where `kl_weight` is 0.
    """

    def __init__(self, settings: GRPO, actor: Actor, reference: ReferencePolicy | None) -> None:
        super().__init__()
        self.settings, self.reference, self.actor = settings, reference, actor

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Loss terms `loss_objective`, `loss_kl` and detached metrics, all scalars.

        `log_prob_gap` is the largest difference between acting and re-scored log-probs: on the first update after a
        rollout it is rounding.
        """
        actor, batch = self.actor, tensordict
        scores = actor.evaluate(batch)
        sigma = batch["sigma"].float()
        now, later = sigma[..., :-1], sigma[..., 1:]
        scale = gradient_scale(actor.transition, now, later)
        weight = step_weights(scale, later > 0) if self.settings.step_rescaling else None
        kl: Tensor | None = None
        if self.reference is not None:
            initial = self.reference.evaluate(batch)
            kl = gaussian_kl(scores["mean"], initial["mean"], scores["std"][..., None, None, None])
        objective, divergence, metrics = self.settings.loss(scores, batch, weight, kl)
        metrics["gradient_scale"] = masked_mean(scale, batch["mask"])
        gap = torch.where(batch["stochastic"], scores["log_prob"] - batch["log_prob"], 0.0).abs().max()
        return TensorDict(
            {"loss_objective": objective, "loss_kl": divergence, "log_prob_gap": gap.detach(), **metrics}, []
        )
