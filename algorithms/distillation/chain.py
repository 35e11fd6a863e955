"""The stages of the distillation, one after the other, resumable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from algorithms.distillation import warmup
from algorithms.distillation.dmd import DistributionMatching, Players
from algorithms.distillation.losses import Loss
from algorithms.distillation.pool import LatentPool
from algorithms.distillation.rollouts import Student, exit_steps
from algorithms.distillation.scores import Discriminator
from algorithms.distillation.settings import Distill
from algorithms.distillation.settings import Warmup as Stage
from algorithms.distillation.warmup import Teacher
from algorithms.pretraining.loop import Fit, Record, matrices, never, optimise, unrecorded
from data.draws import Stream, generator
from envs.ar_video import start
from envs.transitions import CPS, ODE
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.ema import EMA, averaged

if TYPE_CHECKING:
    from algorithms.distillation.strategies import Strategy

# Draws of the stages are told apart by the iteration of their keys.
STAGES = {"teacher_forcing": 1, "own_history": 5, "ode": 2, "consistency": 3, "dmd": 4}
STRIDE = 10_000_000


class Distillation:
    """Runs the stages that have steps, in the order of `Distill.steps`.

    Args:
        settings: see `Distill`.
        strategy: how the student makes clips for distribution matching.
        causality: what a frame of the student sees.
        sigmas: the student's noise table.
        updates: generator steps of distribution matching.
        seed: of clips and noise.
        report: takes a line of progress.
        stop: see `optimise`.
        record: see `optimise`; steps are counted over all stages, and metrics carry the name of theirs.

    Attributes:
        seconds: of training, over all stages and all parts of an interrupted run; known after `run`.
    """

    def __init__(
        self,
        settings: Distill,
        strategy: Strategy,
        causality: Causality,
        sigmas: Sequence[float],
        updates: int,
        seed: int,
        report: Callable[[str], None] = print,
        stop: Callable[[], bool] = never,
        record: Record = unrecorded,
    ) -> None:
        self.settings, self.strategy, self.causality, self.seed = settings, strategy, causality, seed
        self.sigmas, self.updates, self.report = torch.tensor(list(sigmas)), updates, report
        self.stop, self.record, self.pools = stop, record, list[LatentPool]()
        self.seconds = 0.0

    def run(
        self,
        student: CausalWanTransformer3DModel,
        teacher: CausalWanTransformer3DModel,
        negative: Tensor,
        pools: list[LatentPool],
        folder: Path,
    ) -> CausalWanTransformer3DModel:
        """Train `student` in place and return it.

        Args:
            student: with the weights it begins with.
            teacher: bidirectional.
            negative: embedding of the negative prompt `[1, L, D]`.
            pools: encoded clips, one pool per frame size.
            folder: takes the state of the stage that runs, and the result of each that has run; where they are there
                already, training goes on from them.
        """
        self.pools, self.seconds, before = pools, 0.0, 0
        guide = Teacher(teacher.requires_grad_(False).eval(), negative, self.settings.guidance)
        for name, steps in self.settings.steps(self.updates).items():
            done, state = folder / f"{name}.safetensors", folder / f"{name}.pt"
            if not done.is_file():
                record = partial(self._record, name, before)
                found, seconds = self._train(name, student, guide, state, record)
                unfinished = done.with_suffix(".new")
                weights = {k: v.contiguous() for k, v in found.state_dict().items()}
                save_file(weights, unfinished, {"seconds": str(seconds)})
                unfinished.replace(done)
                state.unlink(missing_ok=True)
            student.load_state_dict(load_file(done))
            self.seconds += seconds_of(done)
            before += steps
        return student

    def begin(self, network: CausalWanTransformer3DModel, stage: str, draw: int) -> Student:
        """The student at the start of the clips of a draw."""
        count = getattr(self.settings, stage).batch
        number = STAGES[stage] * STRIDE + draw
        pool = self.pools[int(generator(Stream.TRAINING, self.seed, 17, number).integers(len(self.pools)))]
        truth, condition, text = pool.sample((self.seed, 15, number), count)
        key = torch.tensor([[self.seed, number, row, 0] for row in range(count)])
        eta = self.settings.eta
        stochastic = (self.sigmas[1:] > 0) & (eta > 0)
        state = start(condition, text, self.sigmas, stochastic, key, tuple(truth.shape[2:]))
        return Student(network, CPS(eta) if eta > 0 else ODE(), self.causality, state, truth)

    def _record(self, name: str, before: int, step: int, metrics: dict[str, float]) -> None:
        """Record a step of a stage, with `before` steps of other stages before it."""
        named = {key if key.startswith("seconds/") else f"{name}/{key}": value for key, value in metrics.items()}
        self.record(before + step, named)

    def _train(
        self, name: str, student: CausalWanTransformer3DModel, teacher: Teacher, state: Path, record: Record
    ) -> tuple[CausalWanTransformer3DModel, float]:
        """Run a stage; returns the student with its averaged weights, and seconds."""
        if name == "dmd":
            return self._match(student, teacher, state, record)
        stage: Stage = getattr(self.settings, name)
        ema = EMA(student, stage.ema)

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            loss, _ = self._loss(name, self.begin(student, name, step), teacher, ema, step)
            return loss, {}

        trained = [p for p in student.parameters() if p.requires_grad]
        fit, shaped = Fit(stage.steps, stage.lr), matrices(student)
        seconds = optimise(trained, fit, loss_of, name, self.report, ema, shaped, state, self.stop, record)
        return averaged(student, ema), seconds

    def _loss(self, name: str, student: Student, teacher: Teacher, ema: EMA, step: int) -> Loss:
        key = (self.seed, 16, STAGES[name] * STRIDE + step)
        if name == "teacher_forcing":
            return warmup.teacher_forcing(student, key, self.settings.teacher_forcing.shift)
        if name == "own_history":
            return warmup.own_history(student, key, self.settings.own_history.share)
        if name == "ode":
            exits = exit_steps(student, "per_frame")
            return warmup.ode_initialisation(student, teacher, exits, self.settings.ode.substeps)
        s = self.settings.consistency
        return warmup.consistency(student, ema, teacher, key, s.substeps, s.huber)

    def _match(
        self, student: CausalWanTransformer3DModel, teacher: Teacher, state: Path, record: Record
    ) -> tuple[CausalWanTransformer3DModel, float]:
        s = self.settings.dmd
        judge = Discriminator(teacher.network, s.layers, seed=self.seed)
        fake = copy.deepcopy(teacher.network).requires_grad_(True)
        players = Players(student, fake, judge.to(student.device), teacher)
        game = DistributionMatching(players, s, self.strategy, lambda draw: self.begin(student, "dmd", draw), self.seed)
        matched = game.train(self.updates, self.report, state, stop=self.stop, record=record)
        return matched, game.seconds


def seconds_of(done: Path) -> float:
    """Seconds that a finished stage took, from the file of its result; 0 where an older one does not say."""
    with safe_open(done, "pt") as file:
        return float((file.metadata() or {}).get("seconds", 0.0))
