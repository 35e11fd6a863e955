"""Settings of step 1: `experiments/finetune.py` and `experiments/distill.py`. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

NEGATIVE = "overexposed, static, blurred, subtitles, worst quality, low quality, deformed limbs, cluttered background"


@dataclass(frozen=True)
class FineTune:
    """Flow matching of the bidirectional model (AR-Drag Eq. 7); `updates` is the number of steps.

    Attributes:
        fresh: begin with random weights in the shape of the model's, not with the model's.
        control: condition on the drag; without, the model learns image-to-video alone.
        batch: clips per step.
        lr: peak learning rate.
        shift: noise levels are shift u / (1 + (shift - 1) u) for uniform u, one for all frames of a clip.
        text_dropout: share of clips whose prompt is the negative one, for classifier-free guidance.
        negative_prompt: shared by all clips.
        pool: training clips per frame size.
        ema: decay of the averaged weights, which are the result.
        track_noise: standard deviation in pixels of the errors of the tracks that control is drawn from.
    """

    fresh: bool = False
    control: bool = True
    batch: int = 12
    lr: float = 5e-3
    shift: float = 3.0
    text_dropout: float = 0.1
    negative_prompt: str = NEGATIVE
    pool: int = 2048
    ema: float = 0.998
    track_noise: float = 0.0

    def __post_init__(self) -> None:
        _check_pool("stage", self.batch, self.pool)
        if not 0 <= self.text_dropout < 1 or not 0 <= self.ema < 1:
            raise ValueError(f"stage.text_dropout and ema must lie in [0, 1), got {self.text_dropout} and {self.ema}")
        if not (0 < self.lr < math.inf and 0 < self.shift < math.inf and 0 <= self.track_noise < math.inf):
            raise ValueError("stage.lr and shift must be positive, track_noise not negative")


@dataclass(frozen=True)
class Warmup:
    """What the stages before distribution matching share.

    Attributes:
        steps: optimizer steps; 0 leaves the stage out.
        batch: clips per step.
        lr: peak learning rate.
        ema: decay of the averaged weights, which are the result.
    """

    steps: int = 0
    batch: int = 12
    lr: float = 1e-3
    ema: float = 0.99

    NAME: ClassVar[str]

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"stage.{self.NAME}.steps must not be negative, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"stage.{self.NAME}.lr must be positive and finite, got {self.lr}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"stage.{self.NAME}.ema must lie in [0, 1), got {self.ema}")


@dataclass(frozen=True)
class TeacherForcingStage(Warmup):
    """Flow matching of every frame given the true ones before it.

    Attributes:
        shift: noise levels are shift u / (1 + (shift - 1) u) for uniform u, one for each chunk.
    """

    NAME = "teacher_forcing"

    shift: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.shift < math.inf:
            raise ValueError(f"stage.teacher_forcing.shift must be positive, got {self.shift}")


@dataclass(frozen=True)
class OwnHistoryStage(Warmup):
    """Flow matching of every frame given those before it that the student itself makes.

    Attributes:
        share: of the clips; the others have true histories.
    """

    NAME = "own_history"

    share: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"stage.own_history.share must lie in [0, 1], got {self.share}")


@dataclass(frozen=True)
class ODEStage(Warmup):
    """Regression to the ends of the teacher's ODE paths.

    Attributes:
        substeps: the teacher's steps for one of the student's.
    """

    NAME = "ode"

    substeps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.substeps < 1:
            raise ValueError(f"stage.ode.substeps must be at least 1, got {self.substeps}")


@dataclass(frozen=True)
class ConsistencyStage(Warmup):
    """Causal consistency distillation.

    Attributes:
        ema: decay of the averaged weights, which make the target and are the result.
        substeps: the teacher's steps for one of the student's.
        huber: constant of the pseudo-Huber distance; 0 is the squared error.
    """

    NAME = "consistency"

    substeps: int = 4
    huber: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.substeps < 1 or not 0 <= self.huber < math.inf:
            raise ValueError(
                "stage.consistency.substeps must be at least 1 and huber not negative, "
                f"got {self.substeps} and {self.huber}"
            )


@dataclass(frozen=True)
class DMD:
    """Distribution matching with an adversary; `updates` is the number of generator steps.

    Attributes:
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
        discriminator: weight of the discriminator's loss beside the fake score's 1. They share no weights, and AdamW
            does not feel a factor: how fast the discriminator learns is `critic_lr`.
        layers: blocks of the teacher whose outputs the discriminator reads.
        r1: weight of the slope penalty on true clips, beside the discriminator's loss; both under `discriminator`.
        r2: the same on generated clips.
        penalty_std: size of the disturbance by which the slope is estimated.
    """

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
        for name in ("generator_every", "batch", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage.dmd.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "critic_lr", "clip", "shift", "penalty_std"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"stage.dmd.{name} must be positive, got {getattr(self, name)}")
        for name in ("adversarial", "discriminator", "r1", "r2"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"stage.dmd.{name} must not be negative, got {getattr(self, name)}")
        if self.adversarial == 0 and (self.r1 or self.r2):
            raise ValueError("stage.dmd.r1 and r2 have no effect with stage.dmd.adversarial=0; take them out")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas) or not 0 <= self.ema < 1:
            raise ValueError(
                f"stage.dmd.betas must be two numbers in [0, 1) and stage.dmd.ema one, got {self.betas}, {self.ema}"
            )


@dataclass(frozen=True)
class Distill:
    """From the bidirectional teacher to the causal few-step student (AR-Drag section 3.2, Algorithm 1).

    The stages run in this order, each from the result of the one before; the first begins with the teacher's weights,
    or with those of the model where `from_teacher` is off.

    Attributes:
        teacher: folder of the teacher under the model's folder, or a path of its own.
        from_teacher: the student begins with the teacher's weights.
        negative_prompt: shared by all clips; the teacher's guidance points away from it.
        guidance: `cond + g (cond - uncond)`; 0 is none.
        eta: share of fresh noise of a step in training, in [0, 1]; 1 re-noises, as Algorithm 1 does; 0 is the ODE.
        pool: training clips per frame size.
        track_noise: standard deviation in pixels of the errors of the tracks that control is drawn from.
        teacher_forcing: flow matching given true frames.
        own_history: flow matching given frames of the student's own.
        ode: regression to the teacher's ODE.
        consistency: causal consistency distillation.
        match: distribution matching after the warm-up; off: the warm-up alone.
        dmd: distribution matching with an adversary.
    """

    teacher: str
    from_teacher: bool = True
    negative_prompt: str = NEGATIVE
    guidance: float = 3.0
    eta: float = 1.0
    pool: int = 2048
    track_noise: float = 0.0
    teacher_forcing: TeacherForcingStage = field(default_factory=TeacherForcingStage)
    own_history: OwnHistoryStage = field(default_factory=OwnHistoryStage)
    ode: ODEStage = field(default_factory=ODEStage)
    consistency: ConsistencyStage = field(default_factory=ConsistencyStage)
    match: bool = True
    dmd: DMD = field(default_factory=DMD)

    def steps(self, updates: int) -> dict[str, int]:
        """Optimizer steps of each stage that runs, in their order; those of distribution matching are the critics'."""
        warmup = {name: getattr(self, name).steps for name in ("teacher_forcing", "own_history", "ode", "consistency")}
        matching = updates * self.dmd.generator_every if self.match else 0
        return {name: steps for name, steps in {**warmup, "dmd": matching}.items() if steps}

    def __post_init__(self) -> None:
        for name in self.steps(1):
            _check_pool(f"stage.{name}", getattr(self, name).batch, self.pool)
        if not math.isfinite(self.guidance):
            raise ValueError(f"stage.guidance must be finite, got {self.guidance}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"stage.eta must lie in [0, 1], got {self.eta}")
        if not 0 <= self.track_noise < math.inf:
            raise ValueError(f"stage.track_noise must not be negative, got {self.track_noise}")
        if not self.match and not any(
            s.steps for s in (self.teacher_forcing, self.own_history, self.ode, self.consistency)
        ):
            raise ValueError("stage: nothing to do; set stage.match=true, or give a stage steps")


def _check_pool(name: str, batch: int, pool: int) -> None:
    if batch < 1 or batch > pool:
        raise ValueError(f"{name}.batch={batch} must be 1 to stage.pool={pool}: a batch repeats no clip")
