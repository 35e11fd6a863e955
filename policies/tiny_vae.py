"""A tiny causal decoder for Wan's latents in the layout of TAEHV (`taew2_1`): rougher frames, far less work.

Architecture and names of the weights: https://github.com/madebyollin/taehv (`taehv.py`). Every convolution is of one
frame; what is known of the past is one frame of memory in each of nine blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.draws import Stream, seed_of
from policies.codecs import use_channels_last
from policies.wan_weights import match, read

LATENT = 16
WIDTHS = (256, 128, 64, 64)
# Frames that each of the three stages makes of one; space doubles in each.
GROWTH = (1, 2, 2)
# Layers whose output channels are the widths.
_WIDTHS_AT = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")

Memory = list[Tensor | None]


class TinyDecoder(nn.Module):
    """Latents to pixels, with `VideoCodec`'s contract for `decode` and `decode_stream`.

    Latents are the normalised ones that the transformer makes and `VideoCodec.encode` returns: TAEHV was trained on
    them and applies no mean or spread of its own. Frames leave the network in [0, 1] and are given in [-1, 1].

    Args:
        widths: channels of the three stages and of the end, as released unless a checkpoint has others.
        channels: of a latent.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, channels: int = LATENT) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Bound(), _conv(channels, widths[0]), nn.ReLU()]
        for width, following, frames in zip(widths[:-1], widths[1:], GROWTH, strict=True):
            layers += [_Recall(width) for _ in range(3)]
            # The release doubles space here, by a layer without weights; `_Grow` does it one layer later.
            layers += [nn.Identity(), _Grow(width, frames), _conv(width, following, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3))
        self.blocks = sum(isinstance(layer, _Recall) for layer in layers)

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype = torch.float32) -> TinyDecoder:
        """Load a local .safetensors file such as `taew2_1.safetensors`; its encoder (`encoder.*`) is left aside.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be read, or is not this decoder; lists every missing, unexpected or misshapen weight.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a tiny VAE is one .safetensors file")
        state = {name: value for name, value in read(path).items() if not name.startswith("encoder.")}
        with torch.device("meta"):
            decoder = cls(_widths(state))
        match(decoder.state_dict(), state, str(path), "tiny VAE")
        decoder.load_state_dict({name: value.to(dtype) for name, value in state.items()}, assign=True)
        return decoder._ready()

    @classmethod
    def random(cls, dtype: torch.dtype = torch.float32) -> TinyDecoder:
        """Random weights at the released size, to measure speed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(Stream.TRAINING, 3))
            decoder = cls()
        return decoder.to(dtype)._ready()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode a whole clip `[B, M, C, h, w]` to `[B, 3, 4 M - 3, 8 h, 8 w]` in [-1, 1]."""
        return self._trimmed(self.advance(latents, [None] * self.blocks)[0], True)

    def decode_stream(self) -> TinyStream:
        """Decode frame by frame: feed `[B, C, h, w]`, get 1 pixel frame first and 4 each time after."""
        return TinyStream(self)

    def advance(self, latents: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Decode the next latent frames, given what each block remembers.

        Args:
            latents: `[B, M, C, h, w]`.
            memory: the last frame that each block was fed, `[B, 1, c, h', w']`; None before the first.

        Returns:
            Pixels `[B, 3, 4 M, 8 h, 8 w]`, not clamped, in [0, 1] where the network keeps to it; and the new memory.
        """
        batch, kept = len(latents), list(memory)
        weight = next(self.parameters())
        x = latents.flatten(0, 1).to(weight.device, weight.dtype).contiguous(memory_format=torch.channels_last)
        block = 0
        for layer in self.decoder:
            if isinstance(layer, _Recall):
                frames = x.unflatten(0, (batch, -1))
                before = kept[block]
                first = torch.zeros_like(frames[:, :1]) if before is None else before
                x = layer(x, torch.cat([first, frames[:, :-1]], 1).flatten(0, 1))
                # A copy: a view would hold the whole clip in memory.
                kept[block], block = frames[:, -1:].clone(), block + 1
            else:
                x = layer(x)
        return x.unflatten(0, (batch, -1)).transpose(1, 2), kept

    def _ready(self) -> TinyDecoder:
        use_channels_last(self)
        return self.eval().requires_grad_(False)

    @staticmethod
    def _trimmed(pixels: Tensor, first: bool) -> Tensor:
        """In [-1, 1]; without the three frames that nothing came before, where the clip begins."""
        return pixels[:, :, 3 if first else 0 :].float().clamp(0, 1).mul(2).sub(1).contiguous()


class TinyStream:
    """A decoder that remembers (`TinyDecoder.decode_stream`); the interface of `policies.codecs.DecodeStream`."""

    def __init__(self, decoder: TinyDecoder) -> None:
        self._decoder = decoder
        self._memory: Memory = [None] * decoder.blocks
        self._first = True

    @torch.no_grad()
    def __call__(self, latent: Tensor) -> Tensor:
        """Decode the next latent frame `[B, C, h, w]` to `[B, 3, 1 or 4, H, W]` in [-1, 1]."""
        pixels, self._memory = self._decoder.advance(latent[:, None], self._memory)
        first, self._first = self._first, False
        return self._decoder._trimmed(pixels, first)

    def clone(self) -> TinyStream:
        """Copy, so that one may go back to this point; what is remembered is replaced, never changed."""
        other = TinyStream(self._decoder)
        other._memory, other._first = self._memory, self._first
        return other


class _Bound(nn.Module):
    """Keep latents softly within (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class _Recall(nn.Module):
    """A residual block that also sees the frame before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(x + self.conv(torch.cat([x, past], 1)))


class _Grow(nn.Module):
    """Make `frames` frames of one, by a 1 x 1 convolution, and double height and width.

    In the release space is doubled first. Repeating pixels commutes with a 1 x 1 convolution, which costs a quarter
    in this order.
    """

    def __init__(self, width: int, frames: int) -> None:
        super().__init__()
        self.width = width
        self.conv = nn.Conv2d(width, width * frames, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        frames: Tensor = self.conv(x).unflatten(1, (-1, self.width)).flatten(0, 1)
        return F.interpolate(frames.contiguous(memory_format=torch.channels_last), scale_factor=2.0)


def _conv(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _widths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The widths of a checkpoint; the released ones where it does not say, so that what is missing can be listed."""
    return tuple(
        len(state[name]) if name in state and state[name].ndim == 4 else width
        for name, width in zip(_WIDTHS_AT, WIDTHS, strict=True)
    )
