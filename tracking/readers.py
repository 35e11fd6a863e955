"""Trajectory files: this project's own, and those of Tora, MotionCtrl, Wan-Move and ATI.

| format | content | frame size | fps |
|---|---|---|---|
| own (`.npz`) | `xy [K,T,2]`, `intensity`, `presence [K,T]`, `height`, `width`, `fps` | its own | its own |
| Tora, MotionCtrl (`.txt`) | one `x, y` per line, one stroke | canvas of 256x256 | 8 |
| Wan-Move (`_tracks.npy`, optional `_visibility.npy`) | `[1,T,K,2]`, `[1,T,K]` | to be given | 16 |
| ATI (`.pth`) | bytes of an npz, `array [K,T,1,3]`: 8 x, 8 y, 8 visible | to be given | 24 |

Where a format says "visible", that becomes presence: a position is asked for. Nothing that is read can run
code.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tracking.trajectory import Trajectory

Array = NDArray[np.generic]

CANVAS = (256, 256)
ATI_SCALE = 8
FPS = {"stroke": 8.0, "wan_move": 16.0, "ati": 24.0}


def read_trajectory(
    path: str | Path, size: tuple[int, int] | None = None, fps: float | None = None, frames: int | None = None
) -> Trajectory:
    """Read a trajectory file of any known format; which one is told by its content.

    Args:
        path: the file.
        size: (H, W) of the frames that the coordinates refer to; None takes the format's own.
        fps: frames per second; None takes the format's own.
        frames: the clip's length; a longer trajectory is refused. None accepts any length.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unreadable, unknown format, unknown frame size, not finite, outside the frame, or longer
            than the clip.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no trajectory file at {path}")
    try:
        trajectory = _parse(path, size, fps)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, RuntimeError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be read as a trajectory ({_line(error)})") from error
    check_trajectory(trajectory, str(path), frames)
    return trajectory


def read_for_clip(path: Path, size: tuple[int, int], fps: float, frames: int | None = None) -> Trajectory:
    """Read the track file of a clip of `size` (height, width), in pixels of the clip; see `read_trajectory`.

    A stroke (.txt) is drawn on a canvas of its own, and our own format says its size; other coordinates are the clip's.
    """
    from tracking.transforms import resize

    own_size = path.suffix in (".txt", ".npz")
    return resize(read_trajectory(path, None if own_size else size, fps, frames=frames), *size)


