from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tracking.readers import check_trajectory, read_trajectory, write_trajectory
from tracking.trajectory import Trajectory
from tracking.transforms import (
    cover_box,
    cut,
    extend,
    inside,
    jittered,
    resample_arc_length,
    resample_time,
    resize,
    to_bucket,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "trajectories"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")


def sample(tracks: int = 2, frames: int = 9, size: tuple[int, int] = (48, 64)) -> Trajectory:
    g = torch.Generator().manual_seed(0)
    xy = torch.rand(tracks, frames, 2, generator=g) * torch.tensor([size[1] - 1, size[0] - 1])
    force = torch.rand(tracks, frames, generator=g)
    return Trajectory(xy, force, torch.rand(tracks, frames, generator=g) < 0.8, *size, 8.0)


class TestReaders:
    @needs_data
    @pytest.mark.parametrize(
        "path", sorted(DATA.glob("tora/*.txt")) + sorted(DATA.glob("motionctrl/*.txt")), ids=lambda p: p.name
    )
    def test_strokes(self, path: Path) -> None:
        t = read_trajectory(path)
        numbers = [float(x) for x in path.read_text().replace(",", " ").split()]
        assert t.xy.flatten().tolist() == numbers
        assert (t.height, t.width) == (256, 256) and t.presence.all() and (t.intensity == 1).all()

    @needs_data
    def test_wan_move(self) -> None:
        path = DATA / "wan_move" / "example_tracks.npy"
        t = read_trajectory(path, size=(480, 832))
        assert t.xy.shape == (1, 81, 2) and t.presence.all() and t.fps == 16
        assert t.xy[0, 3].tolist() == np.load(path)[0, 3, 0].tolist()
        with pytest.raises(ValueError, match="give size"):
            read_trajectory(path)

    @needs_data
    def test_ati(self) -> None:
        path = DATA / "ati" / "fish.pth"
        t = read_trajectory(path, size=(1086, 724))
        assert t.xy.shape == (8, 121, 2) and t.presence[0, 0] and t.fps == 24
        assert t.xy[0, 0].tolist() == pytest.approx([2521.0957 / 8, 5122.3564 / 8], abs=1e-3)
        with pytest.raises(ValueError, match=r"fish.pth: track 0 is at .* outside the 256x256 frame"):
            read_trajectory(path, size=(256, 256))

    def test_wan_move_visibility_becomes_presence(self, tmp_path: Path) -> None:
        seen = np.array([[[True, False], [True, True], [False, True]]])
        np.save(tmp_path / "a_tracks.npy", np.ones((1, 3, 2, 2), np.float32))
        np.save(tmp_path / "a_visibility.npy", seen)
        t = read_trajectory(tmp_path / "a_tracks.npy", size=(8, 8))
        assert t.presence.tolist() == [[True, True, False], [False, True, True]]

    def test_own_format_comes_back(self, tmp_path: Path) -> None:
        t = sample()
        write_trajectory(tmp_path / "t.npz", t)
        back = read_trajectory(tmp_path / "t.npz")
        assert (
            torch.equal(back.xy, t.xy)
            and torch.equal(back.intensity, t.intensity)
            and torch.equal(back.presence, t.presence)
        )
        assert (back.height, back.width, back.fps) == (48, 64, 8.0)
        assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]

    def test_too_long_for_the_clip(self, tmp_path: Path) -> None:
        write_trajectory(tmp_path / "t.npz", sample(frames=9))
        assert read_trajectory(tmp_path / "t.npz", frames=9).num_frames == 9
        with pytest.raises(ValueError, match=r"t.npz: track 0 is 9 frames long but the clip has 8"):
            read_trajectory(tmp_path / "t.npz", frames=8)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "holds no points"),
            (b"1, 2\nhello\n", "line 2 is 'hello'"),
            (b"1, 2, 3\n", "line 1"),
            (b"1, nan\n", "track 0 is at x 1.0, y nan in frame 0, outside"),
            (b"1, 2\n300, 4\n", "track 0 is at x 300.0, y 4.0 in frame 1, outside the 256x256 frame"),
            (b"\xff\xfe\x00", "cannot be read"),
            (b"PK\x03\x04 broken", "cannot be read"),
            (b"\x93NUMPY broken", "cannot be read"),
        ],
    )
    def test_bad_files_are_one_line_with_the_name(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "bad.txt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_trajectory(path, size=(256, 256))
        assert "bad.txt" in str(error.value) and "\n" not in str(error.value)

    def test_nothing_runs_code(self, tmp_path: Path) -> None:
        torch.save(Path("x"), tmp_path / "evil.pth")
        with pytest.raises(ValueError, match=r"evil.pth: refused"):
            read_trajectory(tmp_path / "evil.pth", size=(8, 8))
        buffer = io.BytesIO()
        np.savez(buffer, array=np.array([Path("x")], dtype=object))
        torch.save(buffer.getvalue(), tmp_path / "inner.pth")
        with pytest.raises(ValueError, match=r"inner.pth"):
            read_trajectory(tmp_path / "inner.pth", size=(8, 8))
        np.save(tmp_path / "o.npy", np.array([Path("x")], dtype=object), allow_pickle=True)
        with pytest.raises(ValueError, match=r"o.npy"):
            read_trajectory(tmp_path / "o.npy", size=(8, 8))

    def test_intensity_outside_its_range(self) -> None:
        t = sample(1)
        loud = replace(t, intensity=t.intensity + 1.0, presence=torch.ones_like(t.presence))
        with pytest.raises(ValueError, match=r"x: track 0 has intensity .* in frame 0"):
            check_trajectory(loud, "x")

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"nothing\.npz"):
            read_trajectory(tmp_path / "nothing.npz")


