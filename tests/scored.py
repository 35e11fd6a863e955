"""A very small network, its scored rollouts on the toy world, and what tests of algorithms share."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from algorithms.grpo import GRPO
from algorithms.policy_loss import PolicyLoss
from envs.rollout import RolloutCollector
from envs.schedules import All, Schedule
from envs.toy import ToySource
from envs.transitions import CPS
from policies.actor import Actor
from policies.adapters import Adaptation, ReferencePolicy
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality

PROMPTS, GROUP = 2, 4


def network() -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=2,
        text_dim=1,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def scored_rollout(actor: Any, settings: GRPO, schedule: Schedule | None = None, iteration: int = 0) -> TensorDict:
    source = ToySource(prompts=PROMPTS, group=GROUP, schedule=schedule or All(), iteration=iteration)
    collector = RolloutCollector(actor, source, source.score)
    rollout = collector.collect()
    collector.close()
    rollout["valid"] = torch.ones_like(rollout["reward"], dtype=torch.bool)
    settings.prepare(rollout, GROUP)
    return rollout


def setting(settings: GRPO) -> tuple[Actor, PolicyLoss]:
    actor = Actor(network(), CPS(), Causality())
    return actor, settings.loss_module(actor, ReferencePolicy(actor, Adaptation()))


def total(losses: TensorDict) -> Tensor:
    return sum((losses[key] for key in losses.keys() if key.startswith("loss_")), torch.zeros(()))  # noqa: SIM118


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
