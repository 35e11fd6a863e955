"""Image-to-video from a text-to-video model: its first latent frame is the image, clean.

The environment stays as it is: a frame is conditioned on (mask, reference, control), and frames under mask 1 are
denoised like any other. The velocity of such a frame is the one that leads to the reference in a straight line, so
that it ends there whatever the kernel; the network gets it finished, at noise level 0, and never sees mask and
reference channels, for which a text-to-video model has no weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from envs.control import MASK_CHANNELS
from policies.causal_dit import CausalWanTransformer3DModel


class FirstFrameWanTransformer3DModel(CausalWanTransformer3DModel):
    """`CausalWanTransformer3DModel` of `C + Cc'` input channels on frames of `C + 4 + C + Cc'`.

    Parameters and state dict are those of text-to-video Wan with Cc' control channels.
    """

    given_first = True

    @property
    def frame_channels(self) -> int:
        """Channels of a frame as the passes take it; mask and reference do not reach the network."""
        return int(self.config.in_channels) + MASK_CHANNELS + int(self.config.out_channels)

    def _bidirectional(self, hidden_states: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("use parallel() with one chunk: diffusers' signature has no place for a given frame")

    def _parallel(
        self,
        clean: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        *args: Any,
        history_sigma: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x, level = self._finished(noisy, sigma)
        past, past_level = self._finished(clean, torch.zeros_like(sigma) if history_sigma is None else history_sigma)
        v = super()._parallel(past, x, level, *args, history_sigma=past_level, **kwargs)
        return self._towards(noisy, sigma, v)

    def _cached(self, frames: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x, level = self._finished(frames, sigma)
        return self._towards(frames, sigma, super()._cached(x, level, *args, **kwargs))

    def _tokens(self, frames: Tensor) -> Tensor:
        latent, _, control = self._parts(frames)
        return super()._tokens(torch.cat([latent, control], 2))

    def _parts(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        channels = int(self.config.out_channels)
        given = MASK_CHANNELS + channels
        return frames[:, :, :channels], frames[:, :, channels : channels + given], frames[:, :, channels + given :]

    def _finished(self, frames: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Put the reference in place of given frames, at noise level 0."""
        latent, given, control = self._parts(frames)
        mask, reference = given[:, :, :1], given[:, :, MASK_CHANNELS:]
        whole = torch.cat([torch.where(mask > 0, reference, latent), given, control], 2)
        return whole, torch.where(mask[:, :, 0, 0, 0] > 0, 0, sigma)

    def _towards(self, frames: Tensor, sigma: Tensor, v: Tensor) -> Tensor:
        """The velocity `(x - reference) / sigma` of given frames, the network's of others."""
        latent, given, _ = self._parts(frames)
        # A finished frame has arrived: whatever stands in for its level of 0, the velocity is 0.
        level = sigma.clamp(min=1e-3)[..., None, None, None].float()
        straight = ((latent.float() - given[:, :, MASK_CHANNELS:].float()) / level).to(v.dtype)
        return torch.where(given[:, :, :1] > 0, straight, v)
