"""The TorchRL face of algorithms that learn from log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from algorithms.base import levels
from algorithms.losses import masked_mean
from envs.transitions import gradient_scale

if TYPE_CHECKING:
    from policies.actor import Actor
    from policies.adapters import ReferencePolicy

# Losses to be added up, by name, and metrics without gradient; all scalars.
Terms = tuple[dict[str, Tensor], dict[str, Tensor]]


class PolicyLoss(LossModule):
    """Re-score a mini-batch of a rollout in parallel passes and return the loss terms of an algorithm.

    Args:
        settings: the algorithm; its `loss(scores, batch, transition, initial)` is a pure function.
        actor: the policy being trained; used as it is (TorchRL's `functional=False`), so that wrappers keep working.
        reference: the initial policy, where the algorithm compares with it.
    """

    def __init__(self, settings: Any, actor: Actor, reference: ReferencePolicy | None) -> None:
        super().__init__()
        self.settings, self.reference, self.actor = settings, reference, actor

    def begin(self, rollout: TensorDictBase) -> dict[str, float]:
        """Add to a prepared rollout what follows from the weights that acted; once, before its first mini-batch."""
        self.observe(rollout)
        return self.settle(rollout)

    def observe(self, rollout: TensorDictBase) -> None:
        """The part of `begin` that looks at each sample alone."""

    def settle(self, rollout: TensorDictBase) -> dict[str, float]:
        """The part of `begin` that compares samples; returns what to log. Where processes share a rollout, it gets the
        entries of up to three dimensions of all of them.
        """
        return {}

    def sizes(self, batch: TensorDictBase) -> dict[str, float]:
        """How many entries of a mini-batch each loss or metric is the mean over; "": those not named.

        Parts of a mini-batch, in one process or several, are weighted by it.
        """
        return {"": float(batch["mask"].sum()), **self.settings.sizes(batch)}

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Loss terms `loss_<name>` and detached metrics, all scalars.

        `log_prob_gap` is the largest difference between acting and re-scored log-probs: on the first update after a
        rollout it is rounding.
        """
        batch = tensordict
        scores = self.actor.evaluate(batch)
        initial = self.reference.evaluate(batch) if self.reference is not None else None
        losses, metrics = self.settings.loss(scores, batch, self.actor.transition, initial)
        metrics["gradient_scale"] = masked_mean(gradient_scale(self.actor.transition, *levels(batch)), batch["mask"])
        gap = torch.where(batch["stochastic"], scores["log_prob"] - batch["log_prob"], 0.0).abs().max()
        return TensorDict(
            {**{f"loss_{name}": value for name, value in losses.items()}, "log_prob_gap": gap.detach(), **metrics}, []
        )
