"""DiffusionNFT: learning on the forward process (arXiv 2509.16117)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from algorithms.base import GroupRelative, positive

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from policies.actor import Actor
    from policies.adapters import ReferencePolicy


@dataclass(frozen=True)
class NFT(GroupRelative):
    """Flow matching on the policy's own clips, towards good ones and away from bad ones. No log-probs: any sampler will
    do, also one without stochastic steps (`schedule=none rollout.share_initial_noise=false`).

    Attributes:
        kl_weight: factor of the mean squared difference of velocities to those of the initial policy.
        strength: how far the positive and the negative velocity stand from those of the policy that acted (the paper's
            beta).
        advantage_max: advantage at which a frame counts as wholly good, and its negative as wholly bad.
        draws: noise levels and noises per clip, the same in every pass over a rollout.
    """

    needs_log_prob: ClassVar[bool] = False

    kl_weight: float = 0.0
    strength: float = 1.0
    advantage_max: float = 3.0
    draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "strength", "advantage_max")
        if self.draws < 1:
            raise ValueError(f"algorithm.draws must be at least 1, got {self.draws}")

    def prepare(self, rollout: TensorDictBase, group_size: int, chunk: int = 1) -> dict[str, float]:
        """Add `advantage [B, M]` and `mask [B, M]`, the frames of groups that are valid."""
        valid, metrics = self.compare(rollout, group_size, chunk)
        rollout["mask"] = valid.clone()
        return metrics

    def loss_module(self, actor: Actor, reference: ReferencePolicy | None) -> Any:
        """The TorchRL `LossModule` of this algorithm."""
        from algorithms.nft_loss import NFTLoss

        return NFTLoss(self, actor, reference)
