"""The TorchRL face of PPO, and its advantage estimate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.value.functional import generalized_advantage_estimate

from algorithms.critics import build_critic
from algorithms.policy_loss import PolicyLoss

if TYPE_CHECKING:
    from algorithms.ppo import PPO
    from policies.actor import Actor
    from policies.adapters import ReferencePolicy


def chain_advantage(reward: Tensor, value: Tensor, gamma: float, lam: float, chunk: int = 1) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimate over the chain of M x N decisions (arXiv 1506.02438), by TorchRL.

    Frames of a chunk take their steps together, so a chunk is one link of the chain: M / `chunk` x N decisions. Its
    value is the mean of what its frames say, its reward their sum, and its advantage and target are those of all.

    Args:
        reward: of each finished frame, `[B, M]`; it comes with the frame's last step.
        value: of the state before each decision, `[B, M, N]`; after the last it is 0.
        gamma, lam: discount and lambda, per decision.
        chunk: frames denoised together, dividing M.

    Returns:
        Advantages and value targets, both `[B, M, N]`.
    """
    value = value.unflatten(1, (-1, chunk)).mean(2)
    paid = torch.zeros_like(value)
    paid[..., -1] = reward.unflatten(1, (-1, chunk)).sum(2)
    paid, before = (x.flatten(1)[..., None] for x in (paid, value))
    after = torch.cat([before[:, 1:], torch.zeros_like(before[:, :1])], 1)
    done = torch.zeros_like(before, dtype=torch.bool)
    done[:, -1] = True
    advantage, target = generalized_advantage_estimate(gamma, lam, before, after, paid, done, done)
    advantage, target = (x.view_as(value).repeat_interleave(chunk, 1) for x in (advantage, target))
    return advantage, target


def normalized(advantage: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Bring the entries of `mask` to mean 0 and standard deviation 1, less what `eps` adds to it; the others are 0."""
    chosen = advantage[mask]
    if chosen.numel() < 2:
        return torch.zeros_like(advantage)
    chosen = chosen - chosen[0]  # the mean of equal numbers is rounded
    shifted = torch.where(mask, advantage - advantage[mask][0], 0.0)
    return torch.where(mask, (shifted - chosen.mean()) / (chosen.std() + eps), 0.0)


class PPOLoss(PolicyLoss):
    """`PolicyLoss` with a critic, which is `critic` and learns beside the policy.

    The critic reads what was observed under the weights that acted; no gradient of it reaches the policy.
    """

    def __init__(self, settings: PPO, actor: Actor, reference: ReferencePolicy | None) -> None:
        super().__init__(settings, actor, reference)
        self.critic = build_critic(settings.critic, settings.critic_width, actor)

    @torch.no_grad()
    def observe(self, rollout: TensorDictBase) -> None:
        """Add `observation [B, M, N, F]` and `value [B, M, N]`."""
        rollout["observation"] = self.critic.observe(rollout)
        rollout["value"] = self.critic(rollout["observation"])

    def sizes(self, batch: TensorDictBase) -> dict[str, float]:
        """See `PolicyLoss.sizes`; the critic's is a mean over the decisions of samples without a failure."""
        whole = batch["valid"].all(1)[:, None, None].expand_as(batch["value_target"])
        return {**super().sizes(batch), "loss_critic": float(whole.sum())}

    @torch.no_grad()
    def settle(self, rollout: TensorDictBase) -> dict[str, float]:
        """Add `advantage` and `value_target`, both `[B, M, N]`; return how well values fit."""
        value, chunk, gamma = rollout["value"], self.actor.causality.chunk, self.settings.gamma
        advantage, target = chain_advantage(rollout["reward"], value, gamma, self.settings.lam, chunk)
        whole = rollout["valid"].all(1)
        mask = rollout["mask"]
        rollout["value_target"] = target
        eps = self.settings.advantage_eps
        rollout["advantage"] = normalized(advantage, mask, eps) if self.settings.normalize else advantage
        # What was paid, not the target: that contains the value, and so explains itself.
        paid = chain_advantage(rollout["reward"], torch.zeros_like(value), gamma, 1.0, chunk)[1]
        errors, spread = (paid - value)[whole], paid[whole]
        return {
            "value": float(value[whole].mean()),
            "explained_variance": float(1 - errors.var() / spread.var().clamp(min=1e-12)),
        }

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """As `PolicyLoss.forward`, with `loss_critic`: half the mean squared error of the values."""
        losses = super().forward(tensordict)
        error = self.critic(tensordict["observation"]) - tensordict["value_target"]
        whole = tensordict["valid"].all(1)[:, None, None].expand_as(error)
        losses["loss_critic"] = 0.5 * error[whole].square().sum() / whole.sum().clamp(min=1)
        return losses
