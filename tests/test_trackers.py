from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from data.sprites import Sprites
from metrics.motion import counted, endpoint_error
from tests.moving import line, render
from tracking.lucas_kanade import LucasKanade
from tracking.ncc import NCC
from tracking.trackers import Tracker, Truth

TRACKERS = [NCC(), LucasKanade()]
PATHS = [
    line((8.3, 9.6), (0.8, 0.5)),
    line((22.7, 20.2), (-0.45, -0.7)),
    line((10.0, 22.0), (0.0, 0.0)),
    line((16.5, 8.25), (0.25, 0.9)) + torch.stack([torch.sin(torch.arange(17) / 3.0), torch.zeros(17)], -1),
]


def clips() -> torch.Tensor:
    return torch.stack([render(path, seed=i) for i, path in enumerate(PATHS)])


def starts() -> torch.Tensor:
    return torch.stack([path[:1] for path in PATHS])


def blur(frames: torch.Tensor, std: float) -> torch.Tensor:
    """Gaussian blur of `frames [B, 3, H, W]`; edges repeat."""
    line = torch.exp(-(torch.arange(-6.0, 7.0) ** 2) / (2 * std**2))
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2
    padded = torch.nn.functional.pad(frames, (6, 6, 6, 6), mode="replicate")
    return torch.nn.functional.conv2d(padded.flatten(0, 1)[:, None], kernel).unflatten(0, frames.shape[:2])[:, :, 0]


@pytest.mark.parametrize("tracker", TRACKERS, ids=lambda t: type(t).__name__)
class TestEveryTracker:
    def test_follows_a_point_below_a_pixel(self, tracker: Tracker) -> None:
        found = tracker.track(clips(), starts())
        error = (found.xy[:, 0] - torch.stack(PATHS)).norm(dim=-1)
        assert error.median() < 0.25 and error.max() < 1.0
        assert found.visible.all()
        assert found.xy.dtype == torch.float32 and found.visible.dtype == torch.bool

    def test_frame_zero_is_the_query(self, tracker: Tracker) -> None:
        found = tracker.track(clips(), starts())
        torch.testing.assert_close(found.xy[:, :, 0], starts())
        assert found.visible[:, :, 0].all() and (found.confidence[:, :, 0] == 1).all()

    def test_is_causal(self, tracker: Tracker) -> None:
        whole, prefix = (tracker.track(clips()[:, :, :n], starts()) for n in (17, 9))
        assert torch.equal(whole.xy[:, :, :9], prefix.xy)
        assert torch.equal(whole.visible[:, :, :9], prefix.visible)

    def test_points_and_clips_do_not_affect_each_other(self, tracker: Tracker) -> None:
        queries = torch.cat([starts(), starts() + 2, torch.full_like(starts(), 15.0)], 1)
        together = tracker.track(clips(), queries)
        alone = tracker.track(clips()[2:3], queries[2:3, 1:2])
        torch.testing.assert_close(together.xy[2:3, 1:2], alone.xy, atol=1e-4, rtol=0)

    def test_moves_with_the_frame(self, tracker: Tracker) -> None:
        """Padding the video by whole pixels shifts the tracks by as much."""
        video, query = clips()[:1], starts()[:1]
        shifted = torch.nn.functional.pad(video, (8, 0, 8, 0, 0, 0), mode="replicate")
        a, b = tracker.track(video, query).xy + 8, tracker.track(shifted, query + 8).xy
        assert (a - b).norm(dim=-1).max() < 0.15

    def test_hidden_point_is_invisible_and_found_again(self, tracker: Tracker) -> None:
        path = line((8.0, 16.0), (0.6, 0.0), 25)
        video = render(path, seed=7)
        video[:, 10:14, :, :] = torch.tensor([0.3, -0.2, 0.1])[:, None, None, None]
        found = tracker.track(video[None], path[None, :1])
        assert not found.visible[0, 0, 10:14].any()
        assert found.visible[0, 0, 20:].all()
        assert (found.xy[0, 0, 20:] - path[20:]).norm(dim=-1).max() < 1.0

    def test_follows_a_sprite_that_loses_its_texture(self, tracker: Tracker) -> None:
        """Few-step students blur; a person still sees where the sprite goes, and so must a tracker."""
        world = Sprites(max_sprites=1, max_distractors=0)
        clips = world.batch("train", range(16), (32, 32))
        blurred = clips.video.clone()
        for t in range(1, blurred.shape[2]):
            blurred[:, :, t] = blur(clips.video[:, :, t], 2.0)
        found = tracker.track(blurred, clips.trajectory.xy[:, :, 0])
        error, asked = endpoint_error(clips.trajectory, found), counted(clips.trajectory)
        assert error[asked].mean() < 2.5 and found.visible[asked].float().mean() > 0.8

    def test_point_that_leaves_the_frame_is_invisible(self, tracker: Tracker) -> None:
        path = line((24.0, 16.0), (1.2, 0.0))
        found = tracker.track(render(path)[None], path[None, :1])
        assert not found.visible[0, 0, 12:].any()

    def test_survives_non_finite_pixels_and_no_points(self, tracker: Tracker) -> None:
        video = clips()[:1].clone()
        video[:, :, 5] = float("nan")
        video[:, :, 6] = float("inf")
        assert tracker.track(video, starts()[:1]).xy.isfinite().all()
        assert tracker.track(video, torch.zeros(1, 0, 2)).xy.shape == (1, 0, 17, 2)

    def test_refuses_other_shapes(self, tracker: Tracker) -> None:
        with pytest.raises(ValueError, match="queries for 2"):
            tracker.track(clips()[:1], starts()[:2])
        with pytest.raises(ValueError, match=r"\[B,3,T,H,W\]"):
            tracker.track(clips()[0], starts())


def test_ncc_does_not_take_a_faded_texture_for_the_point() -> None:
    path = PATHS[0]
    video = render(path)
    ghost = video.clone()
    ghost[:, 1:] = 0.15 * video[:, 1:]  # correlation is unchanged by this, contrast is not
    assert NCC().track(video[None], path[None, :1]).visible.all()
    assert not NCC().track(ghost[None], path[None, :1]).visible[..., 1:].any()


def test_ncc_does_not_depend_on_brightness() -> None:
    video, query = clips()[:2] * 0.5, starts()[:2]
    a, b = NCC().track(video, query), NCC().track(video + 0.3, query)
    torch.testing.assert_close(a.xy, b.xy, atol=1e-3, rtol=0)


def test_truth_returns_what_it_was_given() -> None:
    truth = Truth(torch.stack(PATHS)[:, None])
    found = truth.track(clips()[:, :, :9], starts())
    assert torch.equal(found.xy[:, 0], torch.stack(PATHS)[:, :9]) and found.visible.all()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: NCC(radius=0), "radius"),
        (lambda: NCC(temperature=0.0), "temperature"),
        (lambda: NCC(update=1.0), "update"),
        (lambda: NCC(threshold=float("nan")), "threshold"),
        (lambda: LucasKanade(window=4), "window"),
        (lambda: LucasKanade(tolerance=float("nan")), "tolerance"),
    ],
)
def test_bad_settings_are_named(make, field) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=f"^tracker.{field} must be"):
        make()


def test_components_import_without_torch_or_opencv() -> None:
    modules = (
        "tracking.ncc, tracking.lucas_kanade, tracking.cotracker3, tracking.trackers, tracking.readers, data.clips"
    )
    modules += ", rewards.motion, rewards.aesthetic, rewards.smoothness, rewards.composite, metrics.features"
    heavy = ("torch", "cv2", "av", "transformers", "cotracker")
    code = f"import sys, {modules}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
