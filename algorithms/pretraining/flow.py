"""The short route to the embedded student: causal flow matching, then adaptation to few steps.

The first stage teaches a frame given the true frames before it (teacher forcing), the second given frames that the
student generated itself, so that its mistakes do not add up. The third is the second on clips whose tracks a weak
tracker found, as those of real clips are. The paper's own route (bidirectional teacher, Self-Rollout) is another
experiment.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from algorithms.distillation.losses import flow_matching_loss
from algorithms.pretraining.loop import Fit, optimise
from data.draws import Stream, generator, seed_of
from data.pool import ClipPool
from envs.ar_video import start
from envs.control import MODES, assemble_condition, heatmap
from envs.transitions import ODE
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.codecs import TextCodec, VideoCodec
from policies.ema import EMA, averaged
from policies.sampler import generate
from tracking.transforms import jittered

if TYPE_CHECKING:
    from pathlib import Path

    from data.clip import World


@dataclass(frozen=True)
class FlowStage:
    """Settings of causal flow matching (AR-Drag Eq. 7 with a causal mask).

    Attributes:
        seed: seed of the weights and of the data order.
        dim: width of the transformer.
        heads: attention heads.
        layers: transformer blocks.
        ffn: width of the feed-forward layers.
        steps: optimizer steps.
        batch: clips per step.
        lr: peak learning rate.
        shift: noise levels are shift u / (1 + (shift - 1) u) for uniform u.
        text_dropout: share of clips trained without their prompt.
        pool: training clips per bucket.
        ema: decay of the averaged weights.
    """

    seed: int = 0
    dim: int = 128
    heads: int = 4
    layers: int = 4
    ffn: int = 384
    steps: int = 8000
    batch: int = 12
    lr: float = 5e-3
    shift: float = 3.0
    text_dropout: float = 0.1
    pool: int = 2048
    ema: float = 0.998


@dataclass(frozen=True)
class FewStepStage:
    """Settings of the adaptation to few steps: flow matching at the student's own noise levels, on its own history.

    Attributes:
        seed: seed of the data order.
        sigmas: the student's noise levels.
        own_history: share of clips whose history is what the student itself generates, from the first frame on; the
            others have the true one.
        track_noise: standard deviation in pixels of the errors of the tracks it is trained on. Tracks of real clips
            come from trackers, and a model that learned from them follows a drag with caution: RL is there to mend it.
        pool: training clips per bucket.
        steps: optimizer steps.
        batch: clips per step.
        lr: peak learning rate.
        ema: decay of the averaged weights.
    """

    seed: int = 0
    sigmas: list[float] = field(default_factory=lambda: [1.0, 0.755, 0.522, 0.0])
    own_history: float = 0.75
    track_noise: float = 0.0
    pool: int = 2048
    steps: int = 1200
    batch: int = 12
    lr: float = 2e-3
    ema: float = 0.995


# The last stage: from exact tracks to those of a weak tracker, the only ones that real clips have.
WEAK_TRACKS = FewStepStage(seed=1, track_noise=4.0, pool=768, steps=300)


@dataclass(frozen=True)
class LatentPool:
    """Encoded training clips of one bucket: `latents, control [n, M, C, h, w]`, `text [n, L, D]`."""

    latents: Tensor
    control: Tensor
    text: Tensor

    def sample(self, rng_key: tuple[int, ...], count: int, text_dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `count` clips: latents, condition `[B, M, Cc, h, w]` and text."""
        rng = generator(Stream.TRAINING, *rng_key)
        rows = torch.from_numpy(rng.choice(len(self.latents), count, replace=False))
        latents, control, text = self.latents[rows], self.control[rows], self.text[rows]
        noise = torch.from_numpy(rng.standard_normal(tuple(latents.shape), dtype="float32")).to(latents.device)
        keep = torch.from_numpy(rng.uniform(size=count) >= text_dropout).float().to(text.device)
        return latents, assemble_condition(latents[:, 0], control, noise), text * keep[:, None, None]


def encode_pool(
    world: World,
    video: VideoCodec,
    text: TextCodec,
    bucket: tuple[int, int],
    count: int,
    first: int = 0,
    track_noise: float = 0.0,
    control: str = MODES[0],
) -> LatentPool:
    """Render and encode training clips `first .. first + count - 1` of one bucket.

    `track_noise` is that of `FewStepStage`; clips and captions stay exact. `control` says how paths are drawn.
    """
    latents, drags, embeds = [], [], []
    size = world.size("train")
    for low in range(first, first + count, 64):
        indices = [i if size is None else i % size for i in range(low, min(low + 64, first + count))]
        clips = ClipPool(world, bucket, indices).batch(range(len(indices)))
        latents.append(video.encode(clips.video))
        tracks = jittered(clips.trajectory, track_noise, generator(Stream.TRAINING, *bucket, low, 6))
        drags.append(video.encode(heatmap(tracks, video.stride, control)))
        embeds.append(text.encode(clips.prompts))
    return LatentPool(torch.cat(latents), torch.cat(drags), torch.cat(embeds))


