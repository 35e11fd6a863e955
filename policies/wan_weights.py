"""Wan checkpoints of any layout, put into a transformer: names translated, control channels added, nothing left over.

Layouts: a folder as diffusers writes it (safetensors, maybe in several files with an index), or one safetensors file
with diffusers' names or those of the original release (also under the prefix that ComfyUI adds).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from safetensors.torch import load_file
from torch import Tensor, nn

from data.draws import Stream, seed_of
from policies.causal_dit import CausalWanTransformer3DModel

WEIGHTS = "diffusion_pytorch_model"
EMBEDDING = "patch_embedding.weight"
_PREFIX = re.compile(r"^(model\.)?diffusion_model\.")
# Module names of the original release, and diffusers' names of the same modules.
_OUTER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb": "condition_embedder.image_embedder",
    "head.head": "proj_out",
    "head": "",
}
_INNER = {
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}
_LEAF = {"modulation": "scale_shift_table", "emb_pos": "pos_embed"}


def diffusers_name(name: str) -> str:
    """The name that diffusers gives to a weight of the original release.

    >>> diffusers_name("blocks.3.cross_attn.k_img.weight")
    'blocks.3.attn2.add_k_proj.weight'
    >>> diffusers_name("head.modulation")
    'scale_shift_table'
    """
    module, _, leaf = name.rpartition(".")
    leaf = _LEAF.get(leaf, leaf)
    block = re.fullmatch(r"(blocks\.\d+)(?:\.(.+))?", module)
    if block is None:
        module = _OUTER.get(module, module)
        return f"{module}.{leaf}" if module else leaf
    inner = block[2] or ""
    attention = re.fullmatch(r"(self_attn|cross_attn)\.(\w+)", inner)
    if attention is not None:
        inner = f"{_INNER[attention[1]]}.{_ATTENTION.get(attention[2], attention[2])}"
    else:
        inner = _INNER.get(inner, inner)
    return ".".join(part for part in (block[1], inner, leaf) if part)


def translated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under diffusers' names; one that has them already stays as it is."""
    plain = {_PREFIX.sub("", name): value for name, value in state.items()}
    if not any(".self_attn." in name or name.startswith("head.") for name in plain):
        return plain
    return {diffusers_name(name): value for name, value in plain.items()}


def read(path: Path) -> dict[str, Tensor]:
    """Read the weights of a diffusers folder or of one safetensors file, under diffusers' names, on the CPU.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file cannot be read.
    """
    state: dict[str, Tensor] = {}
    for file in files(path):
        try:
            state |= load_file(file)
        except Exception as error:  # safetensors raises an error class of its own
            raise ValueError(f"{file} cannot be read as safetensors ({error}); get it again") from error
    return translated(state)


def files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        FileNotFoundError: one is missing.
    """
    if path.is_file():
        return [path]
    index, whole = path / f"{WEIGHTS}.safetensors.index.json", path / f"{WEIGHTS}.safetensors"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else [whole.name]
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path} has no {', '.join(missing)}; expected a folder as diffusers writes it")
    return [path / name for name in names]


def skeleton(cls: type[CausalWanTransformer3DModel], config: Mapping[str, Any]) -> CausalWanTransformer3DModel:
    """A model without memory behind its parameters (on torch's `meta` device)."""
    with torch.device("meta"):
        return cls(**config)


def fill(
    model: CausalWanTransformer3DModel, state: Mapping[str, Tensor], control: int, dtype: torch.dtype, source: str = ""
) -> None:
    """Put a checkpoint's weights into a `skeleton`, as `dtype` where diffusers does not keep float32.

    The checkpoint may lack the last `control` input channels of the patch embedding; these become zero, so that the
    model computes what it did before it knew them.

    Raises:
        ValueError: names or shapes differ; the message lists every one.
    """
    state, own = dict(state), model.state_dict()
    ignored = model._keys_to_ignore_on_load_unexpected or []
    state = {name: value for name, value in state.items() if not any(part in name for part in ignored)}
    embedding = state.get(EMBEDDING)
    if embedding is not None and control and embedding.shape[1] + control == own[EMBEDDING].shape[1]:
        extra = embedding.new_zeros(embedding.shape[0], control, *embedding.shape[2:])
        state[EMBEDDING] = torch.cat([embedding, extra], 1)
    match(own, state, source)
    for name in list(state):
        state[name] = state[name].to(dtype_of(model, name, dtype))
    model.load_state_dict(state, assign=True)
    _finish(model)


def match(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str, what: str = "model") -> None:
    """Compare a checkpoint's names and shapes with a model's own.

    Raises:
        ValueError: they differ; the message lists every one.
    """
    wrong = [
        f"{name} is {tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    found = [f"{kind} ({len(names)}): {', '.join(sorted(names))}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(f"the weights in {source} do not fit the {what}: {'; '.join(found)}")


@torch.no_grad()
def randomise(model: CausalWanTransformer3DModel, device: str, dtype: torch.dtype, seed: int = 0) -> None:
    """Give a `skeleton` random weights, for measurements of speed: matrices of spread 0.02, the rest as at birth.

    The same on every machine for the same kind of device.
    """
    model.to_empty(device=device)
    draw = torch.Generator(device).manual_seed(seed_of(Stream.TRAINING, seed) % 2**63)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=draw)
        else:
            parameter.fill_(float(name.endswith("weight")))
        parameter.data = parameter.to(dtype_of(model, name, dtype))
    _finish(model)


def dtype_of(model: CausalWanTransformer3DModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a weight in a model of `dtype`: diffusers keeps norms, tables and the time embedding in float32."""
    kept: Iterable[str] = model._keep_in_fp32_modules or ()
    return torch.float32 if any(part in name.split(".") for part in kept) else dtype


def _finish(model: CausalWanTransformer3DModel) -> None:
    """Make what no checkpoint holds: the rotary table."""
    config = model.config
    table: nn.Module = WanRotaryPosEmbed(config.attention_head_dim, config.patch_size, config.rope_max_seq_len)
    model.rope = table
