"""The chain of stages: averaged weights are the result of each, and clips of every frame size are begun as asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from algorithms.distillation import strategies, warmup
from algorithms.distillation.chain import Distillation
from algorithms.distillation.finetune import finetune
from algorithms.distillation.pool import LatentPool
from algorithms.distillation.settings import DMD, Distill, FineTune, TeacherForcingStage
from algorithms.distillation.warmup import Teacher
from algorithms.pretraining.loop import unrecorded
from envs.transitions import CPS, ODE
from policies.causality import Causality
from policies.ema import EMA
from tests.students import LATENT, STEPS, TABLE, network, silent, student

DECAY = 0.6
NEGATIVE = torch.zeros(1, 5, 6)


def pool(wide: int = LATENT[2], seed: int = 0) -> LatentPool:
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randn(8, 6, LATENT[0], LATENT[1], wide, generator=draw)
    control = torch.randn(latents.shape, generator=draw)
    return LatentPool(latents, control, torch.randn(8, 5, 6, generator=draw), rows=8)


class ByHand:
    """An average of a network's weights, kept beside training."""

    def __init__(self, model: nn.Module, moves: str) -> None:
        self.model, self.moves = model, moves
        self.average = [p.detach().clone() for p in model.parameters()]
        self.steps = 0

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if any(name.endswith(self.moves) for name in metrics):
            self.steps += 1
            for kept, now in zip(self.average, self.model.parameters(), strict=True):
                kept.mul_(DECAY).add_(now.detach(), alpha=1 - DECAY)

    def check(self, result: nn.Module, steps: int) -> None:
        assert self.steps == steps
        for wanted, found in zip(self.average, result.parameters(), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def chain(settings: Distill, updates: int = 2, record: Any = unrecorded) -> Distillation:
    return Distillation(
        settings, strategies.SelfRollout(), Causality(window=2), TABLE.tolist(), updates, 5, silent, record=record
    )


def test_finetuning_gives_the_averaged_weights() -> None:
    model = network()
    hand = ByHand(model, "loss")
    stage = FineTune(batch=4, pool=8, ema=DECAY)
    found, _ = finetune([pool()], stage, model, NEGATIVE, 3, report=silent, record=hand.record)
    hand.check(found, 3)


@pytest.mark.parametrize("match", [False, True])
def test_every_stage_gives_the_averaged_weights(match: bool, tmp_path: Path) -> None:
    """Distribution matching averages over steps of the generator, not of the critics."""
    model, teacher = network(), network(3)
    hand = ByHand(model, "dmd/dmd" if match else "teacher_forcing/loss")
    warm = TeacherForcingStage(steps=0 if match else 3, batch=4, ema=DECAY)
    dmd = DMD(generator_every=2, batch=4, lr=1e-3, ema=DECAY, layers=[0, 1])
    settings = Distill("teacher", pool=8, match=match, teacher_forcing=warm, dmd=dmd)
    made = chain(settings, record=hand.record)
    hand.check(made.run(model, teacher, NEGATIVE, [pool()], tmp_path), 2 if match else 3)


def test_the_target_of_consistency_is_what_the_averaged_weights_predict() -> None:
    model = network()
    who, teacher = student(model), Teacher(network(3), NEGATIVE, 1.0)
    average = EMA(model, 0.5)
    losses = {}
    for name in ("the same", "another"):
        losses[name] = float(warmup.consistency(who, average, teacher, (5,), substeps=4, huber=0.0)[0].detach())
        average.shadow = {key: value + 0.05 for key, value in average.shadow.items()}
    assert losses["the same"] != losses["another"]


@pytest.mark.parametrize(("eta", "kernel"), [(0.0, ODE()), (0.5, CPS(0.5)), (1.0, CPS(1.0))])
def test_clips_begin_as_the_settings_say(eta: float, kernel: object) -> None:
    made = chain(Distill("teacher", pool=8, eta=eta, dmd=DMD(batch=3), teacher_forcing=TeacherForcingStage(batch=3)))
    made.pools = [pool(4), pool(6, seed=1)]
    begun = [made.begin(network(), "dmd", draw) for draw in range(12)]
    assert all(who.kernel == kernel for who in begun)
    for who in begun:
        # The last step ends at 0, where no kernel adds noise.
        assert who.state["stochastic"][0, 0].tolist() == [eta > 0] * (STEPS - 1) + [False]
    sizes = {tuple(who.truth.shape[3:]) for who in begun}
    assert sizes == {(4, 4), (4, 6)}, "of every frame size"
    again = made.begin(network(), "dmd", 7)
    assert torch.equal(again.truth, begun[7].truth) and torch.equal(again.state["latents"], begun[7].state["latents"])
    assert not same_clips(begun[7].truth, made.begin(network(), "teacher_forcing", 7).truth)


def same_clips(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def test_finetuning_goes_through_the_frame_sizes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    wide: list[int] = []
    real = LatentPool.sample

    def spy(self: LatentPool, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        wide.append(self.latents.shape[-1])
        return real(self, *arguments)

    monkeypatch.setattr(LatentPool, "sample", spy)
    finetune([pool(4), pool(6)], FineTune(batch=4, pool=8), network(), NEGATIVE, 4, report=silent)
    assert wide == [4, 6, 4, 6]
