"""Online DPO on denoising steps (Diffusion-DPO arXiv 2311.12908, D3PO arXiv 2311.13231)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from algorithms.base import Compared, kl_terms, one_of, positive

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from algorithms.policy_loss import Terms
    from envs.transitions import Transition

UNITS = ("reward", "spread")


@dataclass(frozen=True)
class DPO(Compared):
    """Direct preference optimisation: the best and the worst samples of a group are the preferred and the other.

    Attributes:
        kl_weight: factor of a KL to the initial policy beside the one that the objective implies.
        beta: how far the policy may leave the initial one: scale of the log-prob margin inside the sigmoid. Log-probs
            are means over D latent values, so this is the beta of the papers times D.
        pairs: pairs of a group and frame: best and worst, second best and second worst, ...
        margin: pairs whose scores differ by no more are left out.
        margin_in: unit of the margin: `reward`, or `spread`, the typical standard deviation of scores inside a group
            (root mean square over the groups and frames of an update), which means the same whatever the rewards weigh.
    """

    needs_log_prob: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = True

    kl_weight: float = 0.0
    beta: float = 50.0
    pairs: int = 2
    margin: float = 0.05
    margin_in: str = "reward"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "beta")
        if self.pairs < 1:
            raise ValueError(f"algorithm.pairs must be at least 1, got {self.pairs}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"algorithm.margin must be 0 or more and finite, got {self.margin}")
        one_of(self, "margin_in", UNITS)

    def prepare(self, rollout: TensorDictBase, group_size: int, chunk: int = 1) -> dict[str, float]:
        """Add `role [B, M, K]` (1: preferred in pair k, -1: the other, 0: not in it), `group_size [B]` and `mask` (the
        stochastic steps of frames in a pair) to a scored rollout.

        Raises:
            ValueError: a group has fewer samples than the pairs need.
        """
        import torch

        from algorithms.advantages import pair_roles, typical_spread

        score, valid, metrics = self.scores(rollout, group_size, chunk)
        unit = typical_spread(score, group_size, valid) if self.margin_in == "spread" else 1.0
        role = pair_roles(score, group_size, self.pairs, self.margin * unit) * valid[..., None]
        if self.credit != "clip":  # a frame without a stochastic step decided nothing
            role = role * rollout["stochastic"].any(-1)[..., None]
        rollout["role"] = role
        rollout["group_size"] = torch.full((len(role),), group_size, device=role.device)
        rollout["mask"] = rollout["stochastic"] & role.ne(0).any(-1, keepdim=True)
        counted = role[:, :1] if self.credit == "clip" else role  # a pair of clips is the same in all frames
        return {**metrics, "pairs": float(counted.clamp(min=0).sum())}

    def sizes(self, batch: TensorDictBase) -> dict[str, float]:
        """The objective is a mean over pairs."""
        role = batch["role"].unflatten(0, (-1, int(batch["group_size"][0])))
        pairs = float(role.ne(0).any(1).sum())
        return dict.fromkeys(("loss_objective", "preference_accuracy", "preference_margin"), pairs)

    def loss(
        self, scores: TensorDictBase, batch: TensorDictBase, transition: Transition, initial: TensorDictBase | None
    ) -> Terms:
        """Pure loss of a mini-batch of whole groups; see `GRPO.loss`. `initial`, with its `log_prob`, must be there.

        With `credit=clip` the steps of all frames of a clip are one decision, otherwise each frame is one.
        """
        from algorithms.losses import preference_loss

        assert initial is not None
        gain = ((scores["log_prob"] - initial["log_prob"]) * batch["stochastic"]).sum(-1)
        if self.credit == "clip":
            gain = gain.sum(1, keepdim=True).expand_as(gain)
        role = batch["role"].unflatten(0, (-1, int(batch["group_size"][0])))
        difference = (role * gain.unflatten(0, role.shape[:2])[..., None]).sum(1)
        objective, metrics = preference_loss(self.beta * difference, role.ne(0).any(1))
        penalty, kl = kl_terms(self.kl_weight, scores, initial, batch["mask"])
        return {"objective": objective, **penalty}, {**metrics, **kl}
