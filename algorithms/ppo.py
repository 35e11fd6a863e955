"""PPO with a critic over the chain of denoising decisions (arXiv 1707.06347; DPPO arXiv 2409.00588)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from algorithms.base import Updates, clipped_terms, even_weights, one_of, positive

if TYPE_CHECKING:
    from tensordict import TensorDictBase

    from algorithms.policy_loss import Terms
    from envs.transitions import Transition
    from policies.actor import Actor
    from policies.adapters import ReferencePolicy

CRITICS = ("head", "net")


@dataclass(frozen=True)
class PPO(Updates):
    """Clipped policy gradient with advantages from a critic: generalised advantage estimation over the M x N decisions
    of a clip, frame after frame and step after step; a frame's reward comes with its last step.

    Attributes:
        clip: trust region of the ratio, as a multiple of 1 / sqrt(D): it means the same at every latent size D.
        gamma: discount of a decision, in [0, 1].
        lam: lambda of the advantage estimate, in [0, 1]; 1 is the return less the value, 0 the one-step error.
        critic: `head` on the policy's own features, or `net`, a network of its own that looks at latents and condition.
        critic_lr: learning rate of the critic; it falls as the policy's does.
        critic_width: hidden width of the critic.
        normalize: bring the advantages of an update to mean 0 and standard deviation 1.
        advantage_eps: added to that standard deviation, in units of reward.
        step_rescaling: weight the loss of a step by mean(k) / k, k its gradient scale.
        log_ratio_clamp: log-ratios are limited to +- this before exp.
    """

    group_relative: ClassVar[bool] = False
    needs_log_prob: ClassVar[bool] = True

    epochs: int = 2
    minibatches: int = 2
    clip: float = 0.02
    gamma: float = 1.0
    lam: float = 0.9
    critic: str = "head"
    critic_lr: float = 3e-3
    critic_width: int = 64
    normalize: bool = True
    advantage_eps: float = 0.05
    step_rescaling: bool = True
    log_ratio_clamp: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "clip", "critic_lr", "advantage_eps", "log_ratio_clamp")
        one_of(self, "critic", CRITICS)
        if self.critic_width < 1:
            raise ValueError(f"algorithm.critic_width must be at least 1, got {self.critic_width}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"algorithm.{name} must lie in [0, 1], got {getattr(self, name)}")

    def prepare(self, rollout: TensorDictBase, group_size: int, chunk: int = 1) -> dict[str, float]:
        """Add `mask [B, M, N]`, the stochastic steps of samples whose rewards are all valid, to a scored rollout."""
        whole = rollout["valid"].all(1)
        rollout["mask"] = rollout["stochastic"] & whole[:, None, None]
        return {"samples_dropped": float((~whole).sum())}

    def loss_module(self, actor: Actor, reference: ReferencePolicy | None) -> Any:
        """The TorchRL `LossModule` of this algorithm."""
        from algorithms.ppo_loss import PPOLoss

        return PPOLoss(self, actor, reference)

    def loss(
        self, scores: TensorDictBase, batch: TensorDictBase, transition: Transition, initial: TensorDictBase | None
    ) -> Terms:
        """Pure loss of the policy on a mini-batch; see `GRPO.loss`. Here `advantage` is `[B, M, N]`."""
        log_ratio = scores["log_prob"] - batch["log_prob"]
        weight = even_weights(transition, batch) if self.step_rescaling else None
        return clipped_terms(self, log_ratio, batch["advantage"], weight, scores, batch, initial)
