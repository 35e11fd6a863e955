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


def network(
    seed: int = 0, channels: tuple[int, int] = (4, 2), text_dim: int = 1, ffn_dim: int = 32
) -> CausalWanTransformer3DModel:
    """With weights far from zero; `channels` in and out. As it is, it fits the toy world."""
    torch.manual_seed(seed)
    model = CausalWanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=channels[0],
        out_channels=channels[1],
        text_dim=text_dim,
        freq_dim=16,
        ffn_dim=ffn_dim,
        num_layers=2,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def rewarded(reward: Tensor, stochastic: Tensor | None = None) -> TensorDict:
    """Rewards `[B, M]` of valid frames, and which of their steps were stochastic: all of two, unless `[B, M, N]`."""
    valid = torch.ones_like(reward, dtype=torch.bool)
    drawn = valid[..., None].repeat(1, 1, 2) if stochastic is None else stochastic
    return TensorDict({"reward": reward, "valid": valid, "stochastic": drawn}, [len(reward)])


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
