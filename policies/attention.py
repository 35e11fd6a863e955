"""Attention over frames: masks from one predicate, and the processors that put them into diffusers' blocks.

diffusers' block hands `rotary_emb` and `encoder_hidden_states` to its attention processors unread. Our
processors take richer objects at these places, so the block itself, its parameters and its hooks stay
diffusers' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from policies.causality import Causality
from policies.positions import rotate

Frames = tuple[tuple[int, int], ...]
"""The (segment, frame index) of each frame of a sequence."""


@dataclass(frozen=True)
class Views:
    """Who sees whom, frame by frame.

    Attributes:
        tokens: tokens per frame.
        runs: for each run of query frames that see the same: their number, and the indices of the key frames.
    """

    tokens: int
    runs: tuple[tuple[int, tuple[int, ...]], ...]


Mask = Views | BlockMask | None


def frames_of(segment: int, indices: Sequence[int]) -> Frames:
    """Pair frame indices with their segment."""
    return tuple((segment, index) for index in indices)


def _ids(frames: Frames, tokens: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    pairs = torch.tensor(frames, device=device).repeat_interleave(tokens, dim=0)
    return pairs[:, 0], pairs[:, 1]


def dense_mask(causality: Causality, queries: Frames, keys: Frames, tokens: int, device: torch.device | str) -> Tensor:
    """Evaluate the predicate for every pair of tokens: bool `[queries * tokens, keys * tokens]`."""
    query_segment, query_frame = _ids(queries, tokens, device)
    key_segment, key_frame = _ids(keys, tokens, device)
    return causality.visible(query_segment[:, None], query_frame[:, None], key_segment, key_frame)


def block_mask(causality: Causality, queries: Frames, keys: Frames, tokens: int, device: torch.device) -> BlockMask:
    """Build FlexAttention's sparse mask from the same predicate."""
    query_segment, query_frame = _ids(queries, tokens, device)
    key_segment, key_frame = _ids(keys, tokens, device)

    def predicate(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return causality.visible(query_segment[query], query_frame[query], key_segment[key], key_frame[key])

    return create_block_mask(predicate, None, None, len(queries) * tokens, len(keys) * tokens, device=device)


def frame_views(causality: Causality, queries: Frames, keys: Frames, tokens: int) -> Views:
    """List what each frame sees, from the same predicate at one token per frame."""
    seen = dense_mask(causality, queries, keys, 1, torch.device("cpu")).tolist()
    views = [tuple(key for key, yes in enumerate(row) if yes) for row in seen]
    return Views(tokens, tuple((len(list(run)), view) for view, run in groupby(views)))


@lru_cache(maxsize=64)
def attention_mask(causality: Causality, queries: Frames, keys: Frames, tokens: int, device: torch.device) -> Mask:
    """Return the mask between two sequences of frames, None where everything is visible.

    Neither kind computes what is hidden: FlexAttention skips blocks on CUDA, elsewhere frames go one by one.
    """
    if all(causality.visible(*query, *key) for query in queries for key in keys):
        return None
    if device.type != "cuda":
        return frame_views(causality, queries, keys, tokens)
    with torch.inference_mode(False):  # it is kept, and a later backward may need it
        return block_mask(causality, queries, keys, tokens, device)


def keep_graphs() -> None:
    """Let dynamo keep a graph for each shape that a function meets: beyond its default of 8 it runs uncompiled."""
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 256)


@cache
def _compiled_flex_attention() -> Any:
    keep_graphs()  # one for each frame size, batch and kind of pass
    return torch.compile(flex_attention, dynamic=False)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None = None) -> Tensor:
    """Attend `[B, heads, L, d]` under an optional mask, through SDPA or, for block masks, FlexAttention."""
    if isinstance(mask, BlockMask):
        return _compiled_flex_attention()(query, key, value, block_mask=mask)
    return F.scaled_dot_product_attention(query, key, value)


def attend_by_frame(query: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], views: Views) -> Tensor:
    """Attend `[B, heads, L, d]` to keys and values in several parts: one SDPA per run, over what it sees."""
    # Tokens lie before heads in memory: in that order a frame is copied as one block.
    keys, values = (
        [frame for part in parts for frame in part.transpose(1, 2).split(views.tokens, dim=1)]
        for parts in zip(*pairs, strict=True)
    )
    queries = query.split([count * views.tokens for count, _ in views.runs], dim=2)
    outs = []
    for rows, (_, seen) in zip(queries, views.runs, strict=True):
        key = torch.cat([keys[j] for j in seen], dim=1).transpose(1, 2)
        value = torch.cat([values[j] for j in seen], dim=1).transpose(1, 2)
        outs.append(attend(rows, key, value).transpose(1, 2))
    return torch.cat(outs, dim=1).transpose(1, 2)


