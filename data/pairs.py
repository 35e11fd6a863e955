"""Files of preference pairs: two clips of one prompt, and which of them people preferred."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.clip import Clip, ClipBatch
from data.video_files import probe, read_small

if TYPE_CHECKING:
    from tracking.trajectory import Trajectory

NEEDED = ("path_A", "path_B", "prompt")
VERDICTS = ("A", "B", "same")


@dataclass(frozen=True)
class Pair:
    """One verdict.

    Attributes:
        better, worse: the two clips.
        prompt: what both were asked for.
        tracks: file of the drag that both were asked to follow; None: no drag.
    """

    better: Path
    worse: Path
    prompt: str
    tracks: Path | None = None


def read_pairs(file: Path, criterion: str) -> list[Pair]:
    """Read a CSV file with the columns `path_A`, `path_B`, `prompt` and one verdict (A, B or same) per criterion.

    Clips are looked for relative to the file, then beside it by their name alone. A column `tracks` may name the drag.
    Rows whose verdict is `same` and repetitions of a row are left out.

    Raises:
        FileNotFoundError: there is no such file, or a clip or tracks of it are missing.
        ValueError: a column is missing, a verdict is none of the three, or no pair is left.
    """
    if not file.is_file():
        raise FileNotFoundError(f"stage.file: no file at {file}")
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = list(rows[0]) if rows else []
    missing = [name for name in (*NEEDED, criterion) if name not in names]
    if missing:
        raise ValueError(f"{file}: no column {', '.join(missing)}; it has {', '.join(names) or 'no rows'}")
    found: list[Pair] = []
    for line, row in enumerate(rows, 2):
        verdict = (row[criterion] or "").strip()
        if verdict not in VERDICTS:
            raise ValueError(f"{file}, line {line}: {criterion} is {verdict!r}; it must be A, B or same")
        if verdict == "same":
            continue
        first, second = (_beside(file, row[name], line) for name in NEEDED[:2])
        better, worse = (first, second) if verdict == "A" else (second, first)
        given = (row.get("tracks") or "").strip()
        found.append(Pair(better, worse, row["prompt"].strip(), _beside(file, given, line) if given else None))
    unique = list(dict.fromkeys(found))
    if not unique:
        raise ValueError(f"{file}: no pair is left, every {criterion} is 'same'; choose another stage.criterion")
    return unique


def load_pairs(pairs: list[Pair], bucket: tuple[int, int], frames: int, fps: float | None) -> ClipBatch:
    """Decode pairs, `2 n` clips: the preferred ones first, then the others in the same order.

    Args:
        pairs: n pairs.
        bucket: height and width that clips are cropped and resized to.
        frames: frames per clip, from its beginning.
        fps: play at about this rate by leaving out frames; None keeps every frame.

    Raises:
        ValueError: a clip cannot be decoded or is too short.
    """
    clips = [_clip(pair.better, pair, bucket, frames, fps) for pair in pairs]
    clips += [_clip(pair.worse, pair, bucket, frames, fps) for pair in pairs]
    return ClipBatch.stack(clips)


def _clip(path: Path, pair: Pair, bucket: tuple[int, int], frames: int, fps: float | None) -> Clip:
    import torch

    _, rate, height, width = probe(path)
    step = max(1, round(rate / fps)) if fps else 1
    video = read_small(path, bucket, step)[:frames]
    if len(video) < frames:
        found = f"{len(video)} frames at {rate / step:g} fps"
        raise ValueError(f"{path}: {found}, but {frames} are needed; raise stage.fps")
    trajectory = _drag(pair.tracks, (height, width), bucket, frames, step, rate)
    return Clip(
        video=torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1,
        trajectory=trajectory,
        prompt=pair.prompt,
        visible=torch.ones_like(trajectory.presence),
        name=f"pairs/{path.name}",
    )


def _drag(
    tracks: Path | None, size: tuple[int, int], bucket: tuple[int, int], frames: int, step: int, fps: float
) -> Trajectory:
    import torch

    from tracking.readers import read_for_clip
    from tracking.trajectory import Trajectory
    from tracking.transforms import cut, extend, to_bucket

    if tracks is None:
        absent = torch.zeros(1, frames, dtype=torch.bool)
        return Trajectory(torch.zeros(1, frames, 2), absent.float(), absent, *bucket, fps / step)
    given = read_for_clip(tracks, size, fps)
    return to_bucket(extend(cut(extend(given, frames * step), frames, 0, step), frames), bucket)


def _beside(file: Path, name: str, line: int) -> Path:
    for path in (file.parent / name, file.parent / Path(name).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{file}, line {line}: no file at {name}, neither there nor beside the list")
