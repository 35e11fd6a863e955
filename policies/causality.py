"""Which frames a frame may look at: the settings, and the one predicate that every mask is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CLEAN, NOISY = 0, 1
"""Segments of a sequence: frames at sigma 0 that serve as history, and frames being denoised."""


@dataclass(frozen=True)
class Causality:
    """Visible history of a frame. Frames are latent frames (AR-Drag, section 3.2: chunk 1, cache 7).

    Attributes:
        chunk: frames denoised together; they see each other at their own noise level.
        window: finished frames before the chunk that it sees.
        sink: frames at the start of the video that stay visible for ever.
        history_gradient: let gradient flow through the keys and values of finished frames. Off by default:
            history is data, and its pass then costs no backward.
    """

    chunk: int = 1
    window: int = 7
    sink: int = 0
    history_gradient: bool = False

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("window", 0), ("sink", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"causality.{name} must be at least {least}, got {getattr(self, name)}")

    def chunks(self, frames: int) -> int:
        """Number of chunks of a clip; the last may be cut short."""
        return -(-frames // self.chunk)

    def spread(self, values: Any, frames: int) -> Any:
        """Give every frame its chunk's value: a tensor `[..., chunks]` -> `[..., frames]`."""
        return values.repeat_interleave(self.chunk, -1)[..., :frames]

    def visible(self, query_segment: Any, query_frame: Any, key_segment: Any, key_frame: Any) -> Any:
        """Say whether a query token may attend to a key token; elementwise over integers or integer tensors.

        A token sees its own chunk in its own segment, and of the clean segment the `window` frames before its
        chunk and the first `sink` frames. The same rule holds for the clean frames themselves, and no token
        ever sees another chunk's noise.
        """
        start = query_frame // self.chunk * self.chunk
        own = (query_segment == key_segment) & (key_frame // self.chunk == query_frame // self.chunk)
        recent = (key_frame >= start - self.window) | (key_frame < self.sink)
        return own | ((key_segment == CLEAN) & (key_frame < start) & recent)

    def held(self, end: int) -> list[int]:
        """List the clean frames that `visible` shows the chunk starting at frame `end`, in order."""
        recent = range(max(0, end - self.window), end)
        return [*range(min(self.sink, recent.start)), *recent]
