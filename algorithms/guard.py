"""GRPO-Guard: GRPO with normalised ratios (arXiv 2510.22319)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from algorithms.base import GroupRelative, clipped_terms, levels, positive

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from algorithms.policy_loss import Terms
    from envs.transitions import Transition
    from policies.actor import Actor
    from policies.adapters import ReferencePolicy


@dataclass(frozen=True)
class Guard(GroupRelative):
    """GRPO whose log-ratios are centred and brought to one scale for all steps, so that clipping treats steps alike.

    A log-ratio of Gaussians has mean `- |mean - mean_old|^2 / (2 std^2)` under the policy that acted, so plain ratios
    lie below 1 and the upper clip is rarely reached. Here that is added back, and the rest multiplied by std.

    Attributes:
        clip: trust region of the normalised ratio, as a multiple of 1 / sqrt(D).
        log_ratio_clamp: normalised log-ratios are limited to +- this before exp.
    """

    needs_log_prob: ClassVar[bool] = True

    clip: float = 0.02
    log_ratio_clamp: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "clip", "log_ratio_clamp")

    def loss_module(self, actor: Actor, reference: ReferencePolicy | None) -> Any:
        """The TorchRL `LossModule` of this algorithm."""
        from algorithms.guard_loss import GuardLoss

        return GuardLoss(self, actor, reference)

    def loss(
        self, scores: TensorDictBase, batch: TensorDictBase, transition: Transition, initial: TensorDictBase | None
    ) -> Terms:
        """Pure loss of a mini-batch; see `GRPO.loss`. `batch["mean_old"]` is the mean under the weights that acted.

        A step's loss is divided by its length |sigma' - sigma| and multiplied by the mean length of a frame's steps, so
        that the learning rate keeps its meaning.
        """
        from algorithms.losses import guarded_log_ratio, step_weights

        now, later = levels(batch)
        log_ratio = guarded_log_ratio(
            scores["log_prob"] - batch["log_prob"], scores["mean"], batch["mean_old"], scores["std"]
        )
        weight = step_weights(now - later, later > 0)
        return clipped_terms(self, log_ratio, batch["advantage"][..., None], weight, scores, batch, initial)