def build_transformer(stage: FlowStage, channels: int, text_dim: int) -> CausalWanTransformer3DModel:
    """A freshly initialised tiny transformer for `channels` latent channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(Stream.TRAINING, stage.seed))
        return CausalWanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=stage.heads,
            attention_head_dim=stage.dim // stage.heads,
            in_channels=channels + 4 + 2 * channels,
            out_channels=channels,
            text_dim=text_dim,
            freq_dim=64,
            ffn_dim=stage.ffn,
            num_layers=stage.layers,
            rope_max_seq_len=256,
        )


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise levels `shift u / (1 + (shift - 1) u)` of uniform u in [0, 1]: above 1, more weight to high ones."""
    return shift * u / (1 + (shift - 1) * u)


def noised(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """`(1 - sigma) x0 + sigma eps` with `sigma [B, M]`."""
    level = sigma[..., None, None, None]
    return (1 - level) * x0 + level * eps


def predict(
    model: CausalWanTransformer3DModel, clean: Tensor, noisy: Tensor, sigma: Tensor, condition: Tensor, text: Tensor
) -> Tensor:
    """Velocity of noisy frames given a finished history: the parallel pass with the condition on the channels."""
    return model.parallel(
        torch.cat([clean, condition], 2),
        torch.cat([noisy, condition], 2),
        sigma,
        text,
        causality=Causality(history_gradient=True),
    )


def train_flow(
    pools: list[LatentPool],
    stage: FlowStage,
    model: CausalWanTransformer3DModel,
    report: Callable[[str], None] = print,
    state: Path | None = None,
) -> CausalWanTransformer3DModel:
    """Causal flow matching with an independent noise level for every frame; returns the averaged weights."""
    ema = EMA(model, stage.ema)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        pool = pools[step % len(pools)]
        x0, condition, text = pool.sample((stage.seed, 2, step), stage.batch, stage.text_dropout)
        noise = torch.Generator().manual_seed(seed_of(Stream.TRAINING, stage.seed, 3, step))
        u = torch.rand(x0.shape[:2], generator=noise)
        sigma = shifted(u, stage.shift)
        eps = torch.randn(x0.shape, generator=noise)
        velocity = predict(model, x0, noised(x0, eps, sigma), sigma, condition, text)
        return flow_matching_loss(velocity, x0, eps)[0], {}

    optimise(model.parameters(), Fit(stage.steps, stage.lr), loss_of, "flow", report, ema, matrices(model), state)
    return averaged(model, ema)


def own_frames(
    model: CausalWanTransformer3DModel, condition: Tensor, text: Tensor, sigmas: list[float], channels: int, seed: int
) -> Tensor:
    """Frames `[B, M, C, h, w]` that the model generates by itself, each from those before it."""
    batch = len(condition)
    key = torch.tensor([[seed, 0, row, 0] for row in range(batch)])
    shape = (channels, *condition.shape[3:])
    begin = start(condition, text, torch.tensor(sigmas), torch.zeros(1, dtype=torch.bool), key, shape)
    return generate(model, ODE(), Causality(), begin).latents[:, :, -1]


def train_few_step(
    pools: list[LatentPool],
    stage: FewStepStage,
    model: CausalWanTransformer3DModel,
    report: Callable[[str], None] = print,
    state: Path | None = None,
) -> CausalWanTransformer3DModel:
    """Adapt a flow model, which is left as it is, to `stage.sigmas` and to its own history.

    A frame's target is the true one, whatever the history looks like: the student learns to take a clip that has
    drifted back to the reference in its cache.
    """
    student = copy.deepcopy(model).requires_grad_(True)
    ema = EMA(student, stage.ema)
    table = torch.tensor(stage.sigmas[:-1])

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        x0, condition, text = pools[step % len(pools)].sample((stage.seed, 4, step), stage.batch)
        seed = seed_of(Stream.TRAINING, stage.seed, 5, step)
        noise = torch.Generator().manual_seed(seed)
        own = own_frames(student, condition, text, stage.sigmas, x0.shape[2], seed)
        drift = (own - x0).square().mean().item()
        true = torch.rand(len(x0), generator=noise) >= stage.own_history
        history = torch.where(true[:, None, None, None, None], x0, own)
        sigma = table[torch.randint(len(table), x0.shape[:2], generator=noise)]
        eps = torch.randn(x0.shape, generator=noise)
        velocity = predict(student, history, noised(x0, eps, sigma), sigma, condition, text)
        loss, _ = flow_matching_loss(velocity, x0, eps)
        return loss, {"drift": drift}

    fit = Fit(stage.steps, stage.lr)
    optimise(student.parameters(), fit, loss_of, "few-step", report, ema, matrices(student), state)
    return averaged(student, ema)


def matrices(model: CausalWanTransformer3DModel) -> list[torch.nn.Parameter]:
    """Weight matrices of the blocks that train: what Muon is for. The factors of adapters are not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2]
    return [p for name, p in named if name.startswith("blocks.") and ".lora_" not in name]
