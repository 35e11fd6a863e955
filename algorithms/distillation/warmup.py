"""What may come before distribution matching: the teacher's weights, made causal (AR-Drag section 3.2).

Each stage is a loss of a batch: a function of the weights and a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.distillation.losses import Loss, consistency_loss, flow_matching_loss, ode_regression_loss
from algorithms.distillation.noise import Noise, noised, shifted
from algorithms.distillation.rollouts import Student
from algorithms.distillation.scores import guided_x0
from data.draws import Stream, generator
from envs.transitions import ode_mean
from policies.causal_dit import CausalWanTransformer3DModel
from policies.ema import EMA
from policies.sampler import generate


@dataclass(frozen=True)
class Teacher:
    """The bidirectional model with its guidance.

    Attributes:
        network: frozen.
        negative: embedding of the negative prompt `[1, L, D]`.
        guidance: see `guided_x0`.
    """

    network: CausalWanTransformer3DModel
    negative: Tensor
    guidance: float

    def x0(self, x: Tensor, sigma: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        """Guided prediction, without gradient."""
        with torch.no_grad():
            return guided_x0(self.network, x, sigma, condition, text, self.negative, self.guidance)

    def step(self, x: Tensor, now: Tensor, later: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        """One step of the ODE from levels `now [B, M]` to `later`."""
        before, after = (level[..., None, None, None] for level in (now, later))
        v = (x - self.x0(x, now, condition, text)) / before
        return ode_mean(x, v, before, after)


def finer(sigmas: Tensor, substeps: int) -> Tensor:
    """Noise table with every step of `sigmas [N+1]` cut into `substeps` equal ones: `[N * substeps + 1]`."""
    cuts = torch.arange(substeps) / substeps
    inner = sigmas[:-1, None] + (sigmas[1:] - sigmas[:-1])[:, None] * cuts
    return torch.cat([inner.flatten(), sigmas[-1:]])


def teacher_forcing(student: Student, key: tuple[int, ...], shift: float) -> Loss:
    """Flow matching of every frame at a noise level of its own, given the true frames before it (Eq. 7, causal)."""
    truth, rng = student.truth, generator(Stream.TRAINING, *key)
    rule, frames = student.causality, truth.shape[1]
    u = torch.from_numpy(rng.uniform(size=(len(truth), rule.chunks(frames)))).float()
    sigma = rule.spread(shifted(u, shift), frames).to(truth.device)
    eps = torch.from_numpy(rng.standard_normal(tuple(truth.shape), dtype="float32")).to(truth.device)
    x = noised(truth, eps, sigma)
    return flow_matching_loss(student.velocity(truth, x, sigma), truth, eps)


def own_history(student: Student, key: tuple[int, ...], share: float) -> Loss:
    """Flow matching of every frame at one of the student's noise levels, given the frames before it that the student
    itself makes, in `share` of the clips (the others have the true ones). A frame's target is the true one whatever the
    history looks like, so the student learns to come back from its own mistakes.
    """
    truth, rng = student.truth, generator(Stream.TRAINING, *key)
    rule, (frames, steps) = student.causality, student.state["stochastic"].shape[1:]
    own = generate(student.network, student.kernel, rule, student.state).latents[:, :, -1]
    chosen = torch.from_numpy(rng.uniform(size=len(truth)) < share).to(truth.device)
    history = torch.where(chosen[:, None, None, None, None], own, truth)
    drawn = torch.from_numpy(rng.integers(steps, size=(len(truth), rule.chunks(frames)))).to(truth.device)
    sigma = student.levels(rule.spread(drawn, frames))
    eps = torch.from_numpy(rng.standard_normal(tuple(truth.shape), dtype="float32")).to(truth.device)
    return flow_matching_loss(student.velocity(history, noised(truth, eps, sigma), sigma), truth, eps)


def ode_initialisation(student: Student, teacher: Teacher, exits: Tensor, substeps: int) -> Loss:
    """Regress the ends of the teacher's ODE paths from points on them, given the ends before (CausVid, section 4.3).

    Args:
        student: its noise is where the paths begin.
        teacher: makes the paths.
        exits: `[B, M]`, the student's step at which each frame's path is entered.
        substeps: the teacher's steps for one of the student's.
    """
    state = student.state
    table = finer(state["sigma"][0, 0].cpu(), substeps).to(state["sigma"].device)
    x, points = state["latents"], []
    for i in range(len(table) - 1):
        if i % substeps == 0:
            points.append(x)
        now, later = (table[j].expand(x.shape[:2]) for j in (i, i + 1))
        x = teacher.step(x, now, later, state["condition"], state["text"])
    path = torch.stack(points, 2)
    entered = path.take_along_dim(exits[..., None, None, None, None], 2).squeeze(2)
    return ode_regression_loss(student.predict(x, entered, student.levels(exits)), x)


def consistency(
    student: Student, average: EMA, teacher: Teacher, key: tuple[int, ...], substeps: int, huber: float
) -> Loss:
    """Causal consistency distillation: one step of the teacher's ODE must not change the prediction.

    Args:
        student: with the true history.
        average: its averaged weights, which make the target.
        teacher: makes the step.
        key: of the TRAINING stream.
        substeps: the teacher's steps for one of the student's.
        huber: see `consistency_loss`.
    """
    state, truth = student.state, student.truth
    table = finer(state["sigma"][0, 0].cpu(), substeps).to(truth.device)
    rng = generator(Stream.TRAINING, *key)
    at = torch.from_numpy(rng.integers(len(table) - 1, size=(len(truth), 1))).to(truth.device)
    now, later = (table[at + i].expand(truth.shape[:2]) for i in (0, 1))
    noise = Noise(now, state["latents"])
    x = noise.on(truth)
    nearer = teacher.step(x, now, later, state["condition"], state["text"])
    with torch.no_grad(), average.swap():
        target = student.predict(truth, nearer, later)
    return consistency_loss(student.predict(truth, x, now), target, huber)
