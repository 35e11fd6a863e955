"""The identity reward: an object that stays what it was, wherever it goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metrics.appearance import patches, ssim
from rewards.base import RewardContext
from rewards.identity import Identity
from tests.moving import asking, line, render
from tracking.ncc import NCC

PATH = line((8.0, 9.0), (0.7, 0.6))


def score(video: Tensor, reference: Tensor) -> Tensor:
    reward = Identity()
    reward.prepare(RewardContext("cpu", NCC(), Path("assets")))
    return reward.score(video[None], asking(PATH, video=reference)).value[0]


def test_patches_by_hand() -> None:
    x = torch.arange(8.0).expand(8, 8)
    video = torch.stack([x, x.T, x + x.T])[None, :, None].repeat(1, 1, 2, 1, 1)
    found = patches(video, torch.tensor([[[[3.0, 4.0], [0.0, 7.5]]]]), 1.0).unflatten(-1, (3, 3))
    assert found.shape == (1, 1, 2, 3, 3, 3)
    assert found[0, 0, 0, 0].tolist() == [[2, 3, 4]] * 3 and found[0, 0, 0, 1, :, 0].tolist() == [3, 4, 5]
    edge = found[0, 0, 1, 0, 0].tolist()
    assert edge == pytest.approx([0, 0, 1], abs=1e-5), "beyond the border the nearest pixel"


def test_ssim_by_hand() -> None:
    a = torch.rand(2, 3, 49, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(ssim(a, a).min()) == pytest.approx(1)
    flat = torch.zeros(1, 3, 9)  # means 0.5 and 1, no contrast
    assert float(ssim(flat, flat + 1)) == pytest.approx((2 * 0.5 * 1 + 1e-4) / (0.25 + 1 + 1e-4))
    # Values 0.25, 0.75 against 0.75, 0.25: means 0.5, variances 1/16, covariance -1/16.
    up, down = torch.tensor([-0.5, 0.5]).expand(1, 3, 2), torch.tensor([0.5, -0.5]).expand(1, 3, 2)
    assert float(ssim(up, down)) == pytest.approx((-1 / 8 + 9e-4) / (1 / 8 + 9e-4))


def test_an_object_that_moves_and_stays_itself_scores_high_and_a_spoilt_one_low() -> None:
    clip = render(PATH)
    honest = score(clip, clip)
    assert honest[0] == 0 and honest[1:].min() > 0.8
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    recoloured, blurred, destroyed = clip.clone(), clip.clone(), clip.clone()
    for t in range(1, 17):
        disc = ((x - PATH[t, 0]) ** 2 + (y - PATH[t, 1]) ** 2 <= 25).expand(3, -1, -1)
        recoloured[:, t][disc] = recoloured[:, t].flip(0)[disc]
        blurred[:, t] = torch.nn.functional.avg_pool2d(clip[:, t], 5, 1, 2, count_include_pad=False)
        destroyed[:, t][disc] = 0.2
    for spoilt in (recoloured, blurred, destroyed):
        assert score(spoilt, clip)[1:].mean() < honest[1:].mean() - 0.2


def test_the_reference_is_the_true_first_frame_and_nothing_later() -> None:
    clip = render(PATH)
    other = clip.clone()
    other[:, 1:] = 0
    assert torch.equal(score(clip, other), score(clip, clip))
    assert score(clip, render(PATH, seed=5))[1:].mean() < 0.5


def test_what_cannot_be_seen_scores_zero_and_what_is_not_asked_does_not_count() -> None:
    clip = render(PATH)
    reward = Identity()
    reward.prepare(RewardContext("cpu", NCC(), Path("assets")))
    control = asking(PATH, video=clip)
    half = control.trajectory.presence.clone()
    half[..., 9:] = False
    value = reward.score(clip[None], replace(control, trajectory=replace(control.trajectory, presence=half))).value[0]
    assert value[1:3].min() > 0.8 and value[3:].tolist() == [0, 0]
    broken = clip.clone()
    broken[0, 3, 4, 5] = float("nan")
    assert not reward.score(broken[None], control).valid.any()


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"reward\.identity\.radius must be at least 1"):
        Identity(radius=0.5)
    with pytest.raises(ValueError, match="call prepare"):
        Identity().score(torch.zeros(1, 3, 17, 32, 32), asking(PATH))
