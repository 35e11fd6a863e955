"""The weighted sum of rewards. A term that failed is never a zero: its sample is invalid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rewards.base import Reward, RewardContext, RewardFailed, RewardTerm, are_metrics, check_weight, latent_frames

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
            raises RewardFailed. Whatever a term raises, and an answer of another shape, is a failure of all samples.
        epsilon: added to the spread in `normalize_then_sum`.
        optional: terms that may fail: where one did, all samples of the group are summed without it.
    """

    terms: dict[str, Reward]
    combine: str = "sum_then_normalize"
    on_failure: str = "drop"
    epsilon: float = 1e-4
    optional: Sequence[str] = ()

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
        unknown = [name for name in self.optional if name not in self.terms]
        if unknown:
            raise ValueError(f"optional names {unknown[0]}, which is none of the terms {', '.join(self.terms)}")

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
            RewardFailed: a term that is not optional failed and `on_failure` is `stop`.
        """
        return {name: self._checked(name, term, video, batch) for name, term in self.terms.items()}

    def add(self, terms: dict[str, RewardTerm], group: int | None = None) -> TensorDict:
        """Combine evaluated terms.

        `group` is the number of samples per prompt; samples of a prompt stand together. `normalize_then_sum`
        needs it; without it the whole batch is one group to optional terms.
        Returns a TensorDict of batch [B]: `reward_terms/<name> [B, M]` raw and unweighted, `reward [B, M]`,
        `valid [B, M]` bool. What is invalid in one required term is invalid in the sum. Inside a group all
        samples have the same terms.
        """
        import torch
        from tensordict import TensorDict

        counted = {name: self._counted(name, term, group) for name, term in terms.items()}  # [B, 1]
        valid = torch.stack([term.valid | ~counted[name] for name, term in terms.items()]).all(0)
        valid = valid & torch.stack(list(counted.values())).any(0)
        reward = torch.zeros_like(valid, dtype=torch.float32)
        for name, term in terms.items():
            value = term.value.float()
            if self.combine == "normalize_then_sum":
                value = normalize_in_groups(value, valid, group, self.epsilon)
            reward = reward + self.terms[name].weight * value.where(counted[name], 0)
        return TensorDict(
            {
                "reward_terms": {name: term.value.float() for name, term in terms.items()},
                "reward": reward.where(valid, 0),
                "valid": valid,
            },
            batch_size=[len(valid)],
        )

    def _counted(self, name: str, term: RewardTerm, group: int | None) -> Tensor:
        """Samples whose sum holds the term, `[B, 1]`: an optional one counts for whole groups or not at all."""
        import torch

        if name not in self.optional:
            return torch.ones_like(term.valid[:, :1])
        whole = term.valid.unflatten(0, (-1, group or len(term.valid))).all(2).all(1)
        return whole.repeat_interleave(len(term.valid) // len(whole))[:, None]

    def _checked(self, name: str, term: Reward, video: Tensor, batch: ClipBatch) -> RewardTerm:
        """One term, with failures and non-finite values turned into invalid entries (or an error).

        Samples that failed are logged as the share `failed`.
        """
        stop = self.on_failure == "stop" and name not in self.optional
        shape = (len(video), latent_frames(video.shape[2]))
        try:
            result = term.score(video, batch)
            _check_shapes(result, shape)
        except Exception as error:  # a reward is anybody's code
            reason = str(error) if isinstance(error, RewardFailed) else f"{type(error).__name__}: {error}"
            if stop:
                raise RewardFailed(f"reward {name} failed: {reason}") from error
            rest = "its groups are summed without it" if name in self.optional else "its groups are dropped"
            warnings.warn(f"reward {name} failed, {rest}: {reason}")
            nothing = video.new_zeros(shape)
            return RewardTerm(nothing, nothing.bool(), {"failed": 1.0})
        value = result.value.float()  # beyond float32's range is not finite either
        valid = result.valid & value.isfinite()
        lost = int((~valid).any(1).sum())
        if stop and lost:
            raise RewardFailed(f"reward {name} is invalid for {lost} of {len(valid)} samples")
        return RewardTerm(value.where(valid, 0), valid, {**result.metrics, "failed": lost / len(valid)})


def _check_shapes(result: object, shape: tuple[int, int]) -> None:
    """Raise RewardFailed unless a reward returned numbers `[B, M]`, their validity, and metrics."""
    import torch

    if not isinstance(result, RewardTerm):
        raise RewardFailed(f"it returned {type(result).__name__}, not a RewardTerm")
    if not are_metrics(result.metrics):
        raise RewardFailed("its metrics are not numbers by name")
    for name in ("value", "valid"):
        found, boolean = getattr(result, name), name == "valid"
        if not isinstance(found, torch.Tensor):
            raise RewardFailed(f"its {name} is {type(found).__name__}, expected a tensor of shape {shape}")
        if found.shape != shape or (found.dtype == torch.bool) != boolean:
            kind = "bool" if boolean else "numbers"
            raise RewardFailed(f"its {name} is {found.dtype} {tuple(found.shape)}, expected {kind} of shape {shape}")


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
