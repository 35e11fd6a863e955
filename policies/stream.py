"""Live generation: a control goes in, a frame comes out, and nothing of the clip is known in advance.

`Stream` makes latent frames, `VideoStream` turns drawn controls into pixel frames. They make the frames that
`policies.sampler.generate` makes, from the same draws, with a cache of static shape and no wait for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data import draws
from envs.control import MASK_CHANNELS
from envs.transitions import ode_mean
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.codecs import VideoCodec
from policies.ring_cache import RingCache

if TYPE_CHECKING:
    from envs.transitions import Transition


@dataclass(frozen=True)
class Episode:
    """What stays the same while a stream goes on.

    Attributes:
        text: `[B, L, D]`.
        key: (seed, iteration, prompt, sample) of each sample; keys every draw as in `envs.ar_video`.
        image: tokens of the reference image `[B, I, E]`, for models that take some.
        share_initial_noise: leave the sample out of the key of the initial noise.
    """

    text: Tensor
    key: tuple[tuple[int, int, int, int], ...]
    image: Tensor | None = None
    share_initial_noise: bool = True


class Stream:
    """Latent frames of a batch of clips, chunk by chunk.

    Args:
        transformer: the policy's network.
        causality: chunk, window and sink.
        sigmas: noise levels of the steps, falling from 1 to 0.
        episode: prompts, keys, images.
        latent_shape: (C, h, w).
        renoise: kernel of every step but the last, such as `CPS(eta=1)`; None: the ODE.
        compile: see `RingCache`.
    """

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        causality: Causality,
        sigmas: list[float],
        episode: Episode,
        latent_shape: tuple[int, int, int],
        renoise: Transition | None = None,
        compile: str = "none",
    ) -> None:
        self._model, self._rule, self.episode = transformer, causality, episode
        self._shape, self._renoise = latent_shape, renoise
        self._batch, device = len(episode.key), transformer.device
        _, height, width = transformer.config.patch_size
        tokens = latent_shape[1] // height * (latent_shape[2] // width)
        self._cache = RingCache(transformer, causality, self._batch, tokens, compile)
        # On the device from the start, so that no step waits for a copy.
        self._levels = torch.tensor([[*sigmas, 0.0]], device=device).expand(self._batch, -1)
        self._steps = len(sigmas) - 1
        self._before: Tensor | None = None
        self.frames = 0

    @torch.no_grad()
    def step(self, condition: Tensor) -> Tensor:
        """Make the next chunk.

        The first of its passes also writes the chunk before it into the cache.

        Args:
            condition: what its frames are conditioned on, `[B, k, Cc, h, w]` with k = `causality.chunk`.

        Returns:
            Finished latents `[B, k, C, h, w]`.

        Raises:
            ValueError: the condition is not of one chunk.
        """
        count, first = condition.shape[1], self.frames
        if count != self._rule.chunk:
            raise ValueError(f"a step makes {self._rule.chunk} frame(s), got conditions of {count}")
        if self._model.given_first and first == 0 and count == 1:
            channels = self._shape[0]
            x = condition[:, :, MASK_CHANNELS : MASK_CHANNELS + channels]
        else:
            x = self._noise(first, count).to(condition)
            for n in range(self._steps):
                x = self._advance(x, self._velocity(x, condition, n), first, n)
        self._before = torch.cat([x, condition], 2)
        self.frames += count
        return x

    def mark(self) -> Any:
        """Remember this point (a copy of the cache), to `rewind` to it."""
        return self.frames, self._before, self._cache.keep()

    def rewind(self, mark: Any) -> None:
        """Go back to a `mark`; what is made from here on is what it would have been then."""
        self.frames, self._before, kept = mark
        self._cache.restore(kept)

    def _velocity(self, x: Tensor, condition: Tensor, n: int) -> Tensor:
        commit = 0 if n or self._before is None else self._rule.chunk
        frames = torch.cat([x, condition], 2)
        level = self._levels[:, n : n + 1].expand(-1, x.shape[1])
        if commit:
            assert self._before is not None
            frames = torch.cat([self._before, frames], 1)
            level = torch.cat([self._levels[:, -1:].expand(-1, commit), level], 1)
        first = self.frames - commit
        e = self.episode
        v = self._model(frames, level, e.text, self._cache, first=first, commit=commit, image=e.image, mode="cached")
        return v[:, commit:].float()

    def _advance(self, x: Tensor, v: Tensor, first: int, n: int) -> Tensor:
        now, later = (self._levels[:, i, None, None, None, None] for i in (n, n + 1))
        if self._renoise is None or n + 1 == self._steps:
            return ode_mean(x.float(), v, now, later).to(x.dtype)
        mean, std = self._renoise.moments(x.float(), v, now, later)
        return (mean + std * self._drawn(draws.Stream.TRANSITION_NOISE, 4, first, x.shape[1], (n,))).to(x.dtype)

    def _noise(self, first: int, count: int) -> Tensor:
        length = 3 if self.episode.share_initial_noise else 4
        return self._drawn(draws.Stream.INITIAL_NOISE, length, first, count)

    def _drawn(self, stream: draws.Stream, length: int, first: int, count: int, rest: tuple[int, ...] = ()) -> Tensor:
        keys = [(*key[:length], m, *rest) for key in self.episode.key for m in range(first, first + count)]
        noise = draws.normals(stream, keys, self._shape).unflatten(0, (self._batch, count))
        return noise.to(self._levels.device, non_blocking=True)


@dataclass
class Pending:
    """Pixel frames `[B, 3, T, H, W]` in [-1, 1] that may still be in work on a GPU."""

    frames: Tensor
    event: Any = None

    def result(self) -> Tensor:
        """The frames; the current CUDA stream waits for them, the host does not."""
        if self.event is not None:
            torch.cuda.current_stream(self.frames.device).wait_event(self.event)
            self.frames.record_stream(torch.cuda.current_stream(self.frames.device))
        return self.frames


class VideoStream:
    """Pixel frames from drawn controls.

    On a GPU, frames are decoded on a stream of their own while the next ones are denoised, if these are submitted
    before the result is asked for.

    Args:
        stream: makes latents.
        codec: encodes controls and decodes frames, each with its causal memory.
        reference: latent of the reference image `[B, C, h, w]`.
        decoder: another way to decode, with the interface of `DecodeStream`; None: the codec's own.
    """

    def __init__(self, stream: Stream, codec: VideoCodec, reference: Tensor, decoder: Any = None) -> None:
        self.stream, self._reference = stream, reference
        self._encoder, self._decoder = codec.encode_stream(), decoder or codec.decode_stream()
        self._side = torch.cuda.Stream(reference.device) if reference.is_cuda else None

    def step(self, control: Tensor) -> Tensor:
        """Make the next chunk: `[B, 3, T, H, W]` drawn control (`envs.control.heatmap`) to pixel frames of that shape.

        The first latent frame of a clip is 1 pixel frame, each later one 4.
        """
        return self.submit(control).result()

    def submit(self, control: Tensor) -> Pending:
        """As `step`, but nothing waits for the decoder."""
        latents = self.latents(control)
        if self._side is None:
            return Pending(self.decode(latents))
        self._side.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self._side):
            frames = self.decode(latents)
            latents.record_stream(self._side)
            event = torch.cuda.Event()
            event.record(self._side)
        return Pending(frames, event)

    def latents(self, control: Tensor) -> Tensor:
        """The next chunk's latents `[B, k, C, h, w]`, not decoded."""
        return self.stream.step(self.condition(control))

    def condition(self, control: Tensor) -> Tensor:
        """Encode the next chunk's control, and assemble what its frames are conditioned on: `[B, k, Cc, h, w]`."""
        first = 1 if self.stream.frames == 0 else 4
        pieces = [control[:, :, :first], *control[:, :, first:].split(4, 2)]
        encoded = [self._encoder(piece) for piece in pieces if piece.shape[2]]
        frames = range(self.stream.frames, self.stream.frames + len(encoded))
        return torch.stack([self._condition(latent, m) for latent, m in zip(encoded, frames, strict=True)], 1)

    def mark(self) -> Any:
        """Remember this point, with the memories of encoder and decoder."""
        return self.stream.mark(), self._encoder.clone(), self._decoder.clone()

    def rewind(self, mark: Any) -> None:
        """Go back to a `mark`, any number of times."""
        self.stream.rewind(mark[0])
        self._encoder, self._decoder = mark[1].clone(), mark[2].clone()

    def _condition(self, control: Tensor, m: int) -> Tensor:
        mask = control.new_full((len(control), MASK_CHANNELS, *control.shape[2:]), float(m == 0))
        image = self._reference
        if m:
            keys = [(*key[:3], m) for key in self.stream.episode.key]
            noise = draws.normals(draws.Stream.REFERENCE_NOISE, keys, control.shape[1:])
            image = noise.to(control.device, non_blocking=True)
        return torch.cat([mask, image, control], 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk's latents `[B, k, C, h, w]`."""
        return torch.cat([self._decoder(latents[:, i]) for i in range(latents.shape[1])], 2)
