"""Trackers on clips whose tracks are known, and there and back on real ones: `python -m benchmarks.trackers`.

`--folder` names real clips (mp4 and the like), `--checkpoint` the weights of CoTracker3, `--name` keeps the result as
`benchmarks/results/NAME.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine
from data.sprites import Sprites
from data.video_files import find_clips, read_small
from metrics.motion import endpoint_error
from runtime.cells import markdown
from runtime.episodes import fixed_clips
from tracking.cotracker3 import CoTracker3
from tracking.lucas_kanade import LucasKanade
from tracking.ncc import NCC
from tracking.trackers import Tracker, make_ready

RESULTS = Path(__file__).resolve().parent / "results"
# Real clips: size they are shrunk to, length of a window, and points of the grid that is followed.
SIZE, LENGTH, GRID = (64, 96), 33, (5, 8)


def known(tracker: Tracker, clips: int, split: str = "heldout") -> dict[str, float]:
    """Errors on rendered clips, over every frame after the first.

    Returns:
        `median_px`, `within_1px`, `within_3px` where the point can be seen in the clip; `precision` and `recall` of
        the tracker's "visible"; `ms`: per clip, one thread.
    """
    make_ready(tracker, "cpu")  # loading is not tracking
    batches = fixed_clips(Sprites(), split, clips)
    errors, seen, truth, seconds = [], [], [], 0.0
    for batch in batches:
        began = time.perf_counter()
        found = tracker.track(batch.video, batch.trajectory.xy[:, :, 0])
        seconds += time.perf_counter() - began
        errors.append(endpoint_error(batch.trajectory, found)[..., 1:].flatten())
        seen.append(found.visible[..., 1:].flatten())
        truth.append(batch.visible[..., 1:].flatten())
    error, said, true = torch.cat(errors), torch.cat(seen), torch.cat(truth)
    return {
        "median_px": float(error[true].median()),
        **_within(error[true]),
        "precision": float(true[said].float().mean()),
        "recall": float(said[true].float().mean()),
        "ms": 1000 * seconds / clips,
    }


def there_and_back(tracker: Tracker, videos: Tensor) -> dict[str, float]:
    """Follow a grid of points through `videos [B, 3, T, H, W]`, then back from where they ended.

    Returns:
        `kept`: share of points visible at the end and again at the start; of these `median_px`, `within_1px` and
        `within_3px` of the distance from where they began. Still points count too: a tracker that never moves is
        perfect here, so this is a check, not a ranking.
    """
    height, width = videos.shape[-2:]
    margin = 4.0
    y = torch.linspace(margin, height - 1 - margin, GRID[0])
    x = torch.linspace(margin, width - 1 - margin, GRID[1])
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(1, -1, 2).repeat(len(videos), 1, 1)
    there = tracker.track(videos, grid)
    back = tracker.track(videos.flip(2), there.xy[:, :, -1])
    kept = there.visible[:, :, -1] & back.visible[:, :, -1]
    error = (back.xy[:, :, -1] - grid).norm(dim=-1)[kept]
    moved = (there.xy[:, :, -1] - grid).norm(dim=-1)[kept]
    return {
        "kept": float(kept.float().mean()),
        "median_px": float(error.median()),
        **_within(error),
        "moved_px": float(moved.median()),
    }


def real(folder: Path) -> Tensor:
    """First, middle and last window of every clip of a folder, `[B, 3, T, H, W]`."""
    found = []
    for path in find_clips(folder):
        frames = torch.from_numpy(read_small(path, SIZE, 1)).permute(3, 0, 1, 2).float() / 127.5 - 1
        last = frames.shape[1] - LENGTH
        found += [frames[:, start : start + LENGTH] for start in sorted({0, last // 2, last})]
    return torch.stack(found)


def _within(error: Tensor) -> dict[str, float]:
    return {f"within_{limit}px": float((error < limit).float().mean()) for limit in (1, 3)}


def table(result: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a line per tracker."""
    heads = list(next(iter(result.values())))
    return markdown(["tracker", *heads], [[k, *(f"{row[h]:.3f}" for h in heads)] for k, row in result.items()])


def main() -> None:
    """Measure, print, and keep the result where it has a name."""
    parser = argparse.ArgumentParser("python -m benchmarks.trackers")
    parser.add_argument("--clips", type=int, default=200, help="rendered clips")
    parser.add_argument("--trackers", default="ncc,lucas_kanade", help="of ncc, lucas_kanade, cotracker3")
    parser.add_argument("--checkpoint", help="weights of cotracker3, scaled_offline.pth")
    parser.add_argument("--folder", type=Path, help="real clips")
    parser.add_argument("--name", help="keep the result as benchmarks/results/NAME.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    every: dict[str, Tracker] = {
        "ncc": NCC(),
        "lucas_kanade": LucasKanade(),
        "cotracker3": CoTracker3(checkpoint=options.checkpoint),
    }
    names = options.trackers.split(",")
    if unknown := [name for name in names if name not in every]:
        parser.error(f"--trackers: {unknown[0]} is none of {', '.join(every)}")
    result: dict[str, Any] = {"machine": machine(), "clips": options.clips}
    result["rendered"] = {name: known(every[name], options.clips) for name in names}
    print(f"{options.clips} rendered clips with known tracks\n\n{table(result['rendered'])}")
    if options.folder:
        videos = real(options.folder)
        result["there and back"] = {name: there_and_back(every[name], videos) for name in names}
        windows = f"{len(videos)} windows of {LENGTH} frames, {SIZE[0]}x{SIZE[1]}, {GRID[0] * GRID[1]} points each"
        print(f"there and back through real clips: {windows}\n\n{table(result['there and back'])}")
    if options.name:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
