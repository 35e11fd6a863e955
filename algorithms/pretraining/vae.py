"""Train the tiny Wan VAE on rendered clips and on control heatmaps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from algorithms.pretraining.loop import Fit, optimise
from data.draws import Stream, generator, seed_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from torch import Tensor

    from data.clip import World
    from data.pool import ClipPool


@dataclass(frozen=True)
class VAEStage:
    """Settings of the VAE stage.

    Attributes:
        seed: seed of the weights and of the data order.
        base_dim: channels at full resolution.
        dim_mult: channel multiples per level; three levels give a spatial stride of 4.
        z_dim: latent channels.
        steps: optimizer steps.
        batch: clips per step of the short phase.
        lr: peak learning rate, cosine decay.
        kl_weight: weight of the KL term, per latent element.
        heatmap_share: share of control heatmaps among the training clips.
        long_from: fraction of the steps after which clips are whole instead of 5 frames: what the causal caches
            carry must not drift.
        pool: training clips per bucket.
    """

    seed: int = 0
    base_dim: int = 8
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 6])
    z_dim: int = 8
    steps: int = 4400
    batch: int = 12
    lr: float = 2e-3
    kl_weight: float = 3e-5
    heatmap_share: float = 0.17
    long_from: float = 0.75
    pool: int = 1024


def build_vae(stage: VAEStage) -> AutoencoderKLWan:
    """A freshly initialised tiny VAE: spatial and temporal stride 4, causal in time."""
    import torch
    from diffusers import AutoencoderKLWan

    from policies.codecs import use_channels_last

    with torch.random.fork_rng():
        torch.manual_seed(stage.seed)
        vae = AutoencoderKLWan(
            base_dim=stage.base_dim,
            z_dim=stage.z_dim,
            dim_mult=list(stage.dim_mult),
            num_res_blocks=1,
            attn_scales=[],
            temperal_downsample=[True] * (len(stage.dim_mult) - 1),
            latents_mean=[0.0] * stage.z_dim,
            latents_std=[1.0] * stage.z_dim,
        )
    # Latents that vary by one unit and little posterior noise: from diffusers' start, where latents barely vary, the
    # decoder ignores them for the first thousand steps.
    assert vae.quant_conv.bias is not None
    vae.quant_conv.weight.data[: stage.z_dim] *= 6.0
    vae.quant_conv.bias.data[stage.z_dim :] = -4.0
    use_channels_last(vae)
    return vae


def decode_unclamped(vae: AutoencoderKLWan, z: Tensor) -> Tensor:
    """`vae.decode` without its final clamp, whose zero gradient freezes pixels that overshoot early in training."""
    import torch

    vae.clear_cache()
    z = vae.post_quant_conv(z)
    frames = []
    for i in range(z.shape[2]):
        vae._conv_idx = [0]
        frames.append(
            vae.decoder(z[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        )
    vae.clear_cache()
    return torch.cat(frames, dim=2)


def vae_loss(video: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor, kl_weight: float) -> Tensor:
    """Pixel error, error of spatial and temporal differences (sharp edges, steady motion), and KL to N(0, 1)."""

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean() + (a - b).square().mean()

    loss = distance(reconstruction, video)
    for dim in (2, 3, 4):
        if video.shape[dim] > 1:
            loss = loss + 0.5 * distance(reconstruction.diff(dim=dim), video.diff(dim=dim))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return loss + kl_weight * kl


def training_clips(pools: list[ClipPool], stage: VAEStage, step: int, count: int, frames: int) -> Tensor:
    """Windows `[count, 3, frames, H, W]` of clips or heatmaps, keyed by the step."""
    import torch

    from envs.control import heatmap

    rng = generator(Stream.TRAINING, stage.seed, 0, step)
    pool = pools[int(rng.integers(len(pools)))]
    clips = pool.batch(rng.choice(len(pool), count, replace=False).tolist())
    maps = heatmap(clips.trajectory, vae_stride=2 ** (len(stage.dim_mult) - 1))
    windows = []
    for i in range(count):
        source = maps if rng.uniform() < stage.heatmap_share else clips.video
        start = int(rng.integers(source.shape[2] - frames + 1))
        windows.append(source[i, :, start : start + frames])
    return torch.stack(windows).contiguous(memory_format=torch.channels_last_3d)


def train_vae(
    world: World, stage: VAEStage, out: Path, report: Callable[[str], None] = print, state: Path | None = None
) -> None:
    """Train, measure the latents' mean and spread, and save a diffusers folder at `out`."""
    import torch

    from data.pool import ClipPool

    pools = [ClipPool(world, bucket, range(stage.pool)) for bucket in world.buckets]
    vae = build_vae(stage)
    whole = pools[0].batch([0]).video.shape[2]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        long = step >= stage.long_from * stage.steps
        count, frames = (stage.batch // 4, whole) if long else (stage.batch, 5)
        video = training_clips(pools, stage, step, count, frames)
        noise = torch.Generator().manual_seed(seed_of(Stream.TRAINING, stage.seed, 6, step))
        posterior = vae.encode(video).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise)
        output = decode_unclamped(vae, z.contiguous(memory_format=torch.channels_last_3d))
        loss = vae_loss(video, output, posterior.mean, posterior.logvar, stage.kl_weight)
        return loss, {"psnr": -10 * math.log10((output.detach() - video).square().mean().item() / 4)}

    optimise(vae.parameters(), Fit(stage.steps, stage.lr), loss_of, "vae", report, state=state)
    _normalise(vae, world)
    vae.save_pretrained(out)


def _normalise(vae: AutoencoderKLWan, world: World) -> None:
    """Write the mean and spread of the latents of 96 training clips into the config, as the Wan VAE does."""
    import torch

    with torch.no_grad():
        video = world.batch("train", range(10**6, 10**6 + 96), world.buckets[0]).video
        z = vae.encode(video.contiguous(memory_format=torch.channels_last_3d)).latent_dist.mode()
    vae.register_to_config(latents_mean=z.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=z.std(dim=(0, 2, 3, 4)).tolist())
