"""The networks of a run, loaded: transformer, video codec, text codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import diffusers
import transformers
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import AutoTokenizer, UMT5EncoderModel

from data.clip import ClipBatch, World
from data.draws import Stream, normals
from envs.control import MASK_CHANNELS, assemble_condition, heatmap
from policies.causal_dit import CausalWanTransformer3DModel
from policies.codecs import TextCodec, VideoCodec
from policies.features import ImageEncoder, TextEncoder
from runtime.models import Pretrained

if TYPE_CHECKING:
    from algorithms.distillation.pool import LatentPool
    from policies.tiny_vae import TinyDecoder


@dataclass(frozen=True)
class Networks:
    """Everything a rollout needs.

    Attributes:
        transformer: the policy's network.
        video: codec between pixels and latents.
        text: prompt encoder.
        control: how a path is drawn (`Pretrained.control`).
        image: encoder of the reference image, for transformers that look at its tokens.
        tiny: a tiny decoder for live generation; everything else decodes with `video`.
    """

    transformer: CausalWanTransformer3DModel
    video: VideoCodec
    text: TextEncoder
    control: str
    image: ImageEncoder | None = None
    tiny: TinyDecoder | None = None

    def condition(self, clips: ClipBatch, noise_keys: list[tuple[int, ...]], device: str) -> Tensor:
        """What each frame is conditioned on, `[B, M, Cc, h, w]`: mask, reference image or noise, control.

        Args:
            clips: their first frames are the reference images, their trajectories the control.
            noise_keys: key of each clip's reference noise, extended by the frame.
        """
        reference = self.video.encode(clips.video[:, :, :1].to(device))[:, 0]
        drawn = heatmap(clips.trajectory, self.video.stride, self.control)
        control = self.video.encode(drawn.to(device))
        frames, shape = control.shape[1], control.shape[2:]
        keys = [(*key, m) for key in noise_keys for m in range(frames)]
        noise = normals(Stream.REFERENCE_NOISE, keys, shape).unflatten(0, (len(noise_keys), frames))
        return assemble_condition(reference, control, noise.to(device))

    def image_tokens(self, clips: ClipBatch, device: str) -> Tensor | None:
        """Tokens of the clips' first frames `[B, I, E]`, where the transformer takes some."""
        return None if self.image is None else self.image.encode(clips.video[:, :, 0]).to(device)

    def pools(self, world: World, count: int, track_noise: float = 0.0, first: int = 0) -> list[LatentPool]:
        """Encoded training clips `first .. first + count - 1` of every frame size; see `encode_pool`."""
        from algorithms.distillation.pool import encode_pool

        return [
            encode_pool(world, self.video, self.text, bucket, count, first, track_noise, self.control)
            for bucket in world.buckets
        ]


def load_networks(model: Pretrained, device: str) -> Networks:
    """Load the parts of a folder in diffusers' layout; see `Pretrained.load`."""
    model.check()
    quiet()
    folder, transformer = model.folder, load_transformer(model, device)
    video = VideoCodec(AutoencoderKLWan.from_pretrained(folder / "vae", local_files_only=True))
    expected = video.channels + MASK_CHANNELS + 2 * video.channels
    if transformer.config.in_channels != expected:
        raise ValueError(
            f"model.path={model.path}: the transformer takes {transformer.config.in_channels} channels, but the VAE's "
            f"{video.channels} latent channels make {expected} (noise, mask, reference, control)"
        )
    text = TextCodec(
        AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
        UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True),
        model.text_length,
    )
    return Networks(transformer, video.to(device), text.to(device), model.control)


def load_transformer(model: Pretrained, device: str) -> CausalWanTransformer3DModel:
    """Load the transformer alone, in evaluation mode."""
    quiet()
    transformer = CausalWanTransformer3DModel.from_pretrained(model.network, local_files_only=True)
    return transformer.to(device).eval()


def quiet() -> None:
    """Show no progress bars of loading."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
