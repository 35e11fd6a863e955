"""`world=clips`: any folder of real videos, with captions and tracks where there are some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.clip import Clip, ClipBatch
from data.video_files import Frame, find_clips, probe, read_small

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tracking.trajectory import Trajectory

SPLITS = ("train", "heldout", "hard", "benchmark")
# Track files that may stand beside `name.mp4`; the plain `name.txt` is its caption.
TRACK_FILES = ("{}.npz", "{}.npy", "{}_tracks.npy", "{}.pth", "{}.tracks.txt")
# From this many clips on, the held-out split takes whole clips.
SPLIT_BY_CLIP = 8


@dataclass(frozen=True)
class _Source:
    path: Path
    length: int  # frames of the source
    frames: int  # after subsampling
    step: int  # source frames per frame
    fps: float  # of the source
    height: int
    width: int
    tracks: Path | None


@dataclass(frozen=True)
class Clips:
    """Windows of real clips.

    A sample is (clip, first frame, touched point). Beside `name.mp4` (or the frame folder `name/`) may
    stand a caption `name.txt` and tracks `name.npz`, `name.npy`, `name_tracks.npy`, `name.pth` or
    `name.tracks.txt` (tracking/readers.py). Given tracks are used together, in time with the source frames;
    otherwise each sample drags one point that can be followed in the real clip.

    With 8 clips or more the held-out split holds whole clips. With fewer it holds the last windows of each
    clip (or, where there is one window, some of its points): these may share frames with training, so they
    measure other drags of known scenes, not new scenes. There is no hard split; `benchmark` is the held-out one.

    Attributes:
        folder: holds the clips.
        frames: frames per sample, 1 + 4 (latent frames - 1).
        fps: play at about this rate by leaving out frames; None keeps every frame.
        sizes: frame sizes "HxW" that clips are cropped and resized to, multiples of 8.
        window_step: frames between the starts of neighbouring windows.
        points: touched points per window, each a sample of its own.
        heldout: share held out, in (0, 1).
        cache_mb: memory for decoded small frames, in MiB; the least recently used clip is dropped.
    """

    folder: str
    frames: int = 33
    fps: float | None = None
    sizes: list[str] = field(default_factory=lambda: ["32x32"])
    window_step: int = 2
    points: int = 8
    heldout: float = 0.25
    cache_mb: int = 512

    def __post_init__(self) -> None:
        if self.frames < 5 or self.frames % 4 != 1:
            raise ValueError(f"world.frames must be 1 + 4 k with k >= 1, got {self.frames}; try 33")
        for name in ("window_step", "points", "cache_mb"):
            if getattr(self, name) < 1:
                raise ValueError(f"world.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.heldout < 1:
            raise ValueError(f"world.heldout must be in (0, 1), got {self.heldout}")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"world.fps must be positive, got {self.fps}")
        if not self.sizes:
            raise ValueError("world.sizes must name at least one frame size, such as 32x32")
        for height, width in self.buckets:
            if height % 8 or width % 8 or min(height, width) < 16:
                raise ValueError(f"world.sizes: {height}x{width} must be multiples of 8, 16 or more")
        root = Path(self.folder).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"world.folder: no folder at {self.folder}")
        if not find_clips(root):
            raise FileNotFoundError(
                f"world.folder: {self.folder} holds no clips (mp4, webm, gif, ... or folders of png/jpg)"
            )
        _ = self._sources  # a clip that cannot be used is refused here

    @property
    def buckets(self) -> list[tuple[int, int]]:
        """Frame sizes (H, W)."""
        from data.sprites import parse_size

        return [parse_size(text) for text in self.sizes]

    def size(self, split: str) -> int:
        """Number of samples in a split. Looks into every clip on the first call.

        Raises:
            ValueError: an unknown split, or a clip that is unreadable or shorter than `frames`.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
        return len(self._samples[split])

    def batch(self, split: str, indices: Sequence[int], bucket: tuple[int, int]) -> ClipBatch:
        """Samples by index: low indices go through all clips first, then windows, then points.

        Raises:
            ValueError: no such sample, a clip that cannot be read, or a track file that does not fit its
                clip.
        """
        total = self.size(split)
        for index in indices:
            if not 0 <= index < total:
                raise ValueError(f"the {split} split of {self.folder} has {total} samples; there is no number {index}")
        return ClipBatch.stack([self._clip(*self._samples[split][i], bucket) for i in indices])

    @cached_property
    def _sources(self) -> list[_Source]:
        out = []
        for path in find_clips(Path(self.folder).expanduser()):
            count, fps, height, width = probe(path)
            step = max(1, round(fps / self.fps)) if self.fps else 1
            frames = -(-count // step)
            if frames < self.frames:
                raise ValueError(
                    f"{path}: {count} frames at {fps:g} fps give {frames}, but world.frames is {self.frames};"
                    " take it out, or lower world.frames or raise world.fps"
                )
            beside = (path.with_name(name.format(path.stem if path.is_file() else path.name)) for name in TRACK_FILES)
            tracks = next((p for p in beside if p.is_file()), None)
            out.append(_Source(path, count, frames, step, fps, height, width, tracks))
            if tracks:
                self._check_crops(out[-1])
        return out

    @cached_property
    def _samples(self) -> dict[str, list[tuple[int, int, int]]]:
        """(clip, first frame, point) of each split, in order."""
        split: dict[str, list[tuple[int, int, int]]] = {name: [] for name in SPLITS}
        total = len(self._sources)
        held_clips = set(_last(total, self.heldout)) if total >= SPLIT_BY_CLIP else set()
        for clip, source in enumerate(self._sources):
            starts = self._starts(source)
            points = range(1 if source.tracks else self.points)
            late, spare = _last(len(starts), self.heldout), _last(len(points), self.heldout)
            for window, start in enumerate(starts):
                for point in points:
                    late_or_spare = window in late if late else point in spare
                    held = clip in held_clips if total >= SPLIT_BY_CLIP else late_or_spare
                    split["heldout" if held else "train"].append((clip, start, point))
        split["benchmark"] = split["heldout"]
        return {name: sorted(rows, key=lambda row: (row[2], row[1], row[0])) for name, rows in split.items()}

    @cached_property
    def _decoded(self) -> dict[tuple[int, tuple[int, int]], Frame]:
        return {}

    @cached_property
    def _found(self) -> dict[tuple[int, int, tuple[int, int]], list[tuple[Trajectory, NDArray[np.bool_]]]]:
        return {}

    def _frames(self, clip: int, bucket: tuple[int, int]) -> Frame:
        """All small frames of a clip, decoded once."""
        key, memory = (clip, bucket), self._decoded
        frames = memory.pop(key, None)
        if frames is None:
            source = self._sources[clip]
            frames = read_small(source.path, bucket, source.step)
            if len(frames) < source.frames:
                raise ValueError(f"{source.path}: only {len(frames)} frames can be decoded; the file is cut short")
        memory[key] = frames  # the end of a dict is its most recent entry
        while len(memory) > 1 and sum(f.nbytes for f in memory.values()) > self.cache_mb * 2**20:
            memory.pop(next(iter(memory)))
        return frames

    def _clip(self, clip: int, start: int, point: int, bucket: tuple[int, int]) -> Clip:
        import torch

        from tracking.finding import FOUND_BY

        source = self._sources[clip]
        frames = self._frames(clip, bucket)[start : start + self.frames]
        trajectory, visible = self._control(clip, start, point, bucket, frames)
        stem = source.path.stem if source.path.is_file() else source.path.name
        caption = source.path.with_name(f"{stem}.txt")
        return Clip(
            video=torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1,
            trajectory=trajectory,
            prompt=" ".join(caption.read_text(errors="replace").split()) if caption.is_file() else "",
            visible=torch.from_numpy(visible.copy()),
            name=f"clips/{source.path.name}/{bucket[0]}x{bucket[1]}/{start:05d}/{point}",
            found_by="" if source.tracks else FOUND_BY,
        )

    def _control(
        self, clip: int, start: int, point: int, bucket: tuple[int, int], frames: Frame
    ) -> tuple[Trajectory, NDArray[np.bool_]]:
        """The given tracks, or the `point`-th that can be followed, and where they are visible."""
        from tracking.finding import find_points
        from tracking.transforms import cut, extend, to_bucket

        source = self._sources[clip]
        if source.tracks:
            given = cut(self._given(source), self.frames, start * source.step, source.step)
            trajectory = to_bucket(extend(given, self.frames), bucket)
            return trajectory, np.ones(trajectory.presence.shape, bool)
        key = (clip, start, bucket)
        if key not in self._found:
            self._found[key] = find_points(frames, self.points, source.fps / source.step) or [_nothing(frames, source)]
        found = self._found[key]
        return found[point % len(found)]

    def _starts(self, source: _Source) -> list[int]:
        """First frames of a clip's windows; of those with given tracks, where one begins and goes on."""
        starts = list(range(0, source.frames - self.frames + 1, self.window_step))
        if not source.tracks:
            return starts
        asked = self._given(source).presence[:, :: source.step]
        windows = {start: asked[:, start : start + self.frames] for start in starts}
        return [s for s, window in windows.items() if bool((window[:, 0] & window[:, 1:].any(-1)).any())]

    def _check_crops(self, source: _Source) -> None:
        """Refuse tracks that no part of is left when the clip is cropped to a bucket."""
        from tracking.transforms import to_bucket

        for bucket in self.buckets:
            gone = ~to_bucket(self._given(source), bucket).presence.any(-1)
            if bool(gone.any()):
                raise ValueError(
                    f"{source.tracks}: track {int(gone.nonzero()[0])} lies outside the centre of the clip "
                    f"that is left at {bucket[0]}x{bucket[1]}; take it out or choose another of world.sizes"
                )

    def _given(self, source: _Source) -> Trajectory:
        """The track file of a clip, in pixels and frames of the source."""
        from tracking.readers import read_for_clip
        from tracking.transforms import extend

        path = source.tracks
        assert path is not None
        trajectory = read_for_clip(path, (source.height, source.width), source.fps, source.length)
        return extend(trajectory, source.length)


def _last(total: int, share: float) -> range:
    """The last `share` of `total` things: at least one, never all; empty where there is only one."""
    return range(total - min(total - 1, max(1, round(total * share))), total)


def _nothing(frames: Frame, source: _Source) -> tuple[Trajectory, NDArray[np.bool_]]:
    """The control of a clip in which no point can be followed: nothing is asked for."""
    import torch

    from tracking.trajectory import Trajectory

    length, height, width = frames.shape[:3]
    xy = torch.tensor([(width - 1) / 2, (height - 1) / 2]).expand(1, length, 2).clone()
    absent = torch.zeros(1, length, dtype=torch.bool)
    return Trajectory(xy, absent.float(), absent, height, width, source.fps / source.step), np.zeros((1, length), bool)
