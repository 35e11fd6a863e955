from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metrics.features import ClipFeatures
from metrics.frechet import frechet_distance, gaussian_frechet
from metrics.interpolators import Flow, Linear
from metrics.motion import by_latent_frame, counted, drag_score, endpoint_error, per_clip
from metrics.smoothness import smoothness
from tests.moving import asking, line, render
from tests.test_rewards import tiny_clip
from tracking.trackers import Tracks
from tracking.trajectory import Trajectory


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestFrechet:
    def test_reference_values(self) -> None:
        d = 5
        eye, zero = torch.eye(d), torch.zeros(d)
        rising = torch.diag(torch.arange(1.0, 6))
        falling = rising.flip(0, 1)
        assert gaussian_frechet(zero, eye, zero + 1, eye) == pytest.approx(d, abs=1e-12)
        assert gaussian_frechet(zero, eye, zero, 4 * eye) == pytest.approx(d, abs=1e-12)
        assert gaussian_frechet(zero, rising, zero, falling) == pytest.approx(3.742019591016, abs=1e-11)

    def test_same_set_is_zero_and_shift_is_its_square(self) -> None:
        x = normal(50, 6, 0)
        assert frechet_distance(x, x) < 1e-12
        assert frechet_distance(x, x + 2.0) == pytest.approx(24.0, abs=1e-10)

    def test_symmetric_and_invariant_under_rotation(self) -> None:
        x, y = normal(60, 5, 1), normal(70, 5, 2) * torch.arange(1.0, 6)
        rotation = torch.linalg.qr(normal(5, 5, 3))[0]
        assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), abs=1e-9)
        assert frechet_distance(x @ rotation, y @ rotation) == pytest.approx(frechet_distance(x, y), abs=1e-9)

    def test_equals_torchmetrics(self) -> None:
        """On an extractor that both are given."""
        fid = pytest.importorskip("torchmetrics.image.fid", exc_type=ImportError)

        class Pixels(torch.nn.Module):
            num_features = 6

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return images.double().flatten(1)[:, :6] / 255

        g = torch.Generator().manual_seed(4)
        x, y = (torch.randint(0, high, (80, 3, 4, 4), generator=g, dtype=torch.uint8) for high in (255, 200))
        theirs = fid.FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
        theirs.update(x, real=True)
        theirs.update(y, real=False)
        assert frechet_distance(Pixels()(x), Pixels()(y)) == pytest.approx(float(theirs.compute()), abs=1e-8)

    def test_singular_covariance_is_finite_and_warns(self) -> None:
        with pytest.warns(UserWarning, match="4 samples for 9 dimensions"):
            assert math.isfinite(frechet_distance(normal(4, 9, 0), normal(40, 9, 1)))

    def test_bad_input(self) -> None:
        x = normal(20, 3, 0)
        with pytest.raises(ValueError, match="3 and of 4"):
            frechet_distance(x, normal(20, 4, 0))
        with pytest.raises(ValueError, match="second set holds"):
            frechet_distance(x, x / 0)
        with pytest.raises(ValueError, match="2 or more"):
            frechet_distance(x, x[:1])


def test_what_counts_towards_motion_errors() -> None:
    path = line((4.0, 4.0), (0.5, 0.5), 9)
    batch = asking(path, (32, 32)).repeat(2)
    xy = path.expand(2, 1, 9, 2).clone()
    xy[0] += torch.tensor([3.0, 4.0])  # 5 px, also in frame 0, which does not count
    xy[1, :, 5:] += torch.tensor([0.0, 12.0])
    visible = torch.ones(2, 1, 9, dtype=torch.bool)
    visible[1, :, 5:] = False
    found = Tracks(xy, visible, visible.float())
    error, asked = endpoint_error(batch.trajectory, found), counted(batch.trajectory)
    assert float(error[asked].mean()) == pytest.approx((8 * 5 + 4 * 12) / 16)
    assert per_clip(error, asked).tolist() == pytest.approx([5, 6])
    seen = counted(batch.trajectory, found)
    assert torch.equal(seen, counted(batch.trajectory, reference=visible)) and seen.sum() == 12
    assert float(error[seen].mean()) == pytest.approx(40 / 12)
    late = batch.trajectory.presence.clone()
    late[1, :, 0] = False
    counts = counted(replace(batch.trajectory, presence=late))
    assert counts[0].sum() == 8 and not counts[1].any()
    assert per_clip(torch.ones(2, 1, 9), counts).isnan().tolist() == [False, True]