class TestTransforms:
    def test_resize_there_and_back(self) -> None:
        t = sample()
        assert torch.allclose(resize(resize(t, 31, 17), 48, 64).xy, t.xy, atol=1e-4)

    def test_resize_keeps_corners_of_the_frame(self) -> None:
        """The outer edge of the frame maps to the outer edge, not pixel centre to pixel centre."""
        t = replace(sample(1, 2), xy=torch.tensor([[[-0.5, -0.5], [63.5, 47.5]]]))
        assert resize(t, 24, 16).xy.tolist() == [[[-0.5, -0.5], [15.5, 23.5]]]

    @settings(max_examples=40)
    @given(st.integers(16, 60), st.integers(16, 60), st.sampled_from([(32, 32), (24, 40), (40, 24)]))
    def test_bucket_moves_points_as_it_moves_pixels(self, height: int, width: int, bucket: tuple[int, int]) -> None:
        """An image of its own coordinates, cropped and resized, holds the transformed coordinates."""
        top, left, h, w = cover_box(height, width, bucket)
        assert top >= 0 and left >= 0 and top + h <= height and left + w <= width
        assert h == height or w == width
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        ramp = torch.stack([x, y]).float()[None, :, top : top + h, left : left + w]
        image = torch.nn.functional.interpolate(ramp, size=bucket, mode="bilinear", align_corners=False)[0]
        inner = (bucket[0] // 2, bucket[1] // 2)
        point = image[:, inner[0], inner[1]]
        t = Trajectory(point.reshape(1, 1, 2), torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), height, width, 8.0)
        assert torch.allclose(to_bucket(t, bucket).xy[0, 0], torch.tensor([inner[1], inner[0]]).float(), atol=1e-3)

    def test_outside_the_crop_is_not_asked_for(self) -> None:
        xy = torch.tensor([[[1.0, 24.0], [32.0, 24.0], [62.0, 24.0]]])
        t = Trajectory(xy, torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), 48, 64, 8.0)
        assert to_bucket(t, (24, 24)).presence.tolist() == [[False, True, False]]
        assert inside(t).all()

    def test_resample_time(self) -> None:
        t = sample(frames=9)
        same, double = resample_time(t, 9), resample_time(t, 17)
        assert torch.equal(same.xy, t.xy) and torch.equal(same.presence, t.presence) and same.fps == t.fps
        assert torch.equal(double.xy[:, ::2], t.xy)
        assert torch.allclose(double.xy[:, 1::2], (t.xy[:, 1:] + t.xy[:, :-1]) / 2, atol=1e-5)
        assert torch.equal(double.presence[:, 1::2], t.presence[:, 1:] & t.presence[:, :-1])
        assert (double.num_frames - 1) / double.fps == (t.num_frames - 1) / t.fps

    def test_arc_length_gives_equal_steps_on_the_same_path(self) -> None:
        xy = torch.tensor([[[0.0, 0], [1, 0], [8, 0], [8, 0], [8, 4]]])
        t = Trajectory(xy, torch.linspace(0, 1, 5)[None], torch.ones(1, 5, dtype=torch.bool), 16, 16, 8.0)
        even = resample_arc_length(t, 7)
        expected = [[0, 0], [2, 0], [4, 0], [6, 0], [8, 0], [8, 2], [8, 4]]
        assert torch.allclose(even.xy[0], torch.tensor(expected).float(), atol=1e-5)
        assert even.presence.all() and float(even.intensity[0, -1]) == 1.0

    def test_arc_length_of_absent_and_resting_tracks(self) -> None:
        t = sample(2)
        rest = replace(t, xy=torch.full_like(t.xy, 3.0), presence=torch.stack([torch.ones(9), torch.zeros(9)]).bool())
        even = resample_arc_length(rest, 5)
        assert (even.xy[0] == 3).all() and even.presence[0].all() and not even.presence[1].any()

    def test_cut_and_extend(self) -> None:
        t = sample(frames=9)
        part = cut(t, 3, start=2, step=2)
        assert torch.equal(part.xy, t.xy[:, [2, 4, 6]]) and part.fps == 4
        longer = extend(part, 5)
        assert longer.num_frames == 5 and not longer.presence[:, 3:].any()
        assert torch.equal(longer.xy[:, :3], part.xy)


class TestJittered:
    def test_errors_are_as_large_as_asked_and_the_touch_is_exact(self) -> None:
        exact = sample(tracks=2000, frames=17)
        off = jittered(exact, 2.0, np.random.default_rng(0)).xy - exact.xy
        assert torch.equal(off[:, 0], torch.zeros(2000, 2))
        assert off[:, 4::4].std() == pytest.approx(2.0, rel=0.02) and abs(off.mean()) < 0.02
        between = torch.lerp(off[:, :-4:4], off[:, 4::4], 0.25)
        torch.testing.assert_close(off[:, 1::4], between, atol=1e-4, rtol=0)

    def test_nothing_else_changes(self) -> None:
        exact = sample(frames=10)
        noisy = jittered(exact, 1.0, np.random.default_rng(0))
        assert torch.equal(noisy.presence, exact.presence) and torch.equal(noisy.intensity, exact.intensity)
        assert torch.equal(jittered(exact, 0.0, np.random.default_rng(0)).xy, exact.xy)
        assert torch.equal(jittered(exact, 1.0, np.random.default_rng(0)).xy, noisy.xy)
