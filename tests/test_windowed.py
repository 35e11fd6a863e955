"""`strategy=windowed`: whoever judges sees a clip of the window's length that begins with the window."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.distillation import strategies
from algorithms.distillation.dmd import DistributionMatching
from algorithms.distillation.noise import Noise
from algorithms.distillation.rollouts import Generated, Student, judged
from algorithms.distillation.scores import Discriminator
from algorithms.distillation.settings import DMD
from algorithms.distillation.warmup import Teacher
from envs.control import assemble_condition
from tests.students import BATCH, LATENT, student
from tests.test_distillation_stages import player

FRAMES, WIDE, LATE = 9, 3, 3
CHANNELS = LATENT[0]


def matching(strategy: strategies.Strategy, **changes: Any) -> DistributionMatching:
    players = player()
    settings = replace(DMD(layers=[0, 1], r1=1.0, r2=1.0), **changes)
    return DistributionMatching(players, settings, strategy, lambda draw: begun(players.student, draw), seed=0)


def begun(model: Any, draw: int) -> Student:
    return student(model, frames=FRAMES, key=draw)


def late(game: DistributionMatching) -> tuple[Student, Generated, Noise]:
    """Clips whose window does not begin with them."""
    who = game.begin(0)
    made = game.strategy(who)._replace(window=slice(LATE, LATE + WIDE))
    return who, made, Noise.draw(made.x0, (0,), 5.0)


@pytest.mark.parametrize("frames", [FRAMES, FRAMES + 1])
def test_a_window_as_long_as_the_clip_is_self_rollout(frames: int) -> None:
    found = []
    for strategy in (strategies.SelfRollout(), strategies.Windowed(frames=frames)):
        game = matching(strategy)
        who = game.begin(0)
        made = game.strategy(who)
        noise = Noise.draw(made.x0, (0,), 5.0)
        loss, metrics = game._generator_loss(who, made, noise)
        (gradient,) = torch.autograd.grad(loss, made.x0)
        critic, more = game._critic_loss(who, made._replace(x0=made.x0.detach()), noise, 0)
        found.append((loss, gradient, critic, metrics | more))
    for one, other in zip(*found, strict=True):
        assert one == other if isinstance(one, dict) else torch.equal(one, other)


def test_every_judge_sees_the_window_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    game = matching(strategies.Windowed(frames=WIDE))
    who, made, noise = late(game)
    cut = made.window
    seen: list[tuple[str, Tensor, Tensor]] = []
    score, judge = Teacher.x0, Discriminator.forward

    def real(self: Teacher, x: Tensor, sigma: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        seen.append(("real", x, condition))
        return score(self, x, sigma, condition, text)

    def fake(model: Any, x: Tensor, sigma: Tensor, condition: Tensor, *rest: Tensor) -> Tensor:
        seen.append(("fake", x, condition))
        return x

    def told(self: Discriminator, x: Tensor, sigma: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        seen.append(("judge", x, condition))
        return judge(self, x, sigma, condition, text)

    monkeypatch.setattr(Teacher, "x0", real)
    monkeypatch.setattr(Discriminator, "forward", told)
    for name in ("predict_x0", "velocity"):
        monkeypatch.setattr(f"algorithms.distillation.dmd.{name}", fake)
    game._generator_loss(who, made, noise)
    game._critic_loss(who, made._replace(x0=made.x0.detach()), noise, 0)
    assert [name for name, *_ in seen] == ["real", "fake", "judge", "fake", *["judge"] * 4]
    for name, x, condition in seen:
        assert x.shape == (BATCH, WIDE, *LATENT) and condition.shape[:2] == (BATCH, WIDE), name
    assert all(torch.equal(x, noise.on(made.x0)[:, cut]) for _, x, _ in seen[:4])
    assert torch.equal(seen[4][1], noise.on(who.truth)[:, cut])
    begins = [condition[:, 0, 4 : 4 + CHANNELS] for *_, condition in seen]
    assert all(torch.equal(begin, made.frames[:, LATE]) for begin in begins[:4]), "the frame that later ones saw"
    own = [made.frames[:, LATE] if i in (1, 3) else who.truth[:, LATE] for i in range(4)]
    assert all(torch.equal(begin, frame) for begin, frame in zip(begins[4:], own, strict=True)), "each its own"


def test_a_window_is_conditioned_as_a_clip_that_begins_there() -> None:
    """As training made the condition of whole clips: mask and reference in the first frame, noise in later ones."""
    game = matching(strategies.Windowed(frames=WIDE))
    who, made, _ = late(game)
    condition = who.state["condition"][:, made.window]
    noise, control = condition[:, :, 4 : 4 + CHANNELS], condition[:, :, 4 + CHANNELS :]
    clips = judged(who, made)
    later = slice(1, None)  # the fixture's masks are random where training has 0
    for found, frames in ((clips.condition, made.frames), (clips.true_condition, who.truth)):
        expected = assemble_condition(frames[:, LATE], control, noise)
        assert torch.equal(found[:, 0], expected[:, 0])
        assert torch.equal(found[:, later, 4:], expected[:, later, 4:])
    assert not clips.condition.requires_grad
    first = judged(who, made._replace(window=slice(0, WIDE)))
    assert torch.equal(first.condition, who.state["condition"][:, :WIDE]), "the clip's own reference stays"


def test_the_loss_of_a_window_is_that_of_a_clip_of_its_own() -> None:
    game = matching(strategies.Windowed(frames=WIDE))
    who, made, noise = late(game)
    made = made._replace(x0=made.x0.detach())
    clips = judged(who, made)
    state = who.state.clone()
    state["condition"] = clips.condition
    alone = replace(who, state=state, truth=clips.truth)
    short = Generated(clips.x0, made.frames[:, made.window], made.exits[:, made.window], slice(0, WIDE))
    found = game._generator_loss(who, made, noise)[0]
    assert torch.equal(found, game._generator_loss(alone, short, noise.cut(made.window))[0])


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_what_the_window_leaves_out_is_not_moved(adversarial: float) -> None:
    penalty = 1.0 if adversarial else 0.0
    game = matching(strategies.Windowed(frames=WIDE), adversarial=adversarial, r1=penalty, r2=penalty)
    who, made, noise = late(game)
    (gradient,) = torch.autograd.grad(game._generator_loss(who, made, noise)[0], made.x0)
    inside = torch.zeros(FRAMES, dtype=torch.bool)
    inside[made.window] = True
    assert torch.equal(gradient.abs().amax((0, 2, 3, 4)) > 0, inside)
