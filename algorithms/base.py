"""What algorithms share: how a rollout is cut into updates, and how a group is compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from algorithms.advantages import (
    STD,
    credited,
    group_advantage,
    group_valid,
    shuffle_in_groups,
    without_history,
)
from data.draws import Stream, seed_of

if TYPE_CHECKING:
    from tensordict import TensorDictBase
    from torch import Tensor

    from algorithms.policy_loss import Terms
    from envs.transitions import Transition
    from policies.actor import Actor
    from policies.adapters import ReferencePolicy

CREDIT = ("per_frame", "return_to_go", "clip")
NORMALIZE = ("group", "global")


class Algorithm(Protocol):
    """Settings of an algorithm, and how it learns. `PolicyLoss` and the loop of `experiments/train.py` use this.

    Attributes:
        group_relative: it compares the samples of a group, which must have two or more.
        needs_log_prob: it learns from log-probs, so a schedule must leave stochastic steps.
        needs_reference: it compares with the initial policy whatever `kl_weight` is.
        whole_groups: a mini-batch holds whole groups.
        kl_weight: factor of the KL to the initial policy; 0 needs none.
        epochs: passes over a rollout.
        minibatches: optimizer steps per pass.
    """

    group_relative: ClassVar[bool]
    needs_log_prob: ClassVar[bool]
    needs_reference: ClassVar[bool]
    whole_groups: ClassVar[bool]
    kl_weight: float
    epochs: int
    minibatches: int

    def prepare(self, rollout: TensorDictBase, group_size: int, chunk: int = 1) -> dict[str, float]:
        """Add to a scored rollout what the loss reads, `mask` among it; return what to log."""
        ...

    def loss_module(self, actor: Actor, reference: ReferencePolicy | None) -> Any:
        """The TorchRL `LossModule` of this algorithm."""
        ...


@dataclass(frozen=True)
class Updates:
    """How a rollout becomes optimizer steps.

    Attributes:
        kl_weight: factor of the KL to the initial policy, in closed form between Gaussians; 0 keeps no reference.
        epochs: passes over a rollout.
        minibatches: optimizer steps per pass; divides the samples of an update.
    """

    needs_reference: ClassVar[bool] = False
    whole_groups: ClassVar[bool] = False

    kl_weight: float = 0.01
    epochs: int = 1
    minibatches: int = 1

    def __post_init__(self) -> None:
        at_least(self, 0, "kl_weight")
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"algorithm.{name} must be at least 1, got {getattr(self, name)}")

    def loss_module(self, actor: Actor, reference: ReferencePolicy | None) -> Any:
        """The TorchRL `LossModule` of this algorithm: by default `PolicyLoss` around its pure `loss`."""
        from algorithms.policy_loss import PolicyLoss

        return PolicyLoss(self, actor, reference)

    def sizes(self, batch: TensorDictBase) -> dict[str, float]:
        """Entries that losses and metrics are means over, by name, where these are not those of `mask`."""
        return {}


@dataclass(frozen=True)
class Compared(Updates):
    """What is compared between the samples of a group.

    Attributes:
        credit: which rewards a frame answers for: `per_frame` its own (the paper), `return_to_go` the sum of its own
            and all later ones, `clip` the sum over the clip.
        history_baseline: take out of a frame's score what the reward of the frame before it predicts; with
            `credit=clip`, where all frames share one score, nothing.
        shuffle_advantages: permute scores inside each group: the control in which nothing can be learned.
    """

    group_relative: ClassVar[bool] = True

    credit: str = "per_frame"
    history_baseline: bool = True
    shuffle_advantages: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "credit", CREDIT)

    def scores(self, rollout: TensorDictBase, group_size: int, chunk: int) -> tuple[Tensor, Tensor, dict[str, float]]:
        """What each frame answers for, less what was decided before it.

        Returns:
            Scores `[B, M]`; `[B, M]` bool, True in groups without a failure; and numbers to log: spread of rewards
            inside these groups (nan where there is none), groups dropped.
        """
        reward, valid = rollout["reward"], group_valid(rollout["valid"], group_size)
        score = credited(reward, self.credit, chunk)
        if self.history_baseline and self.credit != "clip":  # a clip has one score for all its frames
            score = without_history(score, reward, valid, group_size, chunk)
        if self.shuffle_advantages:
            seed, iteration = rollout["key"][0, :2].tolist()
            score = shuffle_in_groups(score, group_size, seed_of(Stream.TRAINING, seed, iteration, 1))
        kept = valid[::group_size, 0]
        inside = reward.unflatten(0, (-1, group_size)).std(dim=1)[kept]
        return score, valid, {"group_std": float(inside[:, 1:].mean()), "groups_dropped": float((~kept).sum())}


@dataclass(frozen=True)
class GroupRelative(Compared):
    """Advantages relative to the group.

    Attributes:
        normalize: spread by which advantages are divided: `group`, of each group, or `global`, one for all groups.
        advantage_std: `unbiased` (n - 1) or `biased` (n) standard deviation.
        advantage_eps: added to that standard deviation, in units of reward.
    """

    normalize: str = "group"
    advantage_std: str = "unbiased"
    advantage_eps: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "advantage_eps")
        one_of(self, "normalize", NORMALIZE)
        one_of(self, "advantage_std", STD)

    def compare(self, rollout: TensorDictBase, group_size: int, chunk: int) -> tuple[Tensor, dict[str, float]]:
        """Add `advantage [B, M]` to a scored rollout.

        Returns:
            `[B, M]` bool, True in groups without a failure; and numbers to log, see `scores`.
        """
        score, valid, metrics = self.scores(rollout, group_size, chunk)
        how = (self.advantage_std, self.normalize, self.advantage_eps)
        rollout["advantage"] = group_advantage(score, group_size, *how, valid)
        return valid, metrics

    def prepare(self, rollout: TensorDictBase, group_size: int, chunk: int = 1) -> dict[str, float]:
        """Add `advantage [B, M]` and `mask [B, M, N]`, the stochastic steps of groups that are valid."""
        valid, metrics = self.compare(rollout, group_size, chunk)
        rollout["mask"] = rollout["stochastic"] & valid[..., None]
        return metrics


def clipped_terms(
    settings: Any,
    log_ratio: Tensor,
    advantage: Tensor,
    weight: Tensor | None,
    scores: TensorDictBase,
    batch: TensorDictBase,
    initial: TensorDictBase | None,
) -> Terms:
    """Clipped surrogate and KL of a mini-batch.

    Args:
        settings: an algorithm with `clip` (in multiples of 1 / sqrt(D)), `log_ratio_clamp` and `kl_weight`.
        log_ratio: `[B, M, N]`; advantage broadcasts with it.
        advantage: see `clipped_surrogate`.
        weight: factor of each step's loss, `[B, M, N]`.
        scores: under the weights being trained.
        batch: `mask [B, M, N]`, `latents` (for D).
        initial: under the initial policy; None: no KL.
    """
    from algorithms.losses import clipped_surrogate

    clip = settings.clip / math.sqrt(batch["latents"].shape[3:].numel())
    objective, metrics = clipped_surrogate(log_ratio, advantage, batch["mask"], clip, settings.log_ratio_clamp, weight)
    penalty, kl = kl_terms(settings.kl_weight, scores, initial, batch["mask"])
    return {"objective": objective, **penalty}, {**metrics, **kl}


def kl_terms(weight: float, scores: TensorDictBase, initial: TensorDictBase | None, mask: Tensor) -> Terms:
    """`weight` times the KL to the initial policy over the steps of `mask`, and the KL itself without gradient, both
    as `kl`; nothing where there is no initial policy: what was not measured is not logged.
    """
    from algorithms.losses import masked_mean
    from envs.transitions import gaussian_kl

    if initial is None:
        return {}, {}
    kl = masked_mean(gaussian_kl(scores["mean"], initial["mean"], scores["std"][..., None, None, None]), mask)
    return {"kl": weight * kl}, {"kl": kl.detach()}


def levels(batch: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Noise levels before and after each step, `[B, M, N]`."""
    sigma = batch["sigma"].float()
    return sigma[..., :-1], sigma[..., 1:]


def even_weights(transition: Transition, batch: TensorDictBase) -> Tensor:
    """Factors of the steps' losses that even out their gradient scale, `[B, M, N]`."""
    from algorithms.losses import step_weights
    from envs.transitions import gradient_scale

    now, later = levels(batch)
    return step_weights(gradient_scale(transition, now, later), later > 0)


def at_least(settings: object, low: float, *names: str) -> None:
    """Refuse values below `low`, infinite ones and nan."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= low):
            raise ValueError(f"algorithm.{name} must be {low} or more and finite, got {value}")


def positive(settings: object, *names: str) -> None:
    """Refuse values that are not positive and finite."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"algorithm.{name} must be positive and finite, got {value}")


def one_of(settings: object, name: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among `choices`."""
    if getattr(settings, name) not in choices:
        raise ValueError(f"algorithm.{name} must be {' or '.join(choices)}, got {getattr(settings, name)!r}")
