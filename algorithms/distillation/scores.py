"""What judges the student's clips: the teacher (real score), a model of the student's clips (fake score), and a
discriminator on the teacher's features.

All see a noised clip, one noise level for all of its frames, with control, reference image and prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from algorithms.distillation.finetune import velocity
from data.draws import Stream, seed_of
from policies.causal_dit import CausalWanTransformer3DModel


def predict_x0(model: CausalWanTransformer3DModel, x: Tensor, sigma: Tensor, condition: Tensor, text: Tensor) -> Tensor:
    """x0 that a bidirectional model predicts from noisy frames `[B, M, C, h, w]` at levels `sigma [B, M]`."""
    return x - sigma[..., None, None, None] * velocity(model, x, sigma, condition, text)


def guided_x0(
    model: CausalWanTransformer3DModel,
    x: Tensor,
    sigma: Tensor,
    condition: Tensor,
    text: Tensor,
    negative: Tensor,
    guidance: float,
) -> Tensor:
    """Classifier-free guidance against the negative prompt: `cond + g (cond - uncond)`; g = 0 is none.

    Control and reference image stay the same on both sides.

    Args:
        model: bidirectional.
        x, sigma, condition, text: as in `predict_x0`.
        negative: `[1, L, D]`.
        guidance: g; usual notation writes g + 1.
    """
    cond = predict_x0(model, x, sigma, condition, text)
    if guidance == 0:
        return cond
    uncond = predict_x0(model, x, sigma, condition, negative.expand_as(text))
    return cond + guidance * (cond - uncond)


class Discriminator(nn.Module):
    """Head on features of the frozen teacher's blocks: one logit per frame.

    Args:
        teacher: frozen; it is not a part of this module, so that only the head trains and is saved.
        layers: blocks whose outputs are read.
        width: hidden width of the head.
        seed: of the head's first weights.

    Raises:
        ValueError: the teacher has no such block.
    """

    def __init__(
        self, teacher: CausalWanTransformer3DModel, layers: Sequence[int], width: int = 64, seed: int = 0
    ) -> None:
        super().__init__()
        if not layers or max(layers) >= len(teacher.blocks) or min(layers) < 0:
            raise ValueError(f"dmd.layers={list(layers)}: the teacher has blocks 0 .. {len(teacher.blocks) - 1}")
        self._teacher, self.layers = [teacher], tuple(layers)
        dim = teacher.config.num_attention_heads * teacher.config.attention_head_dim
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(Stream.TRAINING, seed, 14))
            self.heads = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, 1)) for _ in layers
            )

    def forward(self, x: Tensor, sigma: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        """Logits `[B, M]` of noised clips; positive says real. Gradient flows to `x` through the teacher."""
        found: list[Tensor] = []
        with _recorded(self._teacher[0], self.layers, found):
            velocity(self._teacher[0], x, sigma, condition, text)
        # Blocks run with frames folded onto the batch: [B * M, tokens, dim].
        logits = [head(tokens.float()).mean((1, 2)) for head, tokens in zip(self.heads, found, strict=True)]
        return torch.stack(logits).mean(0).unflatten(0, x.shape[:2])


@contextmanager
def _recorded(model: CausalWanTransformer3DModel, layers: Sequence[int], found: list[Tensor]) -> Iterator[None]:
    hooks = [model.blocks[i].register_forward_hook(lambda block, args, out: found.append(out)) for i in sorted(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
