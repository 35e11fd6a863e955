"""The typed form of a configuration. The dataclasses are the schema, their docstrings are the text of
`--help`.

Imports nothing heavy: configurations are checked before torch is loaded.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rewards.aesthetic import Aesthetic

# A node with `_target_`: the choice of a config group, built by its own class.
Component = Any


def require(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def _at_least(owner: object, name: str, low: float, *keys: str) -> None:
    for key in keys:
        value = getattr(owner, key)
        require(math.isfinite(value) and value >= low, f"{name}.{key} must be at least {low}, got {value}")


def _positive(owner: object, name: str, *keys: str) -> None:
    for key in keys:
        value = getattr(owner, key)
        require(math.isfinite(value) and value > 0, f"{name}.{key} must be positive and finite, got {value}")


@dataclass(frozen=True)
class Rollout:
    """What the policy generates in one update.

    Attributes:
        prompts: number of different clips (image, text, dragged path) per update.
        group_size: samples of each clip; a group shares its clip and its schedule.
        frames: latent frames per sample; m latent frames are 4 (m - 1) + 1 pixel frames.
        sigmas: noise levels of the denoising steps, strictly decreasing from 1 (a frame starts from noise) to 0.
        share_initial_noise: all samples of a group start from the same noise.
        window: finished latent frames that a frame can see (the paper's "cache").
        sink: first latent frames that are always seen.
        chunk: latent frames denoised together; they see each other at their own noise level.
        history_gradient: let keys and values of finished frames carry gradient when a rollout is re-scored.
    """

    prompts: int
    group_size: int
    frames: int
    sigmas: list[float]
    share_initial_noise: bool
    window: int
    sink: int
    chunk: int
    history_gradient: bool

    def __post_init__(self) -> None:
        _at_least(self, "rollout", 1, "prompts", "group_size", "window", "chunk")
        _at_least(self, "rollout", 2, "frames")
        _at_least(self, "rollout", 0, "sink")
        s = self.sigmas
        falling = all(a > b for a, b in itertools.pairwise(s))
        require(
            len(s) >= 2 and falling and s[0] == 1 and s[-1] == 0,
            f"rollout.sigmas must fall strictly from 1 to 0, such as [1.0,0.755,0.522,0.0]; got {s}",
        )
        require(
            self.frames % self.chunk == 0,
            f"rollout.frames={self.frames} cannot be cut into chunks of {self.chunk}; "
            f"make rollout.frames a multiple of rollout.chunk",
        )


@dataclass(frozen=True)
class Optimizer:
    """AdamW, and what happens to a gradient before it.

    Attributes:
        lr: learning rate.
        decay: share of the updates, the last ones, over which lr falls linearly to 0, in [0, 1]; 0 keeps it.
        betas: decay rates of the two moment estimates, each in [0, 1).
        weight_decay: decoupled weight decay per step, times lr.
        grad_clip: largest L2 norm of the whole gradient; longer ones are scaled down.
        ema: decay per update of the averaged weights that are evaluated, in [0, 1); 0 turns averaging off.
    """

    lr: float
    decay: float
    betas: list[float]
    weight_decay: float
    grad_clip: float
    ema: float

    def __post_init__(self) -> None:
        _positive(self, "optimizer", "lr", "grad_clip")
        _at_least(self, "optimizer", 0, "weight_decay")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optimizer.betas must be two numbers in [0, 1), got {self.betas}",
        )
        require(0 <= self.decay <= 1, f"optimizer.decay must be in [0, 1], got {self.decay}")
        require(0 <= self.ema < 1, f"optimizer.ema must be in [0, 1), got {self.ema}")

    def share(self, iteration: int, updates: int) -> float:
        """Learning rate of an iteration of a run of `updates`, as a share of the first."""
        left = (updates - iteration) / (self.decay * updates) if self.decay else 1.0
        return min(1.0, left)


@dataclass(frozen=True)
class Scoring:
    """How the terms of `reward` become one number per latent frame; see `rewards/composite.py`.

    Attributes:
        combine: `sum_then_normalize` adds weighted raw terms, `normalize_then_sum` brings each to unit
            spread in its group first.
        on_failure: what a failed or non-finite term does: `drop` leaves its group out and counts it, `stop`
            ends the run.
        epsilon: added to the spread in `normalize_then_sum`.
        optional: names of terms that may fail: the group of a failure is then summed without the term.
    """

    combine: Literal["sum_then_normalize", "normalize_then_sum"]
    on_failure: Literal["drop", "stop"]
    epsilon: float
    optional: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        _positive(self, "scoring", "epsilon")


@dataclass(frozen=True)
class Evaluation:
    """How progress is measured: deterministic sampling from fixed noise on clips that training never sees.

    Attributes:
        every: updates between evaluations; the first and the last state of the weights are always
            evaluated. 0: only these.
        clips: number of clips.
        split: `heldout`, `hard` or `benchmark` (drags from very short to very long; 206 clips are the benchmark).
        tracker: finds the motion in generated clips; must be of another kind than the one that rewards.
        scorer: folder of the vision tower that judges looks, under the model's folder; not the one that rewards.
        sampler: `ode`, or `renoise`: every step puts fresh noise on the prediction, as distillation does in training.
        extractor: features of Frechet distances, such as `+extractor=inception_i3d`; none: the scorer's tower.
        interpolator: of smoothness, such as `+interpolator=flow`; none: the mean of both neighbours.
        scorer_head: file of the judge's head (`+evaluation.scorer_head=...`); none: `head.safetensors` of the scorer.
        scorer_sha256: its checksum in hex; none: it is not checked.
        batch: clips that are sampled at a time (`+evaluation.batch=...`).
    """

    every: int
    clips: int
    split: Literal["heldout", "hard", "benchmark"]
    tracker: Component
    scorer: str
    sampler: Literal["ode", "renoise"] = "ode"
    extractor: Component = None
    interpolator: Component = None
    scorer_head: str | None = None
    scorer_sha256: str | None = None
    batch: int = 32

    def __post_init__(self) -> None:
        _at_least(self, "evaluation", 0, "every")
        _at_least(self, "evaluation", 1, "batch")
        # A Frechet distance needs a covariance.
        _at_least(self, "evaluation", 2, "clips")

    @property
    def looks(self) -> Aesthetic:
        """The judge of looks."""
        return Aesthetic(model=self.scorer, head=self.scorer_head, sha256=self.scorer_sha256)


@dataclass(frozen=True)
class Saving:
    """When the state of a run is written to its folder.

    Attributes:
        every: updates between checkpoints; the last update always writes one.
        keep: newest checkpoints that stay on disk.
        best: metric of the evaluation whose best checkpoint stays as well, such as motion_error_px; none: no such one.
    """

    every: int
    keep: int
    best: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, "saving", 1, "every", "keep")
        require(
            self.best is None or self.best in BETTER,
            f"saving.best must be one of {', '.join(BETTER)}, got {self.best!r}",
        )


# What of an evaluation says that one policy is better than another, and whether less (-1) or more (1) is better.
BETTER = {"motion_error_px": -1, "motion_consistency": 1, "aesthetic": 1, "frechet": -1, "frechet_video": -1}


@dataclass(frozen=True)
class Guard:
    """What happens where a latent, log-prob, video, reward, loss or gradient is not finite. It never reaches the
    weights.

    Attributes:
        non_finite: `skip` leaves the update out, in all processes, and says so; `stop` ends the run.
        patience: updates in a row that were left out, or had no scored group, after which the run ends all the same.
        bundles: first bad updates of which everything is kept that `experiments/replay.py` needs; 0: none.
    """

    non_finite: Literal["skip", "stop"] = "skip"
    patience: int = 5
    bundles: int = 2

    def __post_init__(self) -> None:
        _at_least(self, "guard", 1, "patience")
        _at_least(self, "guard", 0, "bundles")


@dataclass(frozen=True)
class Alarms:
    """When a run warns that a reward may be cheated; it warns and goes on.

    Attributes:
        warmup: first updates, whose mean the later ones are compared with.
        factor: edges, motion or diversity inside a group that grow or shrink by more set off an alarm.
        kl: KL to the initial policy, nats per latent value, above which there is an alarm; none: 0.05, in runs that
            measure it (`algorithm.kl_weight` > 0, and DPO).
    """

    usual_kl: ClassVar[float] = 0.05

    warmup: int = 5
    factor: float = 2.0
    kl: float | None = None

    def __post_init__(self) -> None:
        _at_least(self, "alarms", 1, "warmup")
        require(math.isfinite(self.factor) and self.factor > 1, f"alarms.factor must be more than 1, got {self.factor}")
        if self.kl is not None:
            _positive(self, "alarms", "kl")

    @property
    def most_kl(self) -> float:
        """KL above which there is an alarm."""
        return self.usual_kl if self.kl is None else self.kl


@dataclass(frozen=True)
class Settings:
    """One experiment.

    Attributes:
        seed: 0 .. 2^63 - 1; together with the weights it fixes every draw of the run.
        device: torch device such as `cpu` or `cuda`; `auto` takes the GPU where there is one.
        run_dir: folder of this run; none: `outputs/<experiment>/<date>_<time>`.
        resume: go on from the newest complete checkpoint in run_dir (or from the start where there is none).
        checkpoint: a checkpoint folder whose weights to start from, or to evaluate; none: the model's own
            weights.
        updates: number of updates of the weights.
        rollout: what the policy generates in one update.
        optimizer: AdamW, and what happens to a gradient before it.
        scoring: how the terms of reward become one number.
        evaluation: how progress is measured.
        saving: when checkpoints are written.
        alarms: when a run warns that a reward may be cheated.
        guard: what happens where a number is not finite.
        algorithm: how to learn from a scored rollout.
        model: the networks and their weights.
        adaptation: which weights are trained.
        world: where clips come from.
        reward: what is good; a weighted sum such as motion+0.5*aesthetic.
        schedule: which denoising steps are stochastic.
        transition: the kernel of a stochastic step.
        tracker: finds the motion that is rewarded.
        engine: how an update runs on the hardware.
        logger: where metrics go, beside the run's folder.
        stage: what `finetune.py` and `distill.py` do; other experiments have none.
        strategy: how `distill.py` makes the clips that its loss is computed on.
    """

    seed: int
    device: str
    run_dir: str | None
    resume: bool
    checkpoint: str | None
    updates: int
    rollout: Rollout
    optimizer: Optimizer
    scoring: Scoring
    evaluation: Evaluation
    saving: Saving
    alarms: Alarms
    guard: Guard
    algorithm: Component
    model: Component
    adaptation: Component
    world: Component
    reward: dict[str, Component]
    schedule: Component
    transition: Component
    tracker: Component
    engine: Component
    logger: Component
    stage: Component = None
    strategy: Component = None

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed must lie in 0 .. 2^63 - 1, got {self.seed}")
        require(
            re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device) is not None,
            f"device must be auto, cpu, mps, cuda or cuda:<number>, got {self.device!r}",
        )
        require(self.updates >= 1, f"updates must be at least 1, got {self.updates}")
        require(len(self.reward) >= 1, "reward is empty; name at least one, such as reward=motion")
        for name in self.scoring.optional:
            require(name in self.reward, f"scoring.optional names {name}, but reward is {' + '.join(self.reward)}")
