"""Codecs between what a person sees and what the policy works on: the video VAE, the text and the image encoder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedTokenizerFast, UMT5EncoderModel

from metrics.clip_vision import MEAN, STD, square


class VideoCodec(nn.Module):
    """`AutoencoderKLWan` with normalised latents laid out `[B, M, C, h, w]`.

    Args:
        vae: a Wan VAE; `config.latents_mean` and `latents_std` normalise its latents.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        use_channels_last(self.vae)
        shape = (1, 1, -1, 1, 1)
        self.register_buffer("mean", torch.tensor(vae.config.latents_mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(vae.config.latents_std).view(shape), persistent=False)

    @property
    def channels(self) -> int:
        """Latent channels C."""
        return int(self.vae.config.z_dim)

    @property
    def stride(self) -> int:
        """Pixels per latent cell in height and width."""
        return int(2 ** (len(self.vae.config.dim_mult) - 1))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a frame of `height` x `width` pixels."""
        return self.channels, height // self.stride, width // self.stride

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode `[B, 3, T, H, W]` in [-1, 1] to `[B, M, C, h, w]`: the mode of the posterior, normalised.

        T must be 1 + 4 (M - 1). The encoder is causal: a prefix encodes to the prefix.

        Raises:
            ValueError: T is not 1 + 4 k.
        """
        if video.shape[2] % 4 != 1:
            raise ValueError(f"a video of {video.shape[2]} frames cannot be encoded; the VAE takes 1 + 4 k frames")
        video = self._pixels(video)
        return self._normalised(self.vae.encode(video).latent_dist.mode())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode `[B, M, C, h, w]` to `[B, 3, 4 M - 3, H, W]` in [-1, 1]."""
        z = self._unnormalised(latents)
        return self.vae.decode(z, return_dict=False)[0].float().contiguous()

    def decode_stream(self) -> DecodeStream:
        """Decode frame by frame: feed `[B, C, h, w]`, get 1 pixel frame first and 4 each time after."""
        return DecodeStream(self)

    def encode_stream(self) -> EncodeStream:
        """Encode frame by frame: feed 1 pixel frame first and 4 each time after, get `[B, C, h, w]`."""
        return EncodeStream(self)

    def _pixels(self, video: Tensor) -> Tensor:
        video = video.to(self.mean.device, self.vae.post_quant_conv.weight.dtype)
        return video.contiguous(memory_format=torch.channels_last_3d)

    def _normalised(self, moments: Tensor) -> Tensor:
        return ((moments.transpose(1, 2).float() - self.mean) / self.std).contiguous()

    def _unnormalised(self, latents: Tensor) -> Tensor:
        z = (latents.float() * self.std + self.mean).transpose(1, 2).to(self.vae.post_quant_conv.weight.dtype)
        return z.contiguous(memory_format=torch.channels_last_3d)


class DecodeStream:
    """A decoder that remembers the frames it was fed; as many at a time as one likes (`VideoCodec.decode_stream`)."""

    def __init__(self, codec: VideoCodec) -> None:
        self._codec = codec
        self._memory: list[Any] = [None] * codec.vae._cached_conv_counts["decoder"]
        self._first = True

    @torch.no_grad()
    def __call__(self, latent: Tensor) -> Tensor:
        """Decode the next latent frame `[B, C, h, w]` to `[B, 3, 1 or 4, H, W]` in [-1, 1]."""
        vae = self._codec.vae
        z = vae.post_quant_conv(self._codec._unnormalised(latent[:, None]))
        frames = vae.decoder(z, feat_cache=self._memory, feat_idx=[0], first_chunk=self._first)
        self._first = False
        return frames.float().clamp(-1, 1)

    def clone(self) -> DecodeStream:
        """Copy, so that one may go back to this point; what is remembered is replaced, never changed."""
        other = DecodeStream(self._codec)
        other._memory, other._first = list(self._memory), self._first
        return other


class EncodeStream:
    """An encoder that remembers the frames it was fed (`VideoCodec.encode_stream`)."""

    def __init__(self, codec: VideoCodec) -> None:
        self._codec = codec
        self._memory: list[Any] = [None] * codec.vae._cached_conv_counts["encoder"]
        self._first = True

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Encode the next `[B, 3, 1 or 4, H, W]` in [-1, 1] to a latent frame `[B, C, h, w]`.

        Raises:
            ValueError: not 1 frame at first and 4 later.
        """
        wanted = 1 if self._first else 4
        if video.shape[2] != wanted:
            raise ValueError(f"the encoder takes {wanted} pixel frame(s) here, got {video.shape[2]}")
        codec = self._codec
        hidden = codec.vae.encoder(codec._pixels(video), feat_cache=self._memory, feat_idx=[0])
        self._first = False
        return codec._normalised(codec.vae.quant_conv(hidden).chunk(2, 1)[0])[:, 0]

    def clone(self) -> EncodeStream:
        """Copy, so that one may go back to this point."""
        other = EncodeStream(self._codec)
        other._memory, other._first = list(self._memory), self._first
        return other


class ImageCodec(nn.Module):
    """A CLIP vision tower whose last hidden states but one are the image tokens of Wan, 257 x 1280 as released.

    Args:
        tower: a `CLIPVisionModel`.
        mean, std: of the three colours, as the tower was trained.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, tower: CLIPVisionModel, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode images `[B, 3, H, W]` in [-1, 1] to tokens `[B, I, E]`; short edge fitted, centre cut out."""
        unit = ((images.float().to(self.mean.device) + 1) / 2).clamp(0, 1)
        pixels = (square(unit, self.tower.config.image_size).clamp(0, 1) - self.mean) / self.std
        out = self.tower(pixel_values=pixels.to(self.tower.dtype), output_hidden_states=True)
        tokens: Tensor = out.hidden_states[-2]
        return tokens


class TextCodec(nn.Module):
    """A tokenizer and a UMT5 encoder; embeddings are zero beyond the prompt, as Wan expects.

    Args:
        tokenizer: a fast tokenizer.
        encoder: an encoder with `last_hidden_state`.
        length: tokens L that every prompt is padded or cut to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, length: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.encoder = encoder.eval().requires_grad_(False)
        self.length = length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Encode prompts to `[B, L, D]`."""
        ids, mask = self.tokens(prompts)
        device = next(self.encoder.parameters()).device
        hidden = self.encoder(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
        return hidden * mask.to(device)[..., None]

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both `[B, L]`. Longer prompts are cut, as Wan does at 512, with a warning."""
        long = [p for p in dict.fromkeys(prompts) if len(self.tokenizer(p).input_ids) > self.length]
        for prompt in long:
            warnings.warn(f"prompt cut to {self.length} tokens: {prompt[:60]!r}...")
        out = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return out.input_ids, out.attention_mask


def use_channels_last(module: nn.Module) -> None:
    """Lay convolution weights out channels-last: 2.4 times faster decoding on a CPU, the same numbers."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
