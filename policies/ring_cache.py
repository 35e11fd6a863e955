"""A cache of static shape for streaming: the frames in work lie behind the finished ones, so nothing is ever joined.

What is held, and in which order it is seen, is that of `KVCache`; only where the frames in work lie differs. No
gradient: buffers are written in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from policies.attention import Attention, attend, keep_graphs
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.kv_cache import KVCache

COMPILE = ("none", "default", "reduce-overhead", "max-autotune")


class RingCache(KVCache):
    """A `KVCache` whose buffers `[B, heads, (sink + window + chunk) * tokens, d]` are made once.

    Args:
        model: whose keys and values are held.
        causality: chunk, window and sink.
        batch, tokens: samples, and tokens per frame.
        compile: `none`, or a mode of torch.compile; `reduce-overhead` replays CUDA graphs.

    Raises:
        ValueError: unknown mode.
    """

    def __init__(
        self, model: CausalWanTransformer3DModel, causality: Causality, batch: int, tokens: int, compile: str = "none"
    ) -> None:
        super().__init__(causality)
        places = causality.sink + causality.window + causality.chunk
        heads, width = model.config.num_attention_heads, model.config.attention_head_dim
        size = (batch, heads, places * tokens, width)
        self.tokens = tokens
        for layer in range(len(model.blocks)):
            pair = [torch.zeros(size, dtype=model.compute_dtype, device=model.device) for _ in range(2)]
            self._layers[layer] = (pair[0], pair[1])
        self.compiled = None if compile == "none" else self._compile(model, compile)

    def reset(self) -> None:
        """Forget frames and text; the buffers stay."""
        self.end = 0
        self.context.clear()

    def attentions(self, layers: int, frames: int, commit: int) -> list[Attention]:
        """See `KVCache.attentions`."""
        rule, device = self.causality, self._layers[0][0].device
        before, after = rule.held(self.end), rule.held(self.end + commit)
        kept = [i for i in range(commit) if self.end + i in after]
        rows, places = (
            torch.cat([torch.arange(at * self.tokens, (at + 1) * self.tokens, device=device) for at in where])
            if where
            else None
            for where in (kept if len(kept) < commit else [], [self._place(self.end + i) for i in kept])
        )
        held = len(before) * self.tokens, len(after) * self.tokens
        return [
            RingAttention(*self._layers[layer], commit * self.tokens, *held, rows, places) for layer in range(layers)
        ]

    def keep(self) -> tuple[int, list[Tensor]]:
        """Copy what is held, to `restore` it later."""
        return self.end, [buffer.clone() for pair in self._layers.values() for buffer in pair]

    def restore(self, kept: tuple[int, list[Tensor]]) -> None:
        """Go back to what `keep` copied."""
        self.end = kept[0]
        buffers = [buffer for pair in self._layers.values() for buffer in pair]
        for buffer, copy in zip(buffers, kept[1], strict=True):
            buffer.copy_(copy)

    def _place(self, frame: int) -> int:
        rule = self.causality
        return frame if frame < rule.sink else rule.sink + (frame - rule.sink) % rule.window

    def _compile(self, model: CausalWanTransformer3DModel, mode: str) -> Callable[..., Tensor]:
        if mode not in COMPILE:
            raise ValueError(f"compile must be one of {', '.join(COMPILE)}, got {mode!r}")
        keep_graphs()  # one for each number of held frames, with and without a clean frame
        for pair in self._layers.values():
            for buffer in pair:
                torch._dynamo.mark_static_address(buffer)
        compiled: Callable[..., Tensor] = torch.compile(
            model._blocks, mode=None if mode == "default" else mode, dynamic=False, fullgraph=True
        )

        def run(*args: Any) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()  # nothing of the pass before is needed any more
            return compiled(*args)

        return run


@dataclass
class RingAttention:
    """Attend to [finished frames | own tokens], one stretch of the buffers; clean tokens come first and enter the ring.

    Attributes:
        key, value: the buffers.
        clean: tokens of finished frames among the layer's own.
        before, after: tokens held before and after these have entered.
        rows: clean tokens that are kept; None: all.
        places: their places.
    """

    key: Tensor
    value: Tensor
    clean: int
    before: int
    after: int
    rows: Tensor | None
    places: Tensor | None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; see the class."""
        clean, outs = self.clean, []
        if clean:
            new = key[:, :, :clean], value[:, :, :clean]
            outs.append(self._attend(query[:, :, :clean], *new, self.before))
            if self.places is not None:
                for buffer, entry in zip((self.key, self.value), new, strict=True):
                    chosen = entry if self.rows is None else entry.index_select(2, self.rows)
                    buffer.index_copy_(2, self.places, chosen)
        if clean < key.shape[2]:
            outs.append(self._attend(query[:, :, clean:], key[:, :, clean:], value[:, :, clean:], self.after))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, held: int) -> Tensor:
        end = held + key.shape[2]
        self.key[:, :, held:end] = key
        self.value[:, :, held:end] = value
        return attend(query, self.key[:, :, :end], self.value[:, :, :end])
