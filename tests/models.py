"""A folder of very small networks, freshly initialised."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from algorithms.pretraining.towers import TowerStage, build_text, build_tokenizer, build_vision
from algorithms.pretraining.transformer import Shape, build_transformer
from algorithms.pretraining.vae import VAEStage, build_vae
from data.sprites import vocabulary


def build(folder: Path) -> Path:
    """Write networks smaller than the shipped ones; returns the folder."""
    stage = TowerStage(width=16, layers=2, projection=16)
    tokenizer = build_tokenizer(vocabulary())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build_vae(VAEStage(base_dim=4, dim_mult=[1, 1, 1], z_dim=4)).save_pretrained(folder / "vae")
        build_text(stage, len(tokenizer)).save_pretrained(folder / "text_encoder")
        tokenizer.save_pretrained(folder / "tokenizer")
        for name in ("aesthetic", "aesthetic_eval"):
            build_vision(stage).save_pretrained(folder / name)
            save_file({"weight": torch.randn(1, 16), "bias": torch.zeros(1)}, folder / name / "head.safetensors")
        build_transformer(Shape(dim=24, heads=2, layers=1, ffn=32), 4, 16).save_pretrained(folder / "transformer")
    return folder
