"""What a policy could do instead of moving the object: for every tracker, and with looks counted too, it pays less.

An honest mover is half a pixel off, as a good policy is. `python -m tests.test_cheats` prints the table of
docs/rewards.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metrics.anchor import FOREIGN, anchored, differences
from rewards.aesthetic import Aesthetic
from rewards.base import Reward, RewardContext
from rewards.composite import Composite
from rewards.motion import Motion
from runtime.models import ROOT
from tests.moving import asking, carried, line, render, ringed
from tracking.lucas_kanade import LucasKanade
from tracking.ncc import NCC
from tracking.trackers import Tracker, Truth

PATH = line((9.0, 10.0), (0.7, 0.5))
STILL = PATH[:1].expand_as(PATH)
LATE = torch.arange(17) > 0
HALF = torch.cat([STILL[:9], PATH[-1:].expand(8, 2)])
OFF = PATH + torch.tensor([0.5, 0.0]) * LATE[:, None]
# Of conf/reward/aesthetic.yaml: looks are learned far faster than motion.
LOOKS = 0.02
PIXELS = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="xy"), -1)


def away(t: int, centre: Tensor = PATH) -> Tensor:
    """Distance `[32, 32]` of each pixel from where the point was asked to be."""
    return (PIXELS - centre[t]).norm(dim=-1)


def dot_painter(seed: int, first: int = 1) -> Tensor:
    """Paints the control's heatmap over a still, from a frame on."""
    video = render(STILL, seed=seed)
    for t in range(first, 17):
        heat = torch.exp(-(away(t) ** 2) / 8)
        video[:, t] = video[:, t] * (1 - heat) + heat
    return video


def texture_destroyer(seed: int, first: int = 1) -> Tensor:
    """Moves, but leaves a flat disc of the object, from a frame on."""
    video = render(PATH, seed=seed)
    for t in range(first, 17):
        video[:, t][(away(t) <= 5).expand(3, -1, -1)] = 0.2
    return video


def pixel_mover(seed: int, radius: float) -> Tensor:
    """Carries the touched pixel and its neighbours along the path; the object stays where it was."""
    return carried(render(STILL, seed=seed), render(PATH, seed=seed), PATH, radius, first=1)


def stamper(seed: int, radius: float) -> Tensor:
    """Lets the object stand and carries a disc of another texture along the path, from frame 0 on."""
    return carried(render(STILL, seed=seed), render(PATH, seed=seed + 50), PATH, radius, first=0)


def wedges(seed: int, hole: float, radius: float) -> Tensor:
    """Lets the object stand and carries a ring of black and white wedges along the path, from frame 0 on."""
    return ringed(render(STILL, seed=seed), PATH, hole, radius)


# name: (video of a seed, where the touched point truly is, whether it can still be seen)
CLIPS = {
    "honest": (lambda seed: render(OFF, seed=seed), OFF, True),
    "static": (lambda seed: render(STILL, seed=seed), STILL, True),
    "dot": (dot_painter, STILL, True),
    "teleport": (lambda seed: render(HALF, seed=seed), HALF, True),
    "texture": (texture_destroyer, PATH, False),
    "pixel": (lambda seed: pixel_mover(seed, 0.8), STILL, True),
    "patch": (lambda seed: pixel_mover(seed, 1.5), STILL, True),
    "carried": (lambda seed: pixel_mover(seed, 3.0), STILL, True),
    "dot from 0": (lambda seed: dot_painter(seed, 0), STILL, True),
    "texture from 0": (lambda seed: texture_destroyer(seed, 0), PATH, False),
    "stamp 2": (lambda seed: stamper(seed, 2), STILL, True),
    "stamp 3": (lambda seed: stamper(seed, 3), STILL, True),
    "stamp 5": (lambda seed: stamper(seed, 5), STILL, True),
    "ring": (lambda seed: wedges(seed, 3.5, 6.0), STILL, True),
    "wide ring": (lambda seed: wedges(seed, 5.5, 8.0), STILL, True),
}


