"""A very small student and teacher, and the clips they are tried on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from algorithms.distillation.rollouts import Student
from envs.ar_video import start
from envs.transitions import CPS
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality

BATCH, LATENT, STEPS = 3, (2, 4, 4), 3
TABLE = torch.tensor([1.0, 0.755, 0.522, 0.0])
SHORT = Causality(window=2)


def network(seed: int = 0, control: bool = True) -> CausalWanTransformer3DModel:
    """A very small model with weights far from zero."""
    model = CausalWanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=(3 if control else 2) * LATENT[0] + 4,
        out_channels=LATENT[0],
        text_dim=6,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=32,
    )
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.15)
    return model.eval()


def student(
    model: CausalWanTransformer3DModel, frames: int = 6, rule: Causality = SHORT, key: int = 0, kernel: Any = None
) -> Student:
    """The student before clips of random conditions."""
    draw = torch.Generator().manual_seed(1)
    state = start(
        condition=torch.randn(BATCH, frames, 4 + 2 * LATENT[0], *LATENT[1:], generator=draw),
        text=torch.randn(BATCH, 5, 6, generator=draw),
        sigma_table=TABLE,
        stochastic=torch.tensor([True, True, False]),
        key=torch.tensor([[7, key, b, 0] for b in range(BATCH)]),
        latent_shape=LATENT,
        share_initial_noise=False,
    )
    truth = torch.randn(BATCH, frames, *LATENT, generator=draw)
    return Student(model, kernel or CPS(eta=1.0), rule, state, truth)


def silent(line: str) -> None:
    """No report."""


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """What a step logs, without how long it took."""
    return {key: value for key, value in row.items() if not key.startswith("seconds/")}


def fixed(who: Student, step: int) -> Tensor:
    return torch.full(who.truth.shape[:2], step)


def weights_gradient(model: CausalWanTransformer3DModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
