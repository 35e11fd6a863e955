"""The TorchRL face of GRPO-Guard."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from algorithms.policy_loss import PolicyLoss


class GuardLoss(PolicyLoss):
    """`PolicyLoss` that keeps the means of the policy that acted."""

    @torch.no_grad()
    def observe(self, rollout: TensorDictBase) -> None:
        """Add `mean_old [B, M, N, C, h, w]`."""
        rollout["mean_old"] = self.actor.evaluate(rollout)["mean"]
