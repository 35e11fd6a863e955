"""Learning on the toy world, whose best return is 0."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from envs.rollout import RolloutCollector
from envs.schedules import Schedule, Single
from envs.toy import ToySource
from envs.transitions import CPS
from policies.actor import Actor
from policies.adapters import Adaptation, ReferencePolicy
from policies.causality import Causality


class LinearNetwork(nn.Module):
    """A network of two numbers: its clean frame is `mix x + gain condition` (the toy's best: 0 and 1)."""

    config = SimpleNamespace(in_channels=4, out_channels=2)

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([0.3, 0.4]))

    def forward(self, *args: Any, mode: str, commit: int = 0, **_: Any) -> Tensor:
        if mode == "parallel":
            _, frames, sigma, _ = args
        else:
            frames, sigma, _, cache = args
            cache.end += commit
        x, condition = frames.chunk(2, 2)
        clean = self.weights[0] * x + self.weights[1] * condition
        level = sigma[..., None, None, None]
        return torch.where(level > 0, (x - clean) / level.clamp(min=1e-3), 0.0)


def trained(
    settings: Any, seed: int, updates: int = 60, optimizer: Any = None, schedule: Schedule | None = None
) -> tuple[float, float]:
    """Mean toy return of the first and of the last three iterations.

    Args:
        settings: the algorithm.
        seed: of targets and noise.
        updates: rollouts of 4 x 8 samples, each learned from as the algorithm says.
        optimizer: makes one of parameters. Default plain gradient descent: Adam would turn the noise of a control into
            full steps.
        schedule: which steps are stochastic.
    """
    actor = Actor(LinearNetwork(), CPS(), Causality())
    compares = settings.kl_weight > 0 or settings.needs_reference
    module = settings.loss_module(actor, ReferencePolicy(actor, Adaptation()) if compares else None)
    make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    steppers = [make(actor.parameters())]
    if getattr(module, "critic", None) is not None:
        steppers.append(torch.optim.AdamW(module.critic.parameters(), lr=settings.critic_lr))
    source = ToySource(prompts=4, group=8, value=seed, schedule=schedule or Single())
    collector = RolloutCollector(actor, source, source.score)
    rewards = []
    for _ in range(updates):
        rollout = collector.collect()
        rollout["valid"] = torch.ones_like(rollout["reward"], dtype=torch.bool)
        rewards.append(float(rollout["reward"].mean()))
        settings.prepare(rollout, source.group)
        module.begin(rollout)
        for epoch in range(settings.epochs):
            for part, rows in enumerate(torch.arange(32).view(4, 8).roll(epoch, 0).chunk(settings.minibatches)):
                losses = module(rollout[rows.flatten()])
                assert epoch or part or float(losses.get("log_prob_gap", torch.zeros(()))) <= 1e-5
                for stepper in steppers:
                    stepper.zero_grad()
                sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
                for stepper in steppers:
                    stepper.step()
    collector.close()
    return sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
