"""Distribution matching with an adversary: the last stage of the student (AR-Drag section 3.2, Algorithm 1)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from algorithms.distillation.finetune import velocity
from algorithms.distillation.losses import (
    discriminator_loss,
    dmd_loss,
    flow_matching_loss,
    generator_loss,
    gradient_penalty,
)
from algorithms.distillation.noise import Noise
from algorithms.distillation.rollouts import Generated, Judged, Student, judged
from algorithms.distillation.scores import Discriminator, predict_x0
from algorithms.distillation.settings import DMD
from algorithms.distillation.warmup import Teacher
from algorithms.pretraining.loop import Interrupted, Record, Stopwatch, descend, keep, never, restore, unrecorded
from policies.causal_dit import CausalWanTransformer3DModel
from policies.ema import EMA, averaged

if TYPE_CHECKING:
    from pathlib import Path

    from algorithms.distillation.strategies import Strategy

Metrics = dict[str, float]


@dataclass
class Players:
    """Who trains: the student against the fake score and the discriminator; and the teacher, who does not.

    Attributes:
        student: the causal model.
        fake: bidirectional, learns the distribution of the student's clips.
        judge: the discriminator.
        teacher: the real score.
    """

    student: CausalWanTransformer3DModel
    fake: CausalWanTransformer3DModel
    judge: Discriminator
    teacher: Teacher


class DistributionMatching:
    """Generator and critic steps. Each is a function of the weights and the step's number.

    Args:
        players: see `Players`.
        settings: see `DMD`.
        strategy: how the student makes clips.
        begin: the student at the start of the clips of a draw, by its number.
        seed: of the noise that clips are judged under.

    Attributes:
        seconds: of training, over all parts of an interrupted run; known after `train`.
    """

    def __init__(
        self, players: Players, settings: DMD, strategy: Strategy, begin: Callable[[int], Student], seed: int
    ) -> None:
        self.players, self.settings, self.strategy, self.begin, self.seed = players, settings, strategy, begin, seed
        s = settings
        self.weights = [p for p in players.student.parameters() if p.requires_grad]
        self.critics = [*players.fake.parameters(), *players.judge.parameters()]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.weights, lr=s.lr, betas=(s.betas[0], s.betas[1]), weight_decay=0.0),
            torch.optim.AdamW(self.critics, lr=s.critic_lr, betas=(s.betas[0], s.betas[1]), weight_decay=0.0),
        ]
        self.ema = EMA(players.student, s.ema)
        self.seconds = 0.0

    def generator_step(self, draw: int) -> Metrics:
        """Move the student: DMD + weight x adversarial. Returns its losses and the norm of its gradient."""
        student = self.begin(draw)
        made = self.strategy(student)
        noise = Noise.draw(made.x0, (self.seed, 11, draw), self.settings.shift)
        loss, metrics = self._generator_loss(student, made, noise)
        norm = descend(loss, self.weights, self.optimizers[:1], self.settings.clip, "dmd: a gradient")
        self.ema.update()
        return {"loss": float(loss.detach()), "grad_norm": norm, **metrics}

    def critic_step(self, draw: int) -> Metrics:
        """Move the fake score by flow matching on the student's clips, and the discriminator. Returns as above."""
        student = self.begin(draw)
        with torch.no_grad():
            made = self.strategy(student)
        noise = Noise.draw(made.x0, (self.seed, 12, draw), self.settings.shift)
        loss, metrics = self._critic_loss(student, made, noise, draw)
        norm = descend(loss, self.critics, self.optimizers[1:], self.settings.clip, "dmd: a gradient")
        return {"critic_loss": float(loss.detach()), "critic_grad_norm": norm, **metrics}

    def _generator_loss(self, student: Student, made: Generated, noise: Noise) -> tuple[Tensor, Metrics]:
        s, text, noise = self.settings, student.state["text"], noise.cut(made.window)
        x0, condition, *_ = judged(student, made)
        x = noise.on(x0)
        with torch.no_grad():
            real = self.players.teacher.x0(x, noise.sigma, condition, text)
            fake = predict_x0(self.players.fake, x, noise.sigma, condition, text)
        loss, metrics = dmd_loss(x0, real, fake)
        if s.adversarial > 0:
            against, more = generator_loss(self.players.judge(x, noise.sigma, condition, text))
            loss, metrics = loss + s.adversarial * against, {**metrics, **more}
        return loss, {k: float(v) for k, v in metrics.items()}

    def _critic_loss(self, student: Student, made: Generated, noise: Noise, draw: int) -> tuple[Tensor, Metrics]:
        s, noise, clips = self.settings, noise.cut(made.window), judged(student, made)
        text = student.state["text"]
        v = velocity(self.players.fake, noise.on(clips.x0), noise.sigma, clips.condition, text)
        loss, metrics = flow_matching_loss(v, clips.x0, noise.eps)
        if s.adversarial > 0:
            against, more = self._discrimination(clips, text, noise, draw)
            loss, metrics = loss + s.discriminator * against, {**metrics, **more}
        return loss, {k: float(v) for k, v in metrics.items()}

    def _discrimination(self, clips: Judged, text: Tensor, noise: Noise, draw: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's loss; true and generated clips are under the same noise."""
        s, judge = self.settings, self.players.judge
        sides = (("r1", s.r1, clips.truth, clips.true_condition), ("r2", s.r2, clips.x0, clips.condition))
        noisy = [noise.on(x) for _, _, x, _ in sides]
        logits = [judge(x, noise.sigma, given, text) for x, (*_, given) in zip(noisy, sides, strict=True)]
        loss, metrics = discriminator_loss(*logits)
        for (name, weight, _, given), x, before in zip(sides, noisy, logits, strict=True):
            if weight > 0:
                disturbance = s.penalty_std * Noise.draw(x, (self.seed, 13, draw), s.shift).eps
                after = judge(x + disturbance, noise.sigma, given, text)
                penalty, more = gradient_penalty(before, after, s.penalty_std)
                loss, metrics = loss + weight * penalty, {**metrics, name: more["gradient_penalty"]}
        return loss, metrics

    def train(
        self,
        updates: int,
        report: Callable[[str], None],
        state: Path | None = None,
        every: int = 250,
        stop: Callable[[], bool] = never,
        record: Record = unrecorded,
    ) -> CausalWanTransformer3DModel:
        """Take `updates` generator steps, each with `generator_every` critic steps after it.

        Args:
            updates: see above.
            report: takes a line of progress.
            state: file that is written every `every` steps; where it exists, training goes on from it.
            every: see `state`.
            stop, record: see `optimise`; a step is one of the critics, with the generator's metrics where that moved.

        Returns:
            The student with its averaged weights.
        """
        s, everything = self.settings, [*self.weights, *self.critics]
        first, spent = restore(state, everything, self.optimizers, self.ema)
        began, metrics = time.perf_counter() - spent, dict[str, float]()
        steps = updates * s.generator_every
        for step in range(first, steps):
            if stop():
                if state is not None and step > first:
                    keep(state, step, everything, self.optimizers, self.ema, time.perf_counter() - began)
                raise Interrupted(f"dmd: stopped before step {step}")
            row, watch = self._set_rates(step), Stopwatch()
            if step % s.generator_every == 0:
                row |= self.generator_step(2 * step)
                watch.lap("generator")
            row |= self.critic_step(2 * step + 1)
            watch.lap("critics")
            record(step + 1, {**row, **watch.laps})
            metrics |= row
            if step % 50 == 0 or step == steps - 1:
                text = " ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                report(f"dmd {step}/{steps} {text} {time.perf_counter() - began:.0f}s")
            if state is not None and (step + 1) % every == 0:
                keep(state, step + 1, everything, self.optimizers, self.ema, time.perf_counter() - began)
        self.seconds = time.perf_counter() - began
        return averaged(self.players.student, self.ema)

    def _set_rates(self, step: int) -> Metrics:
        """Give both optimizers the learning rates of a step, and return them."""
        s = self.settings
        share = min(1.0, (step + 1) / s.warmup)
        rates = {"lr": s.lr * share, "critic_lr": s.critic_lr * share}
        for optimizer, rate in zip(self.optimizers, rates.values(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
        return rates
