"""The weighted sum of rewards. A term that failed is never a zero: its sample is invalid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewards.base import Reward, RewardContext, RewardFailed, RewardTerm, check_weight, latent_frames

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor

    from data.clip import ClipBatch

COMBINE = ("sum_then_normalize", "normalize_then_sum")
ON_FAILURE = ("drop", "stop")


@dataclass(frozen=True)
class Composite:
    """Sum of `weight * term`.

    Attributes:
        terms: the rewards by name.
        combine: `sum_then_normalize` sums raw terms (the advantage normalises the sum later);
            `normalize_then_sum` brings each term to zero mean and unit spread within its group and latent
            frame first.
        on_failure: what a failed or non-finite term does: `drop` marks its samples as invalid, `stop`
            raises RewardFailed.
        epsilon: added to the spread in `normalize_then_sum`.
    """

    terms: dict[str, Reward]
    combine: str = "sum_then_normalize"
    on_failure: str = "drop"
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("reward needs at least one term, such as reward=motion+aesthetic")
        for name, term in self.terms.items():
            check_weight(name, term.weight)
        if self.combine not in COMBINE:
            raise ValueError(f"reward combine must be one of {', '.join(COMBINE)}, got {self.combine}")
        if self.on_failure not in ON_FAILURE:
            raise ValueError(f"reward on_failure must be one of {', '.join(ON_FAILURE)}, got {self.on_failure}")
        if not (self.epsilon > 0 and math.isfinite(self.epsilon)):
            raise ValueError(f"reward epsilon must be positive and finite, got {self.epsilon}")

    def prepare(self, context: RewardContext) -> None:
        """Load what the terms need."""
        for term in self.terms.values():
            term.prepare(context)

    def score(self, video: Tensor, batch: ClipBatch, group: int | None = None) -> TensorDict:
        """Evaluate the terms and add them up: `add(evaluate(video, batch), group)`."""
        return self.add(self.evaluate(video, batch), group)

    def evaluate(self, video: Tensor, batch: ClipBatch) -> dict[str, RewardTerm]:
        """Score `video [B, 3, T, H, W]` in [-1, 1] by each term.

        Raises:
            RewardFailed: a term failed and `on_failure` is `stop`.
        """
        return {name: self._checked(name, term, video, batch) for name, term in self.terms.items()}

    def add(self, terms: dict[str, RewardTerm], group: int | None = None) -> TensorDict:
        """Combine evaluated terms.

        `group` is the number of samples per prompt; samples of a prompt stand together. Only
        `normalize_then_sum` needs it.
        Returns a TensorDict of batch [B]: `reward_terms/<name> [B, M]` raw and unweighted, `reward [B, M]`,
        `valid [B, M]` bool. What is invalid in one term is invalid in the sum.
        """
        import torch
        from tensordict import TensorDict

        valid = torch.stack([term.valid for term in terms.values()]).all(0)
        reward = torch.zeros_like(valid, dtype=torch.float32)
        for name, term in terms.items():
            value = term.value.float()
            if self.combine == "normalize_then_sum":
                value = normalize_in_groups(value, valid, group, self.epsilon)
            reward = reward + self.terms[name].weight * value
        return TensorDict(
            {
                "reward_terms": {name: term.value.float() for name, term in terms.items()},
                "reward": reward.where(valid, 0),
                "valid": valid,
            },
            batch_size=[len(valid)],
        )

    def _checked(self, name: str, term: Reward, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """One term, with failures and non-finite values turned into invalid entries (or an error)."""
        import torch

        try:
            result = term.score(video, batch)
        except RewardFailed:
            if self.on_failure == "stop":
                raise
            shape = (len(video), latent_frames(video.shape[2]))
            return RewardTerm(video.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=video.device))
        valid = result.valid & result.value.isfinite()
        if self.on_failure == "stop" and not bool(valid.all()):
            raise RewardFailed(f"reward {name} is invalid for {int((~valid).any(1).sum())} of {len(valid)} samples")
        return RewardTerm(result.value.where(valid, 0), valid, result.metrics)


def metrics_of(terms: dict[str, RewardTerm]) -> dict[str, float]:
    """What to log: `<name>` (mean of the valid raw values) and `<name>/<metric>` of each term."""
    out: dict[str, float] = {}
    for name, term in terms.items():
        out[name] = float(term.value[term.valid].mean()) if bool(term.valid.any()) else float("nan")
        out |= {f"{name}/{key}": value for key, value in term.metrics.items()}
    return out


def normalize_in_groups(value: Tensor, valid: Tensor, group: int | None, epsilon: float) -> Tensor:
    """Bring the valid samples of each group of `value [B, M]` to zero mean and unit spread, per frame.

    Raises:
        ValueError: the group size is missing or does not divide B.
    """
    if group is None or group < 1 or len(value) % group:
        raise ValueError(f"normalize_then_sum needs a group size that divides {len(value)} samples, got {group}")
    x, ok = value.unflatten(0, (-1, group)), valid.unflatten(0, (-1, group)).to(value.dtype)
    count = ok.sum(1, keepdim=True).clamp(min=1)
    mean = (x * ok).sum(1, keepdim=True) / count
    spread = (((x - mean) ** 2 * ok).sum(1, keepdim=True) / count).sqrt()
    return ((x - mean) / (spread + epsilon)).flatten(0, 1)
