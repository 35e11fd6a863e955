"""The benchmark of trackers: one that knows the answer is perfect, one that never moves is not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import trackers
from data.sprites import Sprites
from runtime.episodes import fixed_clips
from runtime.videos import write
from tests.moving import line, render
from tracking.ncc import NCC
from tracking.trackers import Tracks


@dataclass
class Oracle:
    """Gives the true tracks of the benchmark's batches, in their order."""

    offset: float = 0.0
    turn: int = 0

    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        batch = fixed_clips(Sprites(), "heldout", 6)[self.turn]
        self.turn += 1
        return Tracks(batch.trajectory.xy + self.offset, batch.visible, batch.visible.float())


class Still:
    """Says that nothing moves and everything is seen."""

    def track(self, video: Tensor, queries: Tensor) -> Tracks:
        xy = queries[:, :, None].expand(-1, -1, video.shape[2], -1)
        seen = torch.ones(xy.shape[:-1])
        return Tracks(xy, seen.bool(), seen)


def test_errors_and_visibility_against_the_truth() -> None:
    perfect = trackers.known(Oracle(), 6)
    assert perfect["median_px"] == 0 and perfect["within_1px"] == perfect["precision"] == perfect["recall"] == 1
    off = trackers.known(Oracle(offset=2**0.5), 6)  # 2 px away
    assert off["median_px"] == pytest.approx(2, abs=1e-4)
    assert (off["within_1px"], off["within_3px"]) == (0, 1)
    still = trackers.known(Still(), 6)
    shown = torch.cat([b.visible[..., 1:].flatten() for b in fixed_clips(Sprites(), "heldout", 6)]).float().mean()
    assert still["recall"] == 1 and still["precision"] == pytest.approx(float(shown)) and still["median_px"] > 2


def test_there_and_back() -> None:
    video = torch.stack([render(line((30.0, 20.0), (0.8, 0.3), 9), (40, 64), seed=i) for i in range(2)])
    found = trackers.there_and_back(NCC(), video)
    assert found["kept"] > 0.8 and found["median_px"] < 0.3
    still = trackers.there_and_back(Still(), video)
    assert still["kept"] == still["within_1px"] == 1 and still["moved_px"] == 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    frames = torch.randint(0, 255, (33, 64, 96, 3), dtype=torch.uint8).numpy()
    write(tmp_path / "clips" / "a.mp4", frames, 8.0)
    monkeypatch.setattr(trackers, "RESULTS", tmp_path)
    options = ["--clips", "3", "--trackers", "ncc", "--folder", str(tmp_path / "clips"), "--name", "here"]
    monkeypatch.setattr("sys.argv", ["trackers", *options])
    trackers.main()
    found = json.loads((tmp_path / "here.json").read_text())
    assert found["rendered"]["ncc"]["ms"] > 0 and 0 <= found["there and back"]["ncc"]["kept"] <= 1
    assert "1 windows of 33 frames" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["trackers", "--trackers", "nosuch"])
    with pytest.raises(SystemExit):
        trackers.main()
