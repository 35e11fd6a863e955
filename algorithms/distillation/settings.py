"""Settings of step 1: `experiments/finetune.py` and `experiments/distill.py`. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shape:
    """Size of a transformer that is made anew.

    Attributes:
        dim: width.
        heads: attention heads.
        layers: blocks.
        ffn: width of the feed-forward layers.
        freq_dim: width of the timestep embedding.
        frames: longest clip of the rotary table, latent frames.
    """

    dim: int = 128
    heads: int = 4
    layers: int = 4
    ffn: int = 384
    freq_dim: int = 64
    frames: int = 256

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers", "ffn", "freq_dim", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"shape.{name} must be at least 1, got {getattr(self, name)}")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise ValueError(f"shape.dim={self.dim} must be an even multiple of shape.heads={self.heads}")


@dataclass(frozen=True)
class FineTune:
    """Flow matching of the bidirectional model.

    Attributes:
        steps: optimizer steps.
        batch: clips per step.
        lr: peak learning rate.
        shift: noise levels are shift u / (1 + (shift - 1) u) for uniform u, one for all frames of a clip.
        text_dropout: share of clips whose prompt is the negative one, for classifier-free guidance.
        pool: training clips per frame size.
        ema: decay of the averaged weights, which are the result.
        track_noise: standard deviation in pixels of the errors of the tracks that control is drawn from.
    """

    steps: int = 8000
    batch: int = 12
    lr: float = 5e-3
    shift: float = 3.0
    text_dropout: float = 0.1
    pool: int = 2048
    ema: float = 0.998
    track_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"finetune.{name} must be at least 1, got {getattr(self, name)}")
        if self.batch > self.pool:
            raise ValueError(f"finetune.batch={self.batch} is more than finetune.pool={self.pool}; raise the pool")
        if not 0 <= self.text_dropout < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"finetune.text_dropout and ema must lie in [0, 1), got {self.text_dropout}, {self.ema}")
        if not (0 < self.lr < math.inf and 0 < self.shift < math.inf and 0 <= self.track_noise < math.inf):
            raise ValueError("finetune.lr and shift must be positive, track_noise not negative")


@dataclass(frozen=True)
class Warmup:
    """A stage before distribution matching.

    Attributes:
        steps: optimizer steps; 0 leaves the stage out.
        batch: clips per step.
        lr: peak learning rate.
        ema: decay of the averaged weights, which are the result.
        shift: teacher forcing: noise levels are shift u / (1 + (shift - 1) u) for uniform u.
        substeps: ODE initialisation and consistency: the teacher's steps for one of the student's.
        huber: consistency: constant of the pseudo-Huber distance; 0 is the squared error.
    """

    steps: int = 0
    batch: int = 12
    lr: float = 1e-3
    ema: float = 0.99
    shift: float = 3.0
    substeps: int = 4
    huber: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or self.substeps < 1:
            raise ValueError(f"stage: steps must not be negative, batch and substeps at least 1; got {self}")
        if not (0 < self.lr < math.inf and 0 <= self.ema < 1 and self.shift > 0 and self.huber >= 0):
            raise ValueError(f"stage: lr and shift must be positive, ema in [0, 1), huber not negative; got {self}")


@dataclass(frozen=True)
class DMD:
    """Distribution matching with an adversary.

    Attributes:
        steps: critic steps.
        generator_every: critic steps for one step of the generator.
        batch: clips per step.
        lr: learning rate of the generator.
        critic_lr: learning rate of fake score and discriminator.
        warmup: steps over which both rise linearly.
        betas: AdamW's, of both.
        clip: largest gradient norm.
        ema: decay of the generator's averaged weights, which are the result.
        shift: noise that clips are judged under: levels shift u / (1 + (shift - 1) u) for uniform u, in [0.02, 0.98].
        adversarial: weight of the adversarial loss beside DMD's 1; 0 leaves the discriminator out.
        discriminator: weight of the discriminator's loss beside the fake score's 1.
        layers: blocks of the teacher whose outputs the discriminator reads.
        r1: weight of the slope penalty on true clips.
        r2: weight of the slope penalty on generated clips.
        penalty_std: size of the disturbance by which the slope is estimated.
    """

    steps: int = 1500
    generator_every: int = 5
    batch: int = 12
    lr: float = 1e-5
    critic_lr: float = 1e-5
    warmup: int = 50
    betas: list[float] = field(default_factory=lambda: [0.0, 0.999])
    clip: float = 1.0
    ema: float = 0.99
    shift: float = 5.0
    adversarial: float = 0.1
    discriminator: float = 0.05
    layers: list[int] = field(default_factory=lambda: [1, 3])
    r1: float = 0.0
    r2: float = 0.0
    penalty_std: float = 0.05

    def __post_init__(self) -> None:
        for name in ("steps", "generator_every", "batch", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"dmd.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "critic_lr", "clip", "shift", "penalty_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"dmd.{name} must be positive, got {getattr(self, name)}")
        for name in ("adversarial", "discriminator", "r1", "r2"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"dmd.{name} must not be negative, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas) or not 0 <= self.ema < 1:
            raise ValueError(f"dmd.betas must be two numbers in [0, 1) and dmd.ema one, got {self.betas}, {self.ema}")