class Attention(Protocol):
    """How one layer attends."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Map `[B, heads, L, d]` of the layer's own tokens to `[B, heads, L, d]`."""
        ...


@dataclass
class PrefixAttention:
    """Attend to [given keys | own keys] under a mask; keeps the own keys and values for whoever follows.

    Attributes:
        mask: who sees whom; None: everyone.
        prefix: keys and values of earlier tokens `[B, heads, P, d]`, or None.
        own: keys and values of the last call.
    """

    mask: Mask = None
    prefix: tuple[Tensor, Tensor] | None = None
    own: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; see the class."""
        self.own = (key, value)
        pairs = [self.own] if self.prefix is None else [self.prefix, self.own]
        if isinstance(self.mask, Views):
            return attend_by_frame(query, pairs, self.mask)
        if self.prefix is not None:
            key, value = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
        return attend(query, key, value, self.mask)


@dataclass
class FrameAttention:
    """What a block's self-attention gets in place of rotary embeddings.

    Attributes:
        batch: samples B; the block's batch dimension is B times the groups that share a noise level.
        rotations: see `positions.absolute`.
        attention: the layer's way to attend.
    """

    batch: int
    rotations: Tensor
    attention: Attention


@dataclass
class Context:
    """What a block's cross-attention gets in place of encoder states.

    Attributes:
        batch: samples B.
        text: `[B, L, dim]`.
        image: `[B, I, dim]` or None.
        memory: keys and values of this layer, kept between calls where the text stays the same (no gradient).
        image_queries: the first tokens of a sample, which alone see the image; None: all do.
    """

    batch: int
    text: Tensor
    image: Tensor | None = None
    memory: dict[str, tuple[Tensor, Tensor]] | None = None
    image_queries: int | None = None


def _heads(attn: WanAttention, x: Tensor) -> Tensor:
    return x.unflatten(-1, (attn.heads, -1))


class FrameSelfAttentionProcessor(WanAttnProcessor):
    """Self-attention over a whole sample, whose groups of one noise level lie on the batch dimension."""

    def __call__(  # type: ignore[override]
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: FrameAttention | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend under a `FrameAttention`; anything else goes to diffusers' processor."""
        if not isinstance(rotary_emb, FrameAttention):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        x = hidden_states.reshape(rotary_emb.batch, -1, hidden_states.shape[-1])
        value = _heads(attn, attn.to_v(x)).transpose(1, 2)
        query = rotate(_heads(attn, attn.norm_q(attn.to_q(x))), rotary_emb.rotations).transpose(1, 2).type_as(value)
        key = rotate(_heads(attn, attn.norm_k(attn.to_k(x))), rotary_emb.rotations).transpose(1, 2).type_as(value)
        out = rotary_emb.attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out)).view_as(hidden_states)


class ContextAttentionProcessor(WanAttnProcessor):
    """Cross-attention to text of any length and, where there are any, image tokens."""

    def __call__(  # type: ignore[override]
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Context | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend to a `Context`; anything else goes to diffusers' processor."""
        if not isinstance(encoder_hidden_states, Context):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        context = encoder_hidden_states
        x = hidden_states.reshape(context.batch, -1, hidden_states.shape[-1])
        query = _heads(attn, attn.norm_q(attn.to_q(x))).transpose(1, 2)
        pairs = _context_pairs(attn, context)
        key, value = pairs["text"]
        out = attend(query.type_as(value), key.type_as(value), value)
        if "image" in pairs and context.image_queries != 0:
            key, value = pairs["image"]
            looking = slice(context.image_queries)
            seen = out[:, :, looking] + attend(query[:, :, looking].type_as(value), key.type_as(value), value)
            out = seen if context.image_queries is None else torch.cat([seen, out[:, :, context.image_queries :]], 2)
        out = out.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out)).view_as(hidden_states)


def _context_pairs(attn: WanAttention, context: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values `[B, heads, L, d]` of text and image, from memory where it may be used."""
    remember = context.memory is not None and not torch.is_grad_enabled()
    if remember and context.memory:
        return context.memory
    key = _heads(attn, attn.norm_k(attn.to_k(context.text)))
    value = _heads(attn, attn.to_v(context.text))
    pairs = {"text": (key.transpose(1, 2), value.transpose(1, 2))}
    if context.image is not None:
        key = _heads(attn, attn.norm_added_k(attn.add_k_proj(context.image)))
        value = _heads(attn, attn.add_v_proj(context.image))
        pairs["image"] = (key.transpose(1, 2), value.transpose(1, 2))
    if remember and context.memory is not None:
        context.memory.update(pairs)
    return pairs
