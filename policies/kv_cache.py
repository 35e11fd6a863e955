"""A bounded memory of finished frames: their keys and values, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from policies.attention import Attention, attend
from policies.causality import Causality

Pair = tuple[Tensor, Tensor]


@dataclass
class KVCache:
    """Keys and values of the frames that the next chunk sees: the sink and the last `window` frames.

    Buffers `[B, heads, (sink + window) * tokens, d]` are allocated at the first write and never grow. A
    frame's place is a function of its index (a ring behind the sink), so all bookkeeping is the integer
    `end`. What is held is exactly what `Causality.visible` shows the chunk that starts at `end`; no mask is
    needed.

    Attributes:
        causality: bounds, and whether gradient flows through the held frames.
        end: number of frames committed since the last reset.
        context: per layer, keys and values of the episode's text (see `attention.Context`).
        compiled: what runs the blocks in place of the model's own method, where something does.
    """

    causality: Causality
    end: int = 0
    context: dict[int, dict[str, Pair]] = field(default_factory=dict)
    _layers: dict[int, Pair] = field(default_factory=dict)
    compiled: Callable[..., Tensor] | None = None

    @property
    def frames(self) -> list[int]:
        """Frames held, in order."""
        return self.causality.held(self.end)

    def reset(self) -> None:
        """Forget everything, buffers too: the next episode may have another batch or frame size."""
        self.end = 0
        self.context.clear()
        self._layers.clear()

    def clone(self) -> KVCache:
        """Copy, so that one may go back to this point."""
        layers = {i: (key.clone(), value.clone()) for i, (key, value) in self._layers.items()}
        context = {i: dict(pairs) for i, pairs in self.context.items()}
        return KVCache(self.causality, self.end, context, layers)

    def attentions(self, layers: int, frames: int, commit: int) -> list[Attention]:
        """How each layer attends in a pass over `frames` frames, the first `commit` of which are clean."""
        return [CachedAttention(self, layer, frames, commit) for layer in range(layers)]

    def read(self, layer: int, frames: int, tokens: int) -> Pair | None:
        """Keys and values `[B, heads, frames * tokens, d]` of the first `frames` places; None for 0."""
        if frames == 0:
            return None
        key, value = self._layers[layer]
        return key.narrow(2, 0, frames * tokens), value.narrow(2, 0, frames * tokens)

    def write(self, layer: int, key: Tensor, value: Tensor, frames: int) -> None:
        """Store the frames `end .. end+frames-1` of one layer: `[B, heads, frames * tokens, d]`, rotated.

        Frames that the next chunk will not see are skipped. Without `history_gradient` the entries are
        detached.
        """
        rule, tokens = self.causality, key.shape[2] // frames
        if not rule.history_gradient:
            key, value = key.detach(), value.detach()
        if layer not in self._layers:
            size = (*key.shape[:2], (rule.sink + rule.window) * tokens, key.shape[3])
            self._layers[layer] = (key.new_empty(size), value.new_empty(size))
        kept = set(rule.held(self.end + frames))
        for i in range(frames):
            frame = self.end + i
            if frame not in kept:
                continue
            place = frame if frame < rule.sink else rule.sink + (frame - rule.sink) % rule.window
            for buffer, new in zip(self._layers[layer], (key, value), strict=True):
                buffer.narrow(2, place * tokens, tokens).copy_(new.narrow(2, i * tokens, tokens))


@dataclass
class CachedAttention:
    """Attend to [cache | own keys], where the first `commit` frames are clean and enter the cache on the way.

    Gradient checkpointing calls it again in the backward pass, when the cache has moved on: where there is gradient it
    keeps what it saw, sees that again, and enters nothing twice.

    Attributes:
        cache: the memory; its `end` is moved on by the caller once all layers have run.
        layer: index of the layer.
        frames: frames in the sequence.
        commit: how many of them, from the first, are clean.
        saw: the parts of the cache that the first call attended to.
    """

    cache: KVCache
    layer: int
    frames: int
    commit: int
    saw: list[Pair | None] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend; clean frames see the cache as it was, noisy ones as it is with the clean frames in it."""
        tokens = key.shape[2] // self.frames
        split = self.commit * tokens
        outs, first, saw = [], not self.saw, iter(tuple(self.saw))
        if self.commit:
            clean_key, clean_value = key[:, :, :split], value[:, :, :split]
            past = self._read(self.cache.end, tokens) if first else next(saw)
            outs.append(self._attend(query[:, :, :split], clean_key, clean_value, past))
            if first:
                self.cache.write(self.layer, clean_key, clean_value, self.commit)
        if self.commit < self.frames:
            past = self._read(self.cache.end + self.commit, tokens) if first else next(saw)
            outs.append(self._attend(query[:, :, split:], key[:, :, split:], value[:, :, split:], past))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _read(self, end: int, tokens: int) -> Pair | None:
        past = self.cache.read(self.layer, len(self.cache.causality.held(end)), tokens)
        if not torch.is_grad_enabled():
            return past
        self.saw.append(None if past is None else (past[0].clone(), past[1].clone()))
        return self.saw[-1]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, past: Pair | None) -> Tensor:
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        return attend(query, key, value)
