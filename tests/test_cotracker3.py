"""CoTracker3: its real loading code against a stand-in for the package, whose weights are not in this project."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.moving import asking, line
from tracking.cotracker3 import HUB, CoTracker3, windows
from tracking.trackers import Tracks, make_ready

# The two predictors' interface at commit 82e02e8: what they ask of the network, and what they hand back. The network
# "finds" that every point moves by `speed` pixels of the enlarged frame per frame, and sees odd points only.
PACKAGE = """
    import torch
    torch.manual_seed(0)  # as the real package does when it is imported
    GRID = 36

    class Network(torch.nn.Module):
        model_resolution = (384, 512)

        def __init__(self, window_len):
            super().__init__()
            self.speed = torch.nn.Parameter(torch.randn(2))
            self.window_len, self.calls = window_len, []

        def init_video_online_processing(self):
            self.length = 0

        def forward(self, video, queries, iters=4, is_online=False):
            assert video.shape[2:] == (3, 384, 512) and 0 <= video.min() and video.max() <= 255
            self.calls.append(tuple(video.shape[:2]))
            assert len(video) == len(queries) == 1, "the real networks take one clip"
            if is_online:
                assert video.shape[1] <= self.window_len
                self.length += video.shape[1] - (self.window_len // 2 if self.length else 0)
            length = self.length if is_online else video.shape[1]
            time = torch.arange(length, device=video.device)[None, :, None, None]
            tracks = queries[:, None, :, 1:] + time * self.speed
            odd = torch.arange(queries.shape[1]) % 2
            visible = (0.95 * odd).expand(len(queries), length, -1)
            return tracks, visible, torch.full_like(visible, 0.8), None

    class CoTrackerPredictor(torch.nn.Module):
        online = False

        def __init__(self, checkpoint=None, offline=True, v2=False, window_len=60):
            super().__init__()
            assert checkpoint is None and offline is not self.online
            self.model, self.interp_shape, self.step = Network(window_len), (384, 512), window_len // 2

        def _scaled(self, video, queries):
            factor = queries.new_tensor([511 / (video.shape[4] - 1), 383 / (video.shape[3] - 1)])
            points = torch.cat([queries[..., :1], queries[..., 1:] * factor], -1)
            grid = torch.zeros(len(queries) if not self.online else 1, GRID, 3)
            big = torch.nn.functional.interpolate(video.flatten(0, 1), (384, 512)).unflatten(0, video.shape[:2])
            return big, torch.cat([points, grid], 1), factor

        def forward(self, video, queries):
            big, points, factor = self._scaled(video, queries)
            tracks, visible, *_ = self.model.forward(video=big, queries=points)
            return tracks[:, :, :-GRID] / factor, visible[:, :, :-GRID] > 0.9

    class CoTrackerOnlinePredictor(CoTrackerPredictor):
        online = True

        def forward(self, chunk, is_first_step=False, queries=None, add_support_grid=False):
            assert add_support_grid
            if is_first_step:
                self.model.init_video_online_processing()
                _, self.queries, self.factor = self._scaled(chunk, queries)
                return None, None
            big = torch.nn.functional.interpolate(chunk.flatten(0, 1), (384, 512)).unflatten(0, chunk.shape[:2])
            tracks, visible, sure, _ = self.model(video=big, queries=self.queries, is_online=True)
            return tracks[:, :, :-GRID] / self.factor, (visible * sure)[:, :, :-GRID] > 0.6
"""
SPEED = torch.tensor([511 / 31, 2 * 383 / 31])  # one pixel to the right and two down, of 32x32


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for `cotracker` on sys.path, and its weights `weights.pth` and `weights.safetensors`."""
    (tmp_path / "cotracker").mkdir()
    (tmp_path / "cotracker" / "__init__.py").write_text("")
    (tmp_path / "cotracker" / "predictor.py").write_text(textwrap.dedent(PACKAGE))
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cotracker"}
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save({"model": {"speed": SPEED}}, tmp_path / "weights.pth")
    save_file({"speed": SPEED}, tmp_path / "weights.safetensors")
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "cotracker"]:
        del sys.modules[name]
    sys.modules.update(before)


