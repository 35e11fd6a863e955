"""PPO as a whole, critic, advantage estimate and loss, against TorchRL's `GAE` and `ClipPPOLoss`."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from algorithms.ppo import PPO
from envs.transitions import CPS
from policies.actor import Actor
from policies.causality import Causality
from tests.scored import network, random, scored_rollout
from tests.test_losses import MeanNormal


class Rescored(nn.Module):
    """The policy as a module that gives the Gaussians of the stochastic decisions of one rollout."""

    def __init__(self, actor: Actor, rollout: TensorDict) -> None:
        super().__init__()
        self.actor, self.rollout = actor, rollout

    def forward(self, action: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = self.actor.evaluate(self.rollout), self.rollout["stochastic"]
        return scores["mean"][chosen], scores["std"][chosen][:, None, None, None]


class Values(nn.Module):
    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, observation: Tensor) -> Tensor:
        return self.critic(observation)[..., None]


def chain(rollout: TensorDict, observation: Tensor) -> TensorDict:
    """What TorchRL's estimators read: batch `[B, M N]`, a frame's reward at its last step, the end after the last."""
    reward = torch.zeros_like(rollout["log_prob"])
    reward[..., -1] = rollout["reward"]
    seen, paid = observation.flatten(1, 2), reward.flatten(1)[..., None]
    done = torch.zeros_like(paid, dtype=torch.bool)
    done[:, -1] = True
    following = {"observation": seen.roll(-1, 1), "reward": paid, "done": done, "terminated": done}
    return TensorDict({"observation": seen, "next": following}, list(paid.shape[:2]))


@pytest.mark.parametrize("critic", ["head", "net"])
def test_ppo_equals_gae_and_clip_ppo_of_torchrl(critic: str) -> None:
    settings = PPO(kl_weight=0.0, critic=critic, gamma=0.95, lam=0.8, normalize=False, step_rescaling=False, clip=0.005)
    actor = Actor(network(), CPS(), Causality())
    module = settings.loss_module(actor, None)
    rollout = scored_rollout(actor, settings)
    with torch.no_grad():
        module.critic.value.weight.copy_(random(1, 66, seed=3))
    module.begin(rollout)
    with torch.no_grad():  # now the policy has moved: ratios are not 1, some are clipped
        for i, parameter in enumerate(actor.parameters()):
            parameter.add_(0.02 * random(*parameter.shape, seed=i))
    ours = module(rollout)

    values = TensorDictModule(Values(module.critic), ["observation"], ["state_value"])
    data = chain(rollout, rollout["observation"])
    GAE(gamma=0.95, lmbda=0.8, value_network=values, average_gae=False)(data)
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(Rescored(actor, rollout), ["action"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=MeanNormal, return_log_prob=True
        ),
    )
    epsilon = settings.clip / rollout["latents"].shape[3:].numel() ** 0.5
    theirs = ClipPPOLoss(
        policy,
        values,
        clip_epsilon=epsilon,
        entropy_bonus=False,
        functional=False,
        critic_coeff=0.5,
        loss_critic_type="l2",
    )
    theirs.set_keys(sample_log_prob="old")
    chosen = rollout["stochastic"]
    decided = data[chosen.flatten(1)]  # the loss of the policy is over stochastic steps, that of the critic over all
    decided["action"], decided["old"] = rollout["latents"][:, :, 1:][chosen], rollout["log_prob"][chosen]
    objective = theirs(decided)["loss_objective"]
    error, *_ = theirs.loss_critic(data)
    assert 0 < float(ours["clip_fraction"]) < 1 and float(ours["loss_critic"].detach()) > 0.01
    torch.testing.assert_close(ours["loss_objective"], objective, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["loss_critic"], error.mean(), atol=1e-6, rtol=1e-6)
    for loss, reference, weights in (
        ("loss_objective", objective, list(actor.parameters())),
        ("loss_critic", error.mean(), list(module.critic.parameters())),
    ):
        found = torch.autograd.grad(ours[loss], weights, allow_unused=True)
        expected = torch.autograd.grad(reference, weights, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
