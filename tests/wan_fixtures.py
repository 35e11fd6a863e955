"""Tiny Wan checkpoints in every layout that the released ones come in, written by the tests themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from algorithms.pretraining.towers import TowerStage, build_text, build_tokenizer
from data.sprites import vocabulary

TEXT, IMAGE = 16, 80
SHAPE = {
    "layers": 2,
    "heads": 2,
    "head_dim": 12,
    "ffn": 32,
    "text_dim": TEXT,
    "frequencies": 16,
    "vae_dim": 4,
    "image_layers": 2,
}
OVERRIDES = [
    "model.text_length=8",
    "model.precision=float32",
    *(f"model.architecture.{key}={value}" for key, value in SHAPE.items()),
]


def released(kind: str) -> WanTransformer3DModel:
    """A tiny model as somebody else would have saved it: without control."""
    torch.manual_seed(0)
    extra: dict[str, Any] = {"image_dim": IMAGE, "added_kv_proj_dim": 24} if kind == "i2v" else {}
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36 if kind == "i2v" else 16,
        out_channels=16,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        **extra,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the original release, written down from its model code."""
    outer = {
        "condition_embedder.text_embedder.linear_1": "text_embedding.0",
        "condition_embedder.text_embedder.linear_2": "text_embedding.2",
        "condition_embedder.time_embedder.linear_1": "time_embedding.0",
        "condition_embedder.time_embedder.linear_2": "time_embedding.2",
        "condition_embedder.time_proj": "time_projection.1",
        "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
        "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
        "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
        "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
        "proj_out": "head.head",
        "patch_embedding": "patch_embedding",
    }
    inner = {"norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
        for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("add_k_proj", "k_img")):
            inner[f"{ours}.{a}"] = f"{theirs}.{b}"
        inner[f"{ours}.add_v_proj"], inner[f"{ours}.norm_added_k"] = f"{theirs}.v_img", f"{theirs}.norm_k_img"
        inner[f"{ours}.norm_q"], inner[f"{ours}.norm_k"] = f"{theirs}.norm_q", f"{theirs}.norm_k"
    named = {}
    for name, value in state.items():
        module, _, leaf = name.rpartition(".")
        if name == "scale_shift_table":
            named["head.modulation"] = value
        elif leaf == "scale_shift_table":
            named[f"{module}.modulation"] = value
        elif module.startswith("blocks."):
            _, number, rest = module.split(".", 2)
            named[f"blocks.{number}.{inner[rest]}.{leaf}"] = value
        else:
            named[f"{outer[module]}.{leaf}"] = value
    return named


def write(folder: Path, kind: str, layout: str) -> WanTransformer3DModel:
    """Write a whole checkpoint; its transformer is `diffusers`, `sharded`, `original` or `prefixed` (ComfyUI's)."""
    model = released(kind)
    if layout in ("diffusers", "sharded"):
        size = {"max_shard_size": "40KB"} if layout == "sharded" else {}
        model.save_pretrained(folder / "transformer", **size)
    else:
        state = original_names({name: value.contiguous() for name, value in model.state_dict().items()})
        prefix = "model.diffusion_model." if layout == "prefixed" else ""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({prefix + name: value for name, value in state.items()}, folder / "wan.safetensors")
    tokenizer = build_tokenizer(vocabulary())
    torch.manual_seed(1)
    AutoencoderKLWan(base_dim=4, num_res_blocks=1).save_pretrained(folder / "vae")
    build_text(TowerStage(width=TEXT, layers=1), len(tokenizer)).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    if kind == "i2v":
        config = CLIPVisionConfig(
            hidden_size=IMAGE,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=28,
            patch_size=14,
        )
        CLIPVisionModel(config).save_pretrained(folder / "image_encoder")
    return model


def hub(cache: Path, name: str, kind: str) -> WanTransformer3DModel:
    """Write a checkpoint as the hub's local cache keeps it."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    model = write(root / "snapshots" / ("0" * 40), kind, "diffusers")
    (root / "snapshots" / ("0" * 40) / "model_index.json").write_text(json.dumps({}))
    return model