def test_smoothness() -> None:
    still = torch.rand(2, 3, 1, 4, 4).expand(2, 3, 9, 4, 4) * 2 - 1
    assert (smoothness(still, Linear()) == 1).all()
    ramp = torch.linspace(-1, 1, 9)[None, None, :, None, None].expand(1, 3, 9, 4, 4)
    assert float(smoothness(ramp, Linear())) == pytest.approx(1.0, abs=1e-6)
    flicker = torch.ones(1, 3, 9, 4, 4)
    flicker[:, :, 1::2] = -1
    assert float(smoothness(flicker, Linear())) == pytest.approx(0.0, abs=1e-6)
    assert float(smoothness(flicker[:, :, :8], Linear())) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="3 frames"):
        smoothness(still[:, :, :2], Linear())


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_flow_follows_what_moves_where_the_mean_sees_it_twice(size: tuple[int, int]) -> None:
    """The frame in the middle of a move of two pixels a frame."""
    path = line((8.0, 9.0), (2.0, 0.5), 5)
    video = render(path, size)[None]
    assert float(smoothness(video, Flow())) > float(smoothness(video, Linear()))
    pixels = (video + 1) * 127.5
    before, true, after = (pixels[:, :, t : t + 1] for t in (1, 2, 3))
    errors = {type(i).__name__: float((i.between(before, after) - true).abs().mean()) for i in (Linear(), Flow())}
    assert errors["Flow"] < 0.5 * errors["Linear"], errors


def test_flow_leaves_still_clips_and_their_order_alone() -> None:
    still = render(line((8.0, 9.0), (0.0, 0.0), 1))[None].expand(2, -1, 9, -1, -1)
    assert smoothness(still, Flow()).tolist() == pytest.approx([1, 1], abs=1e-6)
    videos = torch.stack([render(line((8.0, 9.0), (speed, 0.5), 9), seed=i) for i, speed in enumerate((0.5, 1.5))])
    alone = torch.cat([smoothness(video[None], Flow()) for video in videos])
    torch.testing.assert_close(smoothness(videos, Flow()), alone)
    with pytest.raises(ValueError, match="short_edge must be at least 16"):
        Flow(short_edge=8)


def test_clip_features(tmp_path: Path) -> None:
    tiny_clip(tmp_path / "aesthetic", width=8)
    features = ClipFeatures()
    with pytest.raises(ValueError, match="tiny-clip has no network"):
        features.frames(torch.zeros(1, 3, 2, 16, 16))
    features.prepare(tmp_path, "cpu")
    video = torch.rand(3, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames, videos = features.frames(video), features.videos(video)
    assert frames.shape == (3, 5, 8) and videos.shape == (3, 16)
    assert torch.allclose(frames.norm(dim=-1), torch.ones(3, 5), atol=1e-5)
    assert torch.allclose(features.frames(video[1:2, :, 3:4])[0, 0], frames[1, 3], atol=1e-5)
    still = video[:, :, :1].expand_as(video)
    assert torch.allclose(features.videos(still)[:, 8:], torch.zeros(3, 8), atol=1e-6)
    backwards = features.videos(video.flip(2))
    assert torch.allclose(backwards, videos, atol=1e-5)


def test_the_drag_score_is_eq_16() -> None:
    asked = Trajectory(torch.zeros(1, 1, 5, 2), torch.ones(1, 1, 5), torch.ones(1, 1, 5, dtype=torch.bool), 11, 21, 8.0)
    xy = torch.tensor([[[[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0], [20.0, 10.0]]]])
    # x / 20 and y / 10: squared distances 0, 0.01, 0.04, 0.05, 2.
    expected = [5.0, 4.5, 3.0, 2.5, 0.0]
    assert drag_score(asked, xy, 0.1, 50.0)[0, 0].tolist() == pytest.approx(expected, abs=1e-5)


def test_errors_by_latent_frame() -> None:
    """Frame 0 is one pixel frame, every later one is four; only what counts is averaged, clips together."""
    value = torch.arange(18.0).reshape(2, 1, 9)
    counts = torch.ones(2, 1, 9, dtype=torch.bool)
    assert by_latent_frame(value, counts).tolist() == [(2.5 + 11.5) / 2, (6.5 + 15.5) / 2]
    counts[1, :, 5:] = False
    counts[0, :, 5] = False
    assert by_latent_frame(value, counts).tolist() == [7.0, 7.0]
    counts[0, :, 5:] = False
    assert math.isnan(float(by_latent_frame(value, counts)[1]))