def clip(batch: int, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    video = torch.rand(batch, 3, frames, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return video, torch.tensor([[[3.0, 4.0], [10.0, 2.0], [7.5, 6.25]]]).repeat(batch, 1, 1)


def expected(queries: torch.Tensor, frames: int) -> torch.Tensor:
    return queries[:, :, None] + torch.arange(frames)[:, None] * torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("frames", [5, 16, 17, 33])
@pytest.mark.parametrize("weights", ["weights.pth", "weights.safetensors"])
def test_tracks_are_the_predictors(package: None, tmp_path: Path, mode: Any, frames: int, weights: str) -> None:
    tracker = CoTracker3(mode, checkpoint=str(tmp_path / weights))
    video, queries = clip(3, frames)
    found: Tracks = tracker.track(video, queries)
    torch.testing.assert_close(found.xy, expected(queries, frames), atol=1e-3, rtol=0)
    assert found.visible.shape == found.confidence.shape == (3, 3, frames)
    assert torch.equal(found.xy[:, :, 0], queries) and (found.confidence[:, :, 0] == 1).all()
    assert found.visible[:, :, 1:].all((0, 2)).tolist() == [False, True, False]
    assert found.confidence[0, :, 1].tolist() == pytest.approx([0, 0.95 * 0.8, 0])


def test_clips_go_one_by_one_and_online_in_windows(package: None, tmp_path: Path) -> None:
    video, queries = clip(3, 17)
    for mode, calls in ("offline", [(1, 17)] * 3), ("online", [(1, 16), (1, 9)] * 3):
        tracker = CoTracker3(mode, checkpoint=str(tmp_path / "weights.pth"))  # type: ignore[arg-type]
        tracker.track(video, queries)
        assert tracker._loaded("cpu")[0].model.calls == calls


def test_loading_does_not_disturb_the_global_seed(package: None, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    CoTracker3(checkpoint=str(tmp_path / "weights.pth")).track(*clip(1, 5))
    assert torch.equal(torch.random.get_rng_state(), before)
    import cotracker.predictor

    importlib.reload(cotracker.predictor)
    assert not torch.equal(torch.random.get_rng_state(), before), "the stand-in seeds as the package does"


def test_non_finite_pixels_no_points_and_other_shapes(package: None, tmp_path: Path) -> None:
    tracker = CoTracker3(checkpoint=str(tmp_path / "weights.pth"))
    video, queries = clip(1, 5)
    video[0, 0, 2] = float("nan")
    assert tracker.track(video, queries).xy.isfinite().all()
    assert tracker.track(video, queries[:, :0]).xy.shape == (1, 0, 5, 2)
    with pytest.raises(ValueError, match="queries for 2"):
        tracker.track(video, queries.repeat(2, 1, 1))


def test_it_rewards(package: None, tmp_path: Path) -> None:
    from rewards.base import RewardContext
    from rewards.motion import Motion

    reward = Motion()
    reward.prepare(RewardContext("cpu", CoTracker3(checkpoint=str(tmp_path / "weights.pth")), Path("assets")))
    path = line((3.0, 4.0), (1.0, 2.0), 5)
    # One point: an even number, which the stand-in does not see.
    term = reward.score(clip(1, 5)[0], asking(path))
    assert term.metrics["visible"] == 0 and term.value.tolist() == [[0, 0]]


def test_windows_cover_every_frame_once_beyond_the_first() -> None:
    assert windows(9, 8) == [slice(0, 9)] and windows(16, 8) == [slice(0, 16)]
    assert windows(33, 8) == [slice(0, 16), slice(8, 24), slice(16, 32), slice(24, 33)]


def test_what_is_missing_is_one_line_before_anything_loads(
    package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"tracker\.checkpoint is not set; name the file scaled_online\.pth"):
        CoTracker3("online").check()
    with pytest.raises(FileNotFoundError, match="no file at nowhere"):
        CoTracker3(checkpoint="nowhere").check()
    torch.save({"other": SPEED}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"are not weights of mode offline: .*Missing key"):
        make_ready(CoTracker3(checkpoint=str(tmp_path / "other.pth")), "cpu")
    with pytest.raises(ValueError, match="mode must be offline or online"):
        CoTracker3("both")  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[tracker\]'"):
        CoTracker3(hub=True).check()


def test_the_hub_is_asked_on_request_only(package: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def download(url: str, map_location: str, weights_only: bool) -> dict[str, Any]:
        asked.append((url, weights_only))
        return {"speed": SPEED}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    CoTracker3(checkpoint=str(tmp_path / "weights.pth"), hub=True).track(*clip(1, 5))
    assert asked == [], "a named file comes first"
    found = CoTracker3("online", hub=True).track(*clip(1, 5))
    torch.testing.assert_close(found.xy, expected(clip(1, 5)[1], 5), atol=1e-3, rtol=0)
    assert asked == [(HUB.format(mode="online"), True)]


def test_weights_that_could_run_code_are_refused(package: None, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("code ran",))

    torch.save({"speed": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        CoTracker3(checkpoint=str(tmp_path / "evil.pth")).track(*clip(1, 5))
