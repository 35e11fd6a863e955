"""Which steps are stochastic, that groups share them, and how the choice is shown."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.draws import Stream, generator
from envs.schedules import (
    All,
    Deterministic,
    First,
    Last,
    RandomK,
    Schedule,
    Single,
    Window,
    draw_batch,
    picture,
)
from envs.transitions import CPS, DanceSDE, FlowSDE

FRAMES = 5
SHORT = torch.tensor([1.0, 0.755, 0.522, 0.0]).expand(FRAMES, -1)
LONG = torch.linspace(1, 0, 8).expand(FRAMES, -1)  # 7 steps, 6 of them available
EVERY = [
    Single(),
    Single("per_frame"),
    Single("one_pair"),
    All(),
    First(),
    Last(),
    Window(),
    Window(2, 2, 1),
    RandomK(),
    RandomK(2, "per_frame"),
    RandomK(2, "one_pair"),
    Deterministic(),
]


def draws(schedule: Schedule, sigma: torch.Tensor, count: int = 200) -> torch.Tensor:
    return torch.stack([schedule.draw(sigma, generator(Stream.SCHEDULE, 0, i), i) for i in range(count)])


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
@pytest.mark.parametrize("sigma", [SHORT, LONG], ids=["short", "long"])
def test_only_steps_that_end_above_zero_are_chosen(schedule: Schedule, sigma: torch.Tensor) -> None:
    chosen = draws(schedule, sigma, 30)
    assert chosen.dtype == torch.bool and chosen.shape == (30, FRAMES, sigma.shape[1] - 1)
    assert not chosen[..., -1].any()
    assert chosen.any() == schedule.learnable
    if schedule.learnable:
        assert chosen.flatten(1).any(1).all()


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_same_key_same_draw(schedule: Schedule) -> None:
    assert torch.equal(draws(schedule, LONG, 10), draws(schedule, LONG, 10))


def test_counts_and_scopes() -> None:
    assert (draws(Single(), LONG).sum(-1) == 1).all()
    assert (draws(RandomK(3), LONG).sum(-1) == 3).all()
    assert (draws(RandomK(3, "per_frame"), LONG).sum(-1) == 3).all()
    assert (draws(Single("one_pair"), LONG).sum((1, 2)) == 1).all()
    assert (draws(RandomK(4, "one_pair"), LONG).sum((1, 2)) == 4).all()
    assert (draws(All(), LONG)[..., :-1]).all()
    for same in (Single(), RandomK(3)):
        chosen = draws(same, LONG)
        assert (chosen == chosen[:, :1]).all()
    chosen = draws(Single("per_frame"), LONG)
    assert (chosen != chosen[:, :1]).any()


@pytest.mark.parametrize("scope", ["same_for_all_frames", "per_frame", "one_pair"])
def test_random_steps_are_uniform(scope: str) -> None:
    """Every available step equally often: chi-squared over 600 draws, 5 degrees of freedom, p > 0.001."""
    count = draws(Single(scope), LONG, 600)[:, :, :-1].float().sum((0, 1))
    if scope == "same_for_all_frames":
        count /= FRAMES  # the frames repeat one draw
    expected = count.sum() / 6
    assert ((count - expected) ** 2 / expected).sum() < 20.5


def test_first_and_last_follow_each_frames_own_table() -> None:
    sigma = torch.tensor([[1.0, 0.7, 0.5, 0.2, 0.0], [1.0, 0.7, 0.5, 0.0, 0.0]])
    rng = generator(Stream.SCHEDULE, 0)
    assert First().draw(sigma, rng, 0).tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    assert Last().draw(sigma, rng, 0).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


def test_window_slides_reaches_every_step_and_begins_again() -> None:
    chosen = draws(Window(size=2, stride=3, interval=2), LONG, 8)[:, 0, :-1].int().tolist()
    a, b, c = [1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]
    assert chosen == [a, a, b, b, c, c, a, a]


def test_a_group_shares_its_steps_whatever_the_batch() -> None:
    keys = torch.tensor([[3, 7, p, g] for p in range(6) for g in range(4)])
    chosen = draw_batch(Single("per_frame"), LONG, keys).view(6, 4, FRAMES, 7)
    assert (chosen == chosen[:, :1]).all()
    assert len({tuple(row.flatten().tolist()) for row in chosen[:, 0]}) > 1
    order = torch.tensor([17, 3, 20])
    assert torch.equal(draw_batch(Single("per_frame"), LONG, keys[order]), chosen.flatten(0, 1)[order])
    later = keys + torch.tensor([0, 1, 0, 0])
    assert not torch.equal(draw_batch(Single("per_frame"), LONG, later), chosen.flatten(0, 1))


@pytest.mark.parametrize(
    "schedule", [RandomK(3), RandomK(3, "per_frame"), RandomK(11, "one_pair"), Window(3)], ids=repr
)
def test_asking_for_more_steps_than_there_are_is_refused(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="schedule needs"):
        schedule.draw(SHORT, generator(Stream.SCHEDULE, 0), 0)


@pytest.mark.parametrize("schedule", [Single(), All(), First(), Last(), Window()], ids=repr)
def test_a_table_of_one_step_leaves_nothing_to_learn(schedule: Schedule) -> None:
    with pytest.raises(ValueError, match="schedule needs 1"):
        schedule.choose(np.zeros((FRAMES, 1), dtype=bool), generator(Stream.SCHEDULE, 0), 0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: RandomK(0), "random_k.k must be at least 1, got 0"),
        (lambda: Window(size=0), "window.size must be at least 1"),
        (lambda: Window(stride=-1), "window.stride must be at least 1"),
        (lambda: Single("video"), "single.scope must be one of same_for_all_frames, per_frame, one_pair"),
    ],
)
def test_bad_settings_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_picture() -> None:
    lines = picture(All(), SHORT, FlowSDE()).splitlines()
    assert lines[0].split() == ["1→0.755", "0.755→0.522", "0.522→0"]
    assert lines[1].split() == ["frames", "0-4", "●", "●", "·"]
    assert [line.split()[3] for line in lines[2:]] == ["1.147", "1.264"]
    assert all(line.startswith("warning: flow_sde") for line in lines[2:])
    for exact in (CPS(), DanceSDE(0.1)):
        assert "warning" not in picture(All(), SHORT, exact)
    assert "warning" not in picture(Deterministic(), SHORT, FlowSDE())


def test_picture_shows_what_is_drawn() -> None:
    shown = picture(Single("per_frame"), SHORT, CPS(), seed=5, iteration=2).splitlines()[1:]
    chosen = draw_batch(Single("per_frame"), SHORT, torch.tensor([[5, 2, 0, 0]]))[0]
    rows = []
    for line in shown:
        name, *marks = line.split()[1:]
        first, _, last = name.partition("-")
        rows += [[mark == "●" for mark in marks]] * (int(last or first) - int(first) + 1)
    assert rows == chosen.tolist()
