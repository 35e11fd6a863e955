"""Decoding videos (mp4, webm, gif, ...) and folders of images into small frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VIDEO_SUFFIXES = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# A folder of images does not say how fast it plays.
FOLDER_FPS = 8.0

Frame = NDArray[np.uint8]


def find_clips(folder: Path) -> list[Path]:
    """Videos and frame folders directly in `folder`, by name. Hidden files are left out."""
    found = [p for p in folder.iterdir() if not p.name.startswith(".")]
    return sorted(p for p in found if p.suffix.lower() in VIDEO_SUFFIXES or (p.is_dir() and images(p)))


def images(folder: Path) -> list[Path]:
    """Images directly in `folder`, by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)


def probe(path: Path) -> tuple[int, float, int, int]:
    """Number of frames, frames per second, height and width of a clip.

    Raises:
        FileNotFoundError: there is no such clip.
        ValueError: it cannot be decoded or holds no frame.
    """
    if path.is_dir():
        count, fps = len(images(path)), FOLDER_FPS
    else:
        with _open(path) as stream:
            fps = float(stream.average_rate or stream.guessed_rate or FOLDER_FPS)
            count = stream.frames
        # some containers (webm, gif) do not say how many frames they hold
        count = count or sum(1 for _ in read_frames(path))
    first = next(read_frames(path), None)
    if first is None or not count:
        raise ValueError(f"{path}: holds no frames")
    return count, fps, first.shape[0], first.shape[1]


def read_frames(path: Path) -> Iterator[Frame]:
    """Decode a clip frame by frame: `[H, W, 3]` RGB.

    Raises:
        FileNotFoundError, ValueError: see `probe`.
    """
    if not path.is_dir():
        with _open(path) as stream:
            for frame in stream.container.decode(stream):
                yield frame.to_ndarray(format="rgb24")
        return
    import cv2

    for image in images(path):
        pixels = cv2.imread(str(image), cv2.IMREAD_COLOR)
        if pixels is None:
            raise ValueError(f"{image}: cannot be decoded as an image")
        yield cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def read_small(path: Path, bucket: tuple[int, int], step: int) -> Frame:
    """Every `step`-th frame, centre-cropped to the bucket's shape and resized to it: `[T, H, W, 3]`."""
    import cv2

    from tracking.transforms import cover_box

    out = []
    for index, frame in enumerate(read_frames(path)):
        if index % step == 0:
            top, left, height, width = cover_box(frame.shape[0], frame.shape[1], bucket)
            part = frame[top : top + height, left : left + width]
            shrinks = height >= bucket[0]
            out.append(cv2.resize(part, bucket[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC))
    return np.stack(out)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """The first video stream of a file, with FFmpeg's errors made ours."""
    import av

    if not path.is_file():
        raise FileNotFoundError(f"no clip at {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: holds no video")
            yield container.streams.video[0]
    except av.error.FFmpegError as error:
        reason = (str(error.strerror or error).splitlines() or ["unknown reason"])[0]
        raise ValueError(f"{path}: cannot be decoded as a video ({reason})") from error