def write_trajectory(path: str | Path, trajectory: Trajectory) -> None:
    """Write one `[K, T]` trajectory in the project's own format (`.npz`), atomically."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        np.savez_compressed(
            file,
            xy=trajectory.xy.cpu().numpy(),
            intensity=trajectory.intensity.cpu().numpy(),
            presence=trajectory.presence.cpu().numpy(),
            height=trajectory.height,
            width=trajectory.width,
            fps=trajectory.fps,
        )
    os.replace(file.name, path)


def check_trajectory(trajectory: Trajectory, source: str, frames: int | None = None) -> None:
    """Raise ValueError, naming `source` and the track, for what no run should start with.

    That is: a position asked for that is not finite or lies outside the frame, an intensity outside [0, 1],
    or more frames than the clip has.
    """
    from tracking.transforms import inside

    if trajectory.height < 1 or trajectory.width < 1 or not 0 < trajectory.fps < float("inf"):
        raise ValueError(f"{source}: {trajectory.height}x{trajectory.width} at {trajectory.fps} fps must be positive")
    if frames is not None and trajectory.num_frames > frames:
        raise ValueError(f"{source}: track 0 is {trajectory.num_frames} frames long but the clip has {frames}; cut it")
    force_ok = ((trajectory.intensity >= 0) & (trajectory.intensity <= 1)) | ~trajectory.presence
    bad = trajectory.presence & ~(inside(trajectory) & force_ok)
    if bool(bad.any()):
        track, frame = bad.nonzero()[0].tolist()
        if not bool(force_ok[track, frame]):
            force = float(trajectory.intensity[track, frame])
            raise ValueError(f"{source}: track {track} has intensity {force:g} in frame {frame}, outside [0, 1]")
        x, y = trajectory.xy[track, frame].tolist()
        raise ValueError(
            f"{source}: track {track} is at x {x:.1f}, y {y:.1f} in frame {frame}, outside the "
            f"{trajectory.height}x{trajectory.width} frame; give the size its coordinates refer to"
        )


def _parse(path: Path, size: tuple[int, int] | None, fps: float | None) -> Trajectory:
    start = path.read_bytes()[:8]
    if start.startswith(b"\x93NUMPY"):
        return _wan_move(path, size, fps)
    if start.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        return _own(path, size, fps) if "xy.npy" in names else _ati(path, size, fps)
    return _stroke(path, size, fps)


def _own(path: Path, size: tuple[int, int] | None, fps: float | None) -> Trajectory:
    with np.load(path, allow_pickle=False) as data:
        height, width = size or (int(data["height"]), int(data["width"]))
        return _build(path, data["xy"], data["presence"], data["intensity"], (height, width), fps or float(data["fps"]))


def _stroke(path: Path, size: tuple[int, int] | None, fps: float | None) -> Trajectory:
    """Tora and MotionCtrl: one `x, y` per line."""
    points = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        parts = re.split(r"[,\s]+", line.strip().strip(","))
        try:
            x, y = map(float, parts)
        except ValueError:
            raise ValueError(f"{path}: line {number} is {line.strip()[:40]!r}, expected 'x, y'") from None
        points.append((x, y))
    if not points:
        raise ValueError(f"{path}: holds no points, expected one 'x, y' per line")
    return _build(path, np.array([points]), None, None, size or CANVAS, fps or FPS["stroke"])


def _wan_move(path: Path, size: tuple[int, int] | None, fps: float | None) -> Trajectory:
    tracks = np.load(path, allow_pickle=False)
    if tracks.ndim == 4 and len(tracks) == 1:
        tracks = tracks[0]
    beside = path.with_name(path.name.replace("_tracks.npy", "_visibility.npy"))
    seen = None
    if beside != path and beside.is_file():
        seen = np.load(beside, allow_pickle=False).reshape(tracks.shape[:-1]).T
    if tracks.ndim != 3:
        raise ValueError(f"{path}: an array of shape {tracks.shape}, expected [T, K, 2] or [1, T, K, 2]")
    return _build(path, tracks.transpose(1, 0, 2), seen, None, _given(path, size), fps or FPS["wan_move"])


def _ati(path: Path, size: tuple[int, int] | None, fps: float | None) -> Trajectory:
    import pickle

    import torch

    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, it holds more than plain data ({_line(error)})") from error
    if not isinstance(raw, bytes):
        raise ValueError(f"{path}: holds {type(raw).__name__}, expected the bytes of an npz (ATI) or an npz with 'xy'")
    with np.load(io.BytesIO(raw), allow_pickle=False) as data:
        array = data["array"].astype(np.float64) / ATI_SCALE
    if array.ndim != 4 or array.shape[2:] != (1, 3):
        raise ValueError(f"{path}: an array of shape {array.shape}, expected [K, T, 1, 3]")
    return _build(path, array[:, :, 0, :2], array[:, :, 0, 2] > 0.5, None, _given(path, size), fps or FPS["ati"])


def _build(
    path: Path, xy: Array, presence: Array | None, intensity: Array | None, size: tuple[int, int], fps: float
) -> Trajectory:
    import torch

    from tracking.trajectory import Trajectory

    if xy.ndim != 3 or xy.shape[-1] != 2 or 0 in xy.shape or xy.dtype.kind not in "fiu":
        raise ValueError(f"{path}: positions of shape {xy.shape} and type {xy.dtype}, expected numbers [K, T, 2]")
    here = np.ones(xy.shape[:2], bool) if presence is None else presence.astype(bool)
    force = here if intensity is None else intensity
    return Trajectory(
        xy=torch.from_numpy(xy.astype(np.float32)),
        intensity=torch.from_numpy(force.astype(np.float32)),
        presence=torch.from_numpy(np.ascontiguousarray(here)),
        height=size[0],
        width=size[1],
        fps=fps,
    )


def _given(path: Path, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        raise ValueError(f"{path}: this format does not say how large its frame is; give size=(height, width)")
    return size


def _line(error: BaseException) -> str:
    """First line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0]
