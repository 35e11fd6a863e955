"""Floating-point operations of the transformer, counted from shapes: two for each multiply-add of a matrix product.

Attention counts the pairs of tokens that see each other and no masked ones; what gradient checkpointing computes again
is not counted; element-wise work is not either. Equal to torch's own counter (tests/test_flops.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from policies.attention import dense_mask, frames_of
from policies.causality import CLEAN, NOISY, Causality


@dataclass(frozen=True)
class Work:
    """Operations of a forward pass: of layers with weights, and of attention between tokens."""

    linear: float
    attention: float

    @property
    def forward(self) -> float:
        """All of it."""
        return self.linear + self.attention

    def trained(self, adapters: bool = False) -> float:
        """Forward and backward. A backward pass is two forward passes; frozen weights beside adapters save one."""
        return self.linear * (2 if adapters else 3) + self.attention * 3


@dataclass(frozen=True)
class Context:
    """What a pass attends to besides itself.

    Attributes:
        text: tokens of the prompt.
        image: tokens of the reference image.
        image_frames: frames that see them.
        remembered: keys and values of both are known from an earlier pass.
    """

    text: int
    image: int = 0
    image_frames: int = 0
    remembered: bool = False


def of_pass(config: Any, frames: int, tokens: int, pairs: float, context: Context) -> Work:
    """Work of the blocks, the embeddings and the head for one sample.

    Args:
        config: of a Wan transformer.
        frames: frames in the sequence, each with a noise level of its own.
        tokens: tokens per frame.
        pairs: pairs of frames (query, key) that see each other.
        context: text and image.
    """
    width, ffn, count = config.num_attention_heads * config.attention_head_dim, config.ffn_dim, frames * tokens
    patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
    known = 0 if context.remembered else context.text + (context.image if context.image_frames else 0)
    blocks = count * (6 * width**2 + 2 * width * ffn) + known * 2 * width**2
    ends = count * width * patch * (config.in_channels + config.out_channels)
    time = frames * (config.freq_dim * width + 7 * width**2)
    text = (1 if context.remembered else context.text) * (config.text_dim + width) * width
    seen = context.image_frames and not context.remembered
    image = context.image * config.image_dim * (config.image_dim + width) if seen else 0
    crossed = count * context.text + context.image_frames * tokens * context.image
    attention = pairs * tokens**2 + crossed
    return Work(
        2 * (config.num_layers * blocks + ends + time + text + image), 4 * config.num_layers * width * attention
    )


def of_parallel(config: Any, rule: Causality, frames: int, tokens: int, context: Context) -> tuple[Work, Work]:
    """Work of a parallel pass for one sample: of the history, which has no gradient by default, and of the frames."""
    past = (frames - 1) // rule.chunk * rule.chunk
    history, present = frames_of(CLEAN, range(past)), frames_of(NOISY, range(frames))
    work = []
    for queries, keys in ((history, history), (present, history + present)):
        if not queries:
            work.append(Work(0.0, 0.0))
            continue
        pairs = float(dense_mask(rule, queries, keys, 1, "cpu").sum())
        work.append(of_pass(config, len(queries), tokens, pairs, context))
    return work[0], work[1]


def of_update(config: Any, rule: Causality, frames: int, tokens: int, context: Context, adapters: bool) -> float:
    """Work of one scored step of every frame of one sample, learned from: parallel pass, forward and backward."""
    history, present = of_parallel(config, rule, frames, tokens, context)
    past = history.trained(adapters) if rule.history_gradient else history.forward
    return past + present.trained(adapters)