def truth(name: str) -> Tracker:
    """The tracker that knows where the object is."""
    _, path, seen = CLIPS[name]
    visible = torch.full((1, 1, 17), seen)
    visible[..., 0] = True
    return Truth(path[None, None], visible)


TRACKERS: dict[str, Callable[[str], Tracker]] = {
    "ncc": lambda name: NCC(),
    "lucas_kanade": lambda name: LucasKanade(),
    "truth": truth,
}


@cache
def looks() -> Aesthetic:
    """The shipped scorer."""
    reward = Aesthetic(weight=LOOKS)
    reward.prepare(RewardContext("cpu", NCC(), ROOT / "assets" / "tiny"))
    return reward


def score(name: str, tracker: str, seed: int, profile: str, support: int, with_looks: bool) -> float:
    """The reward of a clip, mean over its latent frames after the first."""
    motion = Motion(profile=profile, support=support)
    motion.prepare(RewardContext("cpu", TRACKERS[tracker](name), Path("assets")))
    terms: dict[str, Reward] = {"motion": motion, "aesthetic": looks()} if with_looks else {"motion": motion}
    video, true = CLIPS[name][0](seed)[None], render(PATH, seed=seed)
    return float(Composite(terms).score(video, asking(PATH, video=true))["reward"][:, 1:].mean())


def apart(name: str, seed: int) -> float:
    """How far frame 0 is from the true one under the touched point."""
    video, true = CLIPS[name][0](seed)[None], render(PATH, seed=seed)[None]
    return float(differences(video, true[:, :, :1], asking(PATH).trajectory, NCC().reach(32, 32)))


def table() -> str:
    """Markdown: what motion alone pays, seed 0, by profile and tracker, and how far frame 0 is off over 8 seeds."""
    lines = [["", "", *CLIPS], ["---"] * (2 + len(CLIPS))]
    for profile in ("paper", "train"):
        for tracker in TRACKERS:
            values = [f"{score(name, tracker, 0, profile, 0, False):.2f}" for name in CLIPS]
            lines.append([f"`{profile}`", f"`{tracker}`", *values])
    ranges = [sorted(apart(name, seed) for seed in range(8)) for name in CLIPS]
    lines.append(["frame 0 is off", "", *(f"{found[0]:.2f} to {found[-1]:.2f}" for found in ranges)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@pytest.mark.parametrize("with_looks", [False, True], ids=["motion", "motion+aesthetic"])
@pytest.mark.parametrize("profile", ["paper", "train", "tight"])
@pytest.mark.parametrize(("tracker", "support"), [("ncc", 0), ("ncc", 4), ("lucas_kanade", 0), ("truth", 0)])
def test_an_honest_mover_beats_every_cheat(tracker: str, support: int, profile: str, with_looks: bool) -> None:
    for seed in range(4):
        found = {name: score(name, tracker, seed, profile, support, with_looks) for name in CLIPS}
        honest = found.pop("honest")
        assert honest > 4
        assert all(value < honest - 0.5 for value in found.values()), (seed, honest, found)


def test_a_frame_0_that_shows_something_else_is_not_where_tracking_starts() -> None:
    video = torch.cat([CLIPS[name][0](0)[None] for name in ("honest", "stamp 5", "dot")])
    first, asked = render(PATH)[None, :, :1].repeat(3, 1, 1, 1, 1), asking(PATH).repeat(3)
    off = differences(video, first, asked.trajectory, NCC().reach(32, 32))
    assert off[0] == off[2] == 0 and off[1] > FOREIGN
    shown, foreign = anchored(video, first, asked.trajectory, NCC())
    assert foreign.tolist() == [False, True, False]
    assert torch.equal(shown[1, :, 0], first[1, :, 0]) and torch.equal(shown[1, :, 1:], video[1, :, 1:])
    assert torch.equal(shown[::2], video[::2])
    away_then = replace(asked.trajectory, presence=torch.zeros_like(asked.trajectory.presence))
    assert not differences(video, first, away_then, 6).any(), "a track that begins later has no touched point"


if __name__ == "__main__":
    print(table())
