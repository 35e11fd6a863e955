"""At the sizes of real models trackers follow, and cheats pay no more, than at the embedded world's.

`python -m tests.test_large_frames` prints the table of docs/rewards.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metrics.motion import endpoint_error
from rewards.base import RewardContext
from rewards.motion import Motion
from tests.moving import asking, carried, line, render, ringed
from tracking.lucas_kanade import LucasKanade
from tracking.ncc import NCC, SHORT_EDGE
from tracking.trackers import Tracker

SIZE, RADIUS, FRAMES = (368, 640), 60.0, 17
PATH = line((150.0, 120.0), (9.0, 5.0), FRAMES)
STILL = PATH[:1].expand_as(PATH)
TRACKERS: dict[str, Tracker] = {"ncc": NCC(), "lucas_kanade": LucasKanade()}


@cache
def true(seed: int = 0) -> Tensor:
    """The object moves as asked."""
    return render(PATH, SIZE, RADIUS, seed)


@cache
def still(seed: int = 0) -> Tensor:
    """Nothing moves."""
    return render(STILL, SIZE, RADIUS, seed)


def mover(share: float) -> Tensor:
    """The object stays; its inner part, up to a share of its radius, is carried along the path."""
    return carried(still(), true(), PATH, share * RADIUS, first=1)


def stamper(share: float, seed: int = 50) -> Tensor:
    """The object stays; a disc of another texture is carried along the path, from frame 0 on."""
    return carried(still(), true(seed), PATH, share * RADIUS, first=0)


def wedges(hole: float, rim: float) -> Tensor:
    """The object stays; black and white wedges around an untouched square are carried along, from frame 0 on."""
    return ringed(still(), PATH, hole * RADIUS, rim * RADIUS)


CHEATS: dict[str, Callable[[], Tensor]] = {
    "static clip": still,
    "carried patch, 0.15": lambda: mover(0.15),
    "0.3": lambda: mover(0.3),
    "stamp, 0.4": lambda: stamper(0.4),
    "ring, 0.1 to 0.2": lambda: wedges(0.1, 0.2),
    "0.2 to 0.4": lambda: wedges(0.2, 0.4),
    "0.4 to 0.6": lambda: wedges(0.4, 0.6),
    "0.6 to 0.9": lambda: wedges(0.6, 0.9),
}
# What a tracker may take for the object: most of it moves, or something else as large does.
LEFT: dict[str, Callable[[], Tensor]] = {
    "carried patch, 0.4": lambda: mover(0.4),
    "0.6": lambda: mover(0.6),
    **{f"stamp {i}, 0.8": lambda i=i: stamper(0.8, 50 + i) for i in range(5)},  # type: ignore[misc]
}


def score(tracker: str, video: Tensor) -> float:
    """The motion reward, mean over latent frames after the first."""
    motion = Motion(profile="train")
    motion.prepare(RewardContext("cpu", TRACKERS[tracker], Path("assets")))
    return float(motion.score(video[None], asking(PATH, SIZE, true())).value[:, 1:].mean())


def table() -> str:
    """Markdown: what motion alone pays, by tracker."""
    shown = CHEATS | LEFT
    lines = [["", "honest", *shown], ["---"] * (2 + len(shown))]
    for name in TRACKERS:
        videos = [true(), *(make() for make in shown.values())]
        lines.append([f"`{name}`", *(f"{score(name, video):.2f}" for video in videos)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_moving_object_is_followed(name: str) -> None:
    asked = asking(PATH, SIZE).trajectory
    found = TRACKERS[name].track(true()[None], asked.xy[:, :, 0])
    error = endpoint_error(asked, found)
    assert error[..., 0].eq(0).all() and error.max() < 3 and found.visible.all(), "1/100 of the height is 3.7 px"


@pytest.mark.parametrize("name", TRACKERS)
def test_an_honest_mover_beats_every_cheat(name: str) -> None:
    honest = score(name, true())
    found = {cheat: score(name, make()) for cheat, make in CHEATS.items()}
    assert honest > 4.9
    assert all(value < honest - 1 for value in found.values()), (honest, found)


@pytest.mark.parametrize("factor", [1, 2, 6])
def test_ncc_finds_the_same_whatever_the_size(factor: int) -> None:
    """An enlarged clip is reduced again: positions are those of the small one, in its pixels."""
    path = line((20.0, 24.0), (0.7, 0.5))
    small = render(path, (SHORT_EDGE, 96), 9.0)[None]
    large = small.repeat_interleave(factor, 3).repeat_interleave(factor, 4)
    start = path[None, :1]
    wanted = NCC().track(small, start)
    found = NCC().track(large, (start + 0.5) * factor - 0.5)
    torch.testing.assert_close((found.xy + 0.5) / factor - 0.5, wanted.xy, atol=1e-3, rtol=0)
    assert torch.equal(found.visible, wanted.visible)


def test_trackers_say_how_far_they_see() -> None:
    """In the embedded world both see 13 x 13 pixels; in large frames the same share of the frame, or their window."""
    assert [tracker.reach(32, 40) for tracker in TRACKERS.values()] == [6, 6]
    assert [tracker.reach(640, 368) for tracker in TRACKERS.values()] == [32, 24]


if __name__ == "__main__":
    print(table())
