"""The causal Wan transformer: diffusers' parameters, three ways through them.

bidirectional (the teacher), cached (acting, one chunk at a time) and parallel (learning, all chunks at once).
Cached and parallel give the same velocities up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from policies import positions
from policies.attention import (
    Attention,
    Context,
    ContextAttentionProcessor,
    FrameAttention,
    FrameSelfAttentionProcessor,
    PrefixAttention,
    attention_mask,
    frames_of,
)
from policies.causality import CLEAN, NOISY, Causality
from policies.kv_cache import KVCache

__all__ = ["CausalWanTransformer3DModel", "Causality", "KVCache"]


class CausalWanTransformer3DModel(WanTransformer3DModel):
    """diffusers' Wan transformer with a bidirectional, a parallel and a cached pass.

    Same parameters, same state dict: any Wan checkpoint in diffusers format loads. Frames that share a noise
    level are folded onto the batch dimension, so that diffusers' own blocks modulate them per frame at no
    cost per token. Every pass goes through `forward`, so that wrappers (DeepSpeed, DistributedDataParallel)
    see it; a wrapped model is called as `model(..., mode="parallel")`.

    Attributes:
        image_frames: which frames of a parallel or cached pass see the image tokens: `all`, as diffusers' pipelines do,
            `first` (the frame that the image is of; later ones see none, AR-Drag section 3.2) or `none`.
        autocast_dtype: arithmetic of a pass, by autocast, whatever the weights are kept in; None: that of the weights.
        given_first: frames under mask 1 are the reference image itself, not generated (`policies/first_frame.py`).

    Raises:
        ValueError: `patch_size` spans more than one latent frame.
    """

    image_frames: str = "all"
    autocast_dtype: torch.dtype | None = None
    given_first: ClassVar[bool] = False

    # diffusers reads the configuration's keys from this signature.
    @wraps(WanTransformer3DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.patch_size[0] != 1:
            raise ValueError(f"a causal transformer needs patch_size (1, *, *), got {self.config.patch_size}")
        for block in self.blocks:
            block.attn1.set_processor(FrameSelfAttentionProcessor())
            block.attn2.set_processor(ContextAttentionProcessor())

    def forward(self, *args: Any, mode: str = "bidirectional", **kwargs: Any) -> Any:
        """Run one of the three passes: `bidirectional` (diffusers' signature), `parallel` or `cached`."""
        passes: dict[str, Callable[..., Any]] = {
            "bidirectional": self._bidirectional,
            "parallel": self._parallel,
            "cached": self._cached,
        }
        if self.autocast_dtype is None:
            return passes[mode](*args, **kwargs)
        # Without autocast's cache: a weight that is cast in the pass over the history, which has no gradient, would
        # keep its gradient from the pass over the present.
        with torch.autocast(self.device.type, self.autocast_dtype, cache_enabled=False):
            return passes[mode](*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; diffusers' own walks through every module at each call."""
        return self.patch_embedding.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """In which velocities are computed, and to which they are rounded."""
        return self.autocast_dtype or self.dtype

    @property
    def frame_channels(self) -> int:
        """Channels of a frame as the passes take it: latent and condition."""
        return int(self.config.in_channels)

    def parallel(
        self,
        clean: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        text: Tensor,
        *,
        causality: Causality,
        image: Tensor | None = None,
        history_sigma: Tensor | None = None,
    ) -> Tensor:
        """Velocities of all frames at once, each given the clean frames before its chunk (teacher forcing).

        Args:
            clean: finished frames `[B, M, C+Cc, h, w]`, latent and condition on the channels.
            noisy: frames being denoised, same shape.
            sigma: noise level of the noisy frames `[B, M]`, in [0, 1].
            text: `[B, L, D]`.
            causality: what a frame sees.
            image: image tokens `[B, I, E]` for models that have an image embedder.
            history_sigma: noise level of the history `[B, M]`; None: 0, finished frames (otherwise diffusion forcing).

        Returns:
            Velocity `[B, M, C, h, w]`.
        """
        rest = {"causality": causality, "image": image, "history_sigma": history_sigma}
        return self(clean, noisy, sigma, text, **rest, mode="parallel")

    def cached(
        self,
        frames: Tensor,
        sigma: Tensor,
        text: Tensor,
        cache: KVCache,
        *,
        first: int,
        commit: int = 0,
        image: Tensor | None = None,
    ) -> Tensor:
        """Velocities of the next frames, given the cache; finished ones among them enter the cache.

        Args:
            frames: frames `first .. first+F-1`, `[B, F, C+Cc, h, w]`. The first `commit` (none, or one whole
                chunk) are finished; the others are of one chunk and see the cache with those in it.
            sigma: `[B, F]` in [0, 1], 0 for the finished frames.
            text: `[B, L, D]`; must not change between two resets of the cache.
            cache: holds the frames before `first`.
            first, commit: see `frames`.
            image: as in `parallel`.

        Returns:
            Velocity `[B, F, C, h, w]`, also of the finished frames.

        Raises:
            ValueError: the cache does not end at `first`, or the frames are not whole chunks.
        """
        return self(frames, sigma, text, cache, first=first, commit=commit, image=image, mode="cached")

    def _bidirectional(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if encoder_hidden_states_image is None:
            return super().forward(hidden_states, timestep, encoder_hidden_states, None, return_dict, attention_kwargs)
        # diffusers splits image from text by assuming 512 text tokens; our processors take any number.
        tokens = self._tokens(hidden_states.transpose(1, 2))
        batch, _, count, height, width = hidden_states.shape
        groups = timestep.reshape(batch, -1)
        if tokens.shape[1] % groups.shape[1]:
            raise ValueError(f"timestep {tuple(timestep.shape)} does not fit {tokens.shape[1]} tokens")
        attentions = [PrefixAttention() for _ in self.blocks]
        out = self._blocks(
            tokens,
            groups,
            self._rotations(0, count, height, width),
            attentions,
            encoder_hidden_states,
            encoder_hidden_states_image,
        )
        out = self._frames(out, count, height, width).transpose(1, 2)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _parallel(
        self,
        clean: Tensor,
        noisy: Tensor,
        sigma: Tensor,
        text: Tensor,
        *,
        causality: Causality,
        image: Tensor | None = None,
        history_sigma: Tensor | None = None,
    ) -> Tensor:
        count, _, height, width = noisy.shape[1:]
        # Nothing attends to the last chunk's clean frames, and clean frames never attend to noisy ones: the
        # clean segment is a pass of its own, and without history gradient one that keeps nothing for a
        # backward.
        past = (count - 1) // causality.chunk * causality.chunk
        history = frames_of(CLEAN, range(past))
        present = frames_of(NOISY, range(count))
        noisy_tokens = self._tokens(noisy)
        per_frame = noisy_tokens.shape[1] // count
        device = noisy.device
        prefixes: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        if past:
            mask = attention_mask(causality, history, history, per_frame, device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and causality.history_gradient):
                level = torch.zeros_like(sigma) if history_sigma is None else history_sigma
                prefixes = self._history(clean[:, :past], level[:, :past], text, image, mask)
        mask = attention_mask(causality, present, history + present, per_frame, device)
        attentions = [PrefixAttention(mask, prefix) for prefix in prefixes]
        rotations = self._rotations(0, count, height, width)
        looking = self._looking(0, per_frame)
        out = self._blocks(noisy_tokens, 1000 * sigma, rotations, attentions, text, image, looking=looking)
        return self._frames(out, count, height, width)

    def _history(
        self, clean: Tensor, sigma: Tensor, text: Tensor, image: Tensor | None, mask: Any
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Keys and values of every layer of the history `[B, E, C+Cc, h, w]` at noise levels `sigma [B, E]`."""
        count, _, height, width = clean.shape[1:]
        attentions = [PrefixAttention(mask) for _ in self.blocks]
        rotations, tokens = self._rotations(0, count, height, width), self._tokens(clean)
        looking = self._looking(0, tokens.shape[1] // count)
        self._blocks(tokens, 1000 * sigma, rotations, attentions, text, image, looking=looking)
        return [attention.own for attention in attentions]

    def _cached(
        self,
        frames: Tensor,
        sigma: Tensor,
        text: Tensor,
        cache: KVCache,
        *,
        first: int,
        commit: int = 0,
        image: Tensor | None = None,
    ) -> Tensor:
        count, _, height, width = frames.shape[1:]
        chunk = cache.causality.chunk
        if first != cache.end or first % chunk or commit not in (0, chunk) or count - commit > chunk:
            raise ValueError(
                f"cached pass of frames {first}..{first + count - 1} with commit={commit} does not continue "
                f"a cache of {cache.end} frames in chunks of {chunk}; reset it, or commit chunk by chunk"
            )
        attentions = cache.attentions(len(self.blocks), count, commit)
        memories = [cache.context.setdefault(layer, {}) for layer in range(len(self.blocks))]
        rotations, tokens = self._rotations(first, count, height, width), self._tokens(frames)
        looking = self._looking(first, tokens.shape[1] // count)
        blocks = cache.compiled or self._blocks
        out = blocks(tokens, 1000 * sigma, rotations, attentions, text, image, memories, looking)
        cache.end += commit
        return self._frames(out, count, height, width)

    def _looking(self, first: int, tokens: int) -> int | None:
        """How many tokens of a sequence that starts with frame `first` see the image; None: all."""
        return None if self.image_frames == "all" else tokens * (self.image_frames == "first" and first == 0)

    def _tokens(self, frames: Tensor) -> Tensor:
        """Embed `[B, F, C, h, w]` into tokens `[B, F * n, dim]`, frame by frame."""
        batch = frames.shape[0]
        x = self.patch_embedding(frames.flatten(0, 1).unsqueeze(2).to(self.dtype))
        return x.flatten(2).transpose(1, 2).reshape(batch, -1, x.shape[1])

    def _rotations(self, first: int, count: int, height: int, width: int) -> Tensor:
        _, patch_height, patch_width = self.config.patch_size
        return positions.absolute(self.rope, first, count, height // patch_height, width // patch_width)

    def _blocks(
        self,
        tokens: Tensor,
        timestep: Tensor,
        rotations: Tensor,
        attentions: Sequence[Attention],
        text: Tensor,
        image: Tensor | None,
        memories: Sequence[dict[str, tuple[Tensor, Tensor]] | None] | None = None,
        looking: int | None = None,
    ) -> Tensor:
        """Run blocks and output head on tokens `[B, G * n, dim]` whose G groups have timesteps `[B, G]`."""
        if memories and memories[0] and not torch.is_grad_enabled():
            text, image = text[:, :1], None  # every layer remembers its keys and values: no need to embed them again
        image = None if image is None or looking == 0 else image.to(self.dtype)
        batch, groups = timestep.shape
        folded = tokens.reshape(batch * groups, -1, tokens.shape[-1])
        temb, modulation, text, image = self.condition_embedder(timestep.flatten(), text.to(self.dtype), image)
        modulation = modulation.unflatten(1, (6, -1))
        checkpoint = torch.is_grad_enabled() and self.gradient_checkpointing
        for i, (block, attention) in enumerate(zip(self.blocks, attentions, strict=True)):
            frames = FrameAttention(batch, rotations, attention)
            context = Context(batch, text, image, memories[i] if memories else None, looking)
            if checkpoint:
                folded = self._gradient_checkpointing_func(block, folded, context, modulation, frames)
            else:
                folded = block(folded, context, modulation, frames)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        folded = (self.norm_out(folded.float()) * (1 + scale) + shift).type_as(folded)
        return self.proj_out(folded).reshape(batch, tokens.shape[1], -1)

    def _frames(self, tokens: Tensor, count: int, height: int, width: int) -> Tensor:
        """Unpatchify `[B, F * n, ph * pw * C]` into `[B, F, C, h, w]`."""
        _, ph, pw = self.config.patch_size
        x = tokens.reshape(tokens.shape[0], count, height // ph, width // pw, ph, pw, -1)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(tokens.shape[0], count, -1, height, width)


def save(model: CausalWanTransformer3DModel, folder: Path) -> None:
    """Write a transformer in diffusers' layout, without the path that it was read from."""
    model.register_to_config(_name_or_path="")
    model.save_pretrained(folder)
