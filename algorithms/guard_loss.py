"""The TorchRL face of GRPO-Guard."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from algorithms.policy_loss import PolicyLoss


class GuardLoss(PolicyLoss):
    """`PolicyLoss` that keeps the means of the policy that acted."""

    def begin(self, rollout: TensorDictBase) -> dict[str, float]:
        """Add `mean_old [B, M, N, C, h, w]`."""
        with torch.no_grad():
            rollout["mean_old"] = self.actor.evaluate(rollout)["mean"]
        return {}
