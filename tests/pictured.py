"""Very small networks that look at the reference image, for tests of streams and of image tokens."""

from __future__ import annotations

from typing import Any

import torch

from policies.causal_dit import CausalWanTransformer3DModel

TINY: dict[str, Any] = dict(
    num_attention_heads=2, attention_head_dim=16, out_channels=3, text_dim=12, freq_dim=16, ffn_dim=48, num_layers=2
)


def filled(model: Any) -> Any:
    """With weights far from zero."""
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model.eval()


def pictured(image_frames: str) -> CausalWanTransformer3DModel:
    """With image tokens of 10 channels, which the first or all frames look at."""
    model: CausalWanTransformer3DModel = filled(
        CausalWanTransformer3DModel(**TINY, in_channels=13, image_dim=10, added_kv_proj_dim=32)
    )
    model.image_frames = image_frames
    return model
