"""What a policy could do instead of moving the object: for every tracker, and with looks counted too, it pays less.

An honest mover is half a pixel off, as a good policy is. `python -m tests.test_cheats` prints the table of
docs/rewards.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards.aesthetic import Aesthetic
from rewards.base import Reward, RewardContext
from rewards.composite import Composite
from rewards.motion import Motion
from runtime.models import ROOT
from tests.moving import asking, line, render
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


def dot_painter(seed: int) -> Tensor:
    """Paints the control's heatmap over a still."""
    video = render(STILL, seed=seed)
    for t in range(1, 17):
        heat = torch.exp(-(away(t) ** 2) / 8)
        video[:, t] = video[:, t] * (1 - heat) + heat
    return video


def texture_destroyer(seed: int) -> Tensor:
    """Moves, but leaves a flat disc of the object."""
    video = render(PATH, seed=seed)
    for t in range(1, 17):
        video[:, t][(away(t) <= 5).expand(3, -1, -1)] = 0.2
    return video


def pixel_mover(seed: int, radius: float) -> Tensor:
    """Carries the touched pixel and its neighbours along the path; the object stays where it was."""
    video = render(STILL, seed=seed)
    carried = render(PATH, seed=seed)
    for t in range(1, 17):
        near = (away(t) <= radius).expand(3, -1, -1)
        video[:, t][near] = carried[:, t][near]
    return video


# name: (video of a seed, where the touched point truly is, whether it can still be seen)
CLIPS = {
    "honest": (lambda seed: render(OFF, seed=seed), OFF, True),
    "static": (lambda seed: render(STILL, seed=seed), STILL, True),
    "dot": (dot_painter, STILL, True),
    "teleport": (lambda seed: render(HALF, seed=seed), HALF, True),
    "texture": (texture_destroyer, PATH, False),
    "pixel": (lambda seed: pixel_mover(seed, 0.8), STILL, True),
    "patch": (lambda seed: pixel_mover(seed, 1.5), STILL, True),
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
    video = CLIPS[name][0](seed)[None]
    return float(Composite(terms).score(video, asking(PATH))["reward"][:, 1:].mean())


def table() -> str:
    """Markdown: what motion alone pays, seed 0, for both profiles and every tracker."""
    lines = [["", "", *CLIPS], ["---"] * (2 + len(CLIPS))]
    for profile in ("paper", "train"):
        for tracker in TRACKERS:
            values = [f"{score(name, tracker, 0, profile, 0, False):.2f}" for name in CLIPS]
            lines.append([f"`{profile}`", f"`{tracker}`", *values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@pytest.mark.parametrize("with_looks", [False, True], ids=["motion", "motion+aesthetic"])
@pytest.mark.parametrize("profile", ["paper", "train"])
@pytest.mark.parametrize(("tracker", "support"), [("ncc", 0), ("ncc", 4), ("lucas_kanade", 0), ("truth", 0)])
def test_an_honest_mover_beats_every_cheat(tracker: str, support: int, profile: str, with_looks: bool) -> None:
    for seed in range(4):
        found = {name: score(name, tracker, seed, profile, support, with_looks) for name in CLIPS}
        honest = found.pop("honest")
        assert honest > 4
        assert all(value < honest - 0.5 for value in found.values()), (seed, honest, found)


if __name__ == "__main__":
    print(table())
