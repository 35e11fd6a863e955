"""The shape of the embedded transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data.draws import Stream, seed_of
from envs.control import MASK_CHANNELS
from policies.causal_dit import CausalWanTransformer3DModel


@dataclass(frozen=True)
class Shape:
    """Size of a small transformer.

    Attributes:
        dim: width.
        heads: attention heads.
        layers: transformer blocks.
        ffn: width of the feed-forward layers.
    """

    dim: int = 128
    heads: int = 4
    layers: int = 4
    ffn: int = 384


def build_transformer(shape: Shape, channels: int, text_dim: int, seed: int = 0) -> CausalWanTransformer3DModel:
    """A freshly initialised transformer with control, for `channels` latent channels and prompts `text_dim` wide."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(Stream.TRAINING, seed))
        return CausalWanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=shape.heads,
            attention_head_dim=shape.dim // shape.heads,
            in_channels=channels + MASK_CHANNELS + 2 * channels,
            out_channels=channels,
            text_dim=text_dim,
            freq_dim=64,
            ffn_dim=shape.ffn,
            num_layers=shape.layers,
            rope_max_seq_len=256,
        )
