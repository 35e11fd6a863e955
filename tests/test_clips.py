from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from data.clip import ClipBatch
from data.clips import Clips
from data.video_files import probe, read_frames
from tests.moving import line, render, texture
from tracking.finding import find_points
from tracking.ncc import NCC
from tracking.readers import write_trajectory
from tracking.trajectory import Trajectory

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "clips"


def pixels(path: torch.Tensor, size: tuple[int, int] = (32, 32), seed: int = 0) -> np.ndarray:
    """Frames `[T, H, W, 3]` uint8 of a moving disc."""
    return ((render(path, size, seed=seed).permute(1, 2, 3, 0) + 1) * 127.5).clamp(0, 255).round().byte().numpy()


def frame_folder(root: Path, name: str, frames: np.ndarray) -> None:
    (root / name).mkdir(parents=True)
    for i, frame in enumerate(frames):
        cv2.imwrite(str(root / name / f"{i:03d}.png"), cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))


def encode(path: Path, frames: np.ndarray, codec: str, form: str, fps: int = 8) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], form
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=form)))
        container.mux(stream.encode())


def dots(path: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Frames in which a soft white dot follows `path`."""
    y, x = np.mgrid[: size[0], : size[1]]
    heat = [255 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 8) for px, py in path.numpy()]
    return np.stack(heat)[..., None].repeat(3, -1).astype(np.uint8)


def track_of(path: torch.Tensor, size: tuple[int, int]) -> Trajectory:
    here = torch.ones(1, len(path), dtype=torch.bool)
    return Trajectory(path[None], here.float(), here, *size, 8.0)


PATH = line((10.0, 12.0), (0.6, 0.4), 21)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    frame_folder(tmp_path, "a", pixels(PATH, seed=1))
    frame_folder(tmp_path, "b", pixels(PATH.flip(0), seed=2))
    (tmp_path / "a.txt").write_text("a disc\nmoves ")
    return tmp_path


class TestSamples:
    def test_windows_are_the_frames_of_the_clip(self, folder: Path) -> None:
        world = Clips(str(folder), frames=9, window_step=4)
        batch = world.batch("train", range(world.size("train")), (32, 32))
        truth = {"a": pixels(PATH, seed=1), "b": pixels(PATH.flip(0), seed=2)}
        for video, name in zip(batch.video, batch.names, strict=True):
            _, clip, _, start, _ = name.split("/")
            expected = truth[clip][int(start) : int(start) + 9]
            shown = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
            assert np.array_equal(shown, expected)
        assert len(set(batch.names)) == len(batch)
        assert {n.split("/")[1] for n in batch.names[:2]} == {"a", "b"}

    def test_captions(self, folder: Path) -> None:
        world = Clips(str(folder), frames=9)
        batch = world.batch("train", range(4), (32, 32))
        assert {n.split("/")[1]: p for n, p in zip(batch.names, batch.prompts, strict=True)} == {
            "a": "a disc moves",
            "b": "",
        }

    def test_found_points_move_with_the_object(self, folder: Path) -> None:
        batch = Clips(str(folder), frames=9).batch("train", range(4), (32, 32))
        for i, name in enumerate(batch.names):
            sign = 1 if "/a/" in name else -1
            drag = batch.trajectory.xy[i, 0] - batch.trajectory.xy[i, 0, 0]
            expected = sign * torch.arange(9)[:, None] * torch.tensor([0.6, 0.4])
            assert (drag - expected).norm(dim=-1).max() < 0.5
            assert batch.trajectory.presence[i].all() and batch.visible[i].all()

    def test_splits_share_no_sample_and_follow_the_share(self, folder: Path) -> None:
        world = Clips(str(folder), frames=9, window_step=4, points=3, heldout=0.25)
        names = {
            s: {n.rsplit("/", 1)[0] for n in world.batch(s, range(world.size(s)), (32, 32)).names}
            for s in ("train", "heldout")
        }
        assert len(names["train"]) == 6 and len(names["heldout"]) == 2 and not names["train"] & names["heldout"]
        assert world.size("hard") == 0
        one_window = Clips(str(folder), frames=21, points=4)
        assert (one_window.size("train"), one_window.size("heldout")) == (6, 2)

    def test_many_clips_are_split_by_clip(self, tmp_path: Path) -> None:
        for i in range(8):
            frame_folder(tmp_path, f"c{i}", pixels(PATH[:7], seed=i))
        world = Clips(str(tmp_path), frames=5, window_step=1, points=1)
        clips = {
            s: {n.split("/")[1] for n in world.batch(s, range(world.size(s)), (32, 32)).names}
            for s in ("train", "heldout")
        }
        assert clips["heldout"] == {"c6", "c7"} and len(clips["train"]) == 6

    def test_same_index_same_clip(self, folder: Path) -> None:
        one, two = Clips(str(folder), frames=9, cache_mb=1), Clips(str(folder), frames=9)
        together, alone = one.batch("train", [5, 0, 5], (32, 32)), two.batch("train", [5], (32, 32))
        for i in (0, 2):
            assert torch.equal(together.video[i], alone.video[0])
            assert torch.equal(together.trajectory.xy[i], alone.trajectory.xy[0])

    def test_frame_rate(self, folder: Path) -> None:
        batch = Clips(str(folder), frames=9, fps=4.0, window_step=1).batch("train", [0], (32, 32))
        assert batch.trajectory.fps == 4.0
        assert torch.equal(
            batch.video[0, :, 1],
            Clips(str(folder), frames=9, window_step=1).batch("train", [0], (32, 32)).video[0, :, 2],
        )

    def test_decodes_once(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import data.clips

        calls: list[str] = []
        original = data.clips.read_small

        def counting(path: Path, bucket: tuple[int, int], step: int) -> np.ndarray:
            calls.append(path.name)
            return original(path, bucket, step)

        monkeypatch.setattr(data.clips, "read_small", counting)
        world = Clips(str(folder), frames=9)
        for _ in range(3):
            world.batch("train", range(6), (32, 32))
        assert sorted(calls) == ["a", "b"]

    def test_flat_clip_asks_for_nothing(self, tmp_path: Path) -> None:
        frame_folder(tmp_path, "flat", np.full((9, 32, 32, 3), 128, np.uint8))
        batch = Clips(str(tmp_path), frames=9).batch("train", [0], (32, 32))
        assert not batch.trajectory.presence.any() and not batch.visible.any()


class TestGivenTracks:
    @pytest.mark.parametrize(("bucket", "source"), [("32x32", (40, 64)), ("24x40", (48, 48)), ("32x32", (32, 32))])
    def test_tracks_go_where_the_pixels_go(self, tmp_path: Path, bucket: str, source: tuple[int, int]) -> None:
        path = line((source[1] / 2 - 5, source[0] / 2 - 4), (0.7, 0.5), 13)
        frame_folder(tmp_path, "dot", dots(path, source))
        write_trajectory(tmp_path / "dot.npz", track_of(path, source))
        world = Clips(str(tmp_path), frames=9, sizes=[bucket], window_step=2)
        height, width = world.buckets[0]
        batch = world.batch("train", range(world.size("train")), (height, width))
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        heat = (batch.video.mean(1) + 1).clamp(min=0)
        heat = heat / heat.sum((-1, -2), keepdim=True)
        centre = torch.stack([(heat * x).sum((-1, -2)), (heat * y).sum((-1, -2))], -1)
        assert (centre - batch.trajectory.xy[:, 0]).norm(dim=-1).max() < 0.2
        assert batch.trajectory.presence.all()

    def test_clips_say_whose_tracks_were_found(self, folder: Path) -> None:
        write_trajectory(folder / "b.npz", track_of(PATH, (32, 32)))
        batch = Clips(str(folder), frames=9).batch("train", range(4), (32, 32))
        found = {n.split("/")[1]: by for n, by in zip(batch.names, batch.found_by, strict=True)}
        assert found == {"a": "LucasKanade", "b": ""}
        assert ClipBatch.concat([batch.select([1, 0]), batch]).found_by == [*batch.found_by[1::-1], *batch.found_by]

    def test_stroke_is_drawn_on_its_own_canvas(self, tmp_path: Path) -> None:
        frame_folder(tmp_path, "a", pixels(PATH[:9]))
        (tmp_path / "a.tracks.txt").write_text("\n".join(f"{x}, 128" for x in range(0, 180, 20)))
        trajectory = Clips(str(tmp_path), frames=9).batch("train", [0], (32, 32)).trajectory
        assert trajectory.xy[0, 0, :, 0].tolist() == pytest.approx(
            [(x + 0.5) / 8 - 0.5 for x in range(0, 180, 20)], abs=1e-4
        )

    def test_shorter_track_ends_early(self, tmp_path: Path) -> None:
        frame_folder(tmp_path, "a", pixels(PATH[:13]))
        write_trajectory(tmp_path / "a.npz", track_of(PATH[:6], (32, 32)))
        world = Clips(str(tmp_path), frames=9, window_step=4)
        batch = world.batch("train", [0], (32, 32))
        assert batch.trajectory.presence[0, 0].tolist() == [True] * 6 + [False] * 3

    @pytest.mark.parametrize(
        ("track", "size", "message"),
        [
            (PATH, (32, 32), r"a.npz: track 0 is 21 frames long but the clip has 13"),
            (
                line((28.0, 4.0), (1.0, 0.0), 9),
                (32, 32),
                r"a.npz: track 0 is at x 32.0, y 4.0 in frame 4, outside the 32x32 frame",
            ),
            (line((1.0, 4.0), (0.0, 0.0), 9), (32, 64), r"a.npz: track 0 lies outside the centre"),
        ],
    )
    def test_bad_tracks_are_one_line(
        self, tmp_path: Path, track: torch.Tensor, size: tuple[int, int], message: str
    ) -> None:
        frame_folder(tmp_path, "a", pixels(PATH[:13], size))
        write_trajectory(tmp_path / "a.npz", track_of(track, size))
        with pytest.raises(ValueError, match=message):
            Clips(str(tmp_path), frames=9)


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "codec", "form"),
        [("v.mp4", "mpeg4", "yuv420p"), ("v.webm", "libvpx", "yuv420p"), ("v.gif", "gif", "rgb8")],
    )
    def test_containers(self, tmp_path: Path, name: str, codec: str, form: str) -> None:
        frames = pixels(PATH[:9], (48, 64))
        encode(tmp_path / name, frames, codec, form, fps=10)
        assert probe(tmp_path / name) == (9, 10.0, 48, 64)
        got = np.stack(list(read_frames(tmp_path / name)))
        assert np.abs(got.astype(float) - frames).mean() < (25 if name.endswith("gif") else 8)
        assert Clips(str(tmp_path), frames=9).batch("train", [0], (32, 32)).video.shape == (1, 3, 9, 32, 32)

    def test_broken_clip_is_named(self, folder: Path) -> None:
        (folder / "c.mp4").write_bytes(b"not a video")
        with pytest.raises(ValueError, match=r"c\.mp4: cannot be decoded") as error:
            Clips(str(folder), frames=9)
        assert "\n" not in str(error.value)

    def test_clip_that_is_cut_short_is_named(self, tmp_path: Path) -> None:
        encode(tmp_path / "v.mp4", pixels(PATH, (64, 64)), "mpeg4", "yuv420p")
        data = bytearray((tmp_path / "v.mp4").read_bytes())
        start = data.index(b"mdat") + 4
        data[start + 3000 : start + 3000 + len(data) // 3] = b"\0" * (len(data) // 3)
        (tmp_path / "v.mp4").write_bytes(data)
        with pytest.raises(ValueError, match=r"v\.mp4"):
            Clips(str(tmp_path), frames=9).batch("train", [0], (32, 32))

    def test_broken_image_is_named(self, folder: Path) -> None:
        (folder / "a" / "000.png").write_bytes(b"not an image")
        with pytest.raises(ValueError, match=r"000\.png: cannot be decoded"):
            Clips(str(folder), frames=9)

    def test_short_clip_is_named(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"a: 21 frames at 8 fps give 21, but world.frames is 33"):
            Clips(str(folder))

    def test_missing_and_empty_folders(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            Clips(str(tmp_path / "nowhere"))
        with pytest.raises(FileNotFoundError, match="holds no clips"):
            Clips(str(tmp_path))

    def test_no_such_sample_or_split(self, folder: Path) -> None:
        world = Clips(str(folder), frames=9)
        with pytest.raises(ValueError, match="there is no number 999"):
            world.batch("train", [999], (32, 32))
        with pytest.raises(ValueError, match="train, heldout, hard"):
            world.size("test")


@pytest.mark.parametrize(
    "settings",
    [
        {"frames": 8},
        {"window_step": 0},
        {"points": 0},
        {"heldout": 1.0},
        {"fps": -1.0},
        {"sizes": ["30x32"]},
        {"sizes": []},
    ],
)
def test_bad_settings_are_named(folder: Path, settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"^world.{next(iter(settings))}"):
        Clips(str(folder), **settings)  # type: ignore[arg-type]


def test_moving_points_come_before_resting_ones() -> None:
    frames = pixels(PATH, seed=3)
    still = ((texture(9, 20)[0, :, :12, :12].permute(1, 2, 0) + 1) * 127).byte().numpy()
    frames[:, -12:, :12] = still
    found = find_points(frames, 40, 8.0)
    reach = [float((t.xy - t.xy[:, :1]).norm(dim=-1).max()) for t, _ in found]
    reliable = [r for r, (_, seen) in zip(reach, found, strict=True) if seen.mean() >= 0.8]
    assert reliable == reach[: len(reliable)] == sorted(reliable, reverse=True)
    assert reliable[0] > 10 and reliable[-1] < 2


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_real_clips() -> None:
    world = Clips(str(DATA))
    assert world.size("train") >= 64 and world.size("heldout") >= 16
    batch = world.batch("train", range(8), (32, 32))
    assert batch.video.shape == (8, 3, 33, 32, 32) and "girl" in batch.prompts[0]
    found = NCC().track(batch.video, batch.trajectory.xy[:, :, 0])
    error = (found.xy - batch.trajectory.xy).norm(dim=-1)
    assert error[batch.trajectory.presence].median() < 0.5  # another tracker agrees on where the points go
    assert (batch.trajectory.xy - batch.trajectory.xy[:, :, :1]).norm(dim=-1).amax(-1).min() > 1


def test_windows_in_which_no_track_begins_are_no_samples(tmp_path: Path) -> None:
    """A track may end long before its clip: windows after that would ask for nothing."""
    frame_folder(tmp_path, "a", pixels(PATH, seed=1))
    frame_folder(tmp_path, "b", pixels(PATH, seed=2))
    given = track_of(PATH, (32, 32))
    short = given.presence.clone()
    short[:, 8:] = False
    write_trajectory(tmp_path / "b.npz", Trajectory(given.xy, given.intensity, short, 32, 32, 8.0))
    world = Clips(str(tmp_path), frames=9, sizes=["32x32"], window_step=2, points=1)
    for split in ("train", "heldout"):
        clips = world.batch(split, range(world.size(split)), (32, 32))
        for presence, name in zip(clips.trajectory.presence, clips.names, strict=True):
            assert bool(presence[:, 0].any() & presence[:, 1:].any()), name
    found = [n for s in ("train", "heldout") for n in world.batch(s, range(world.size(s)), (32, 32)).names]
    # Clip b: windows at 0, 2, 4 and 6; at 8 and later the track is over.
    assert sorted(int(name.split("/")[-2]) for name in found if "/b/" in name) == [0, 2, 4, 6]
