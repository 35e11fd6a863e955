"""Intervals over clips, the networks of papers from files, the benchmark's clips, policies side by side."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from data.sprites import PACES, Sprites
from experiments import evaluate, side_by_side
from metrics.frechet import frechet_distance
from metrics.interpolators import Linear
from metrics.intervals import jackknife, of_mean
from metrics.scripted import Scripted
from metrics.smoothness import smoothness
from rewards.aesthetic import Aesthetic
from runtime.benchmark import _quotient, by_clip, intervals
from runtime.config import CONF, Plan, validate
from runtime.evaluation import Judge, Sample, measure
from runtime.models import ROOT
from runtime.session import Session
from runtime.side_by_side import read, write
from tests.moving import asking, line, render
from tracking.lucas_kanade import LucasKanade
from tracking.trackers import Tracks


def test_the_interval_of_a_mean_is_students() -> None:
    found = of_mean([1.0, 2.0, 3.0, 4.0, math.nan])
    # standard deviation 1.29099, t with 3 degrees of freedom 3.182
    assert (found.value, found.clips) == (2.5, 4) and found.half == pytest.approx(3.182 * 1.29099 / 2, rel=0.01)
    assert of_mean([3.0]).value == 3.0 and math.isnan(of_mean([3.0]).half) and math.isnan(of_mean([]).value)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    found = jackknife(40, lambda rows: sum(x[i] for i in rows) / len(rows), parts=40)
    plain = of_mean(x)
    assert found.value == pytest.approx(plain.value) and found.half == pytest.approx(plain.half, rel=1e-9)
    assert math.isnan(jackknife(2, lambda rows: 1.0).half)


def test_the_jackknife_of_a_mean_is_its_standard_error_where_clips_come_in_turns() -> None:
    """As speeds of the benchmark do; groups of every twentieth clip would be three times too wide."""
    rng = np.random.default_rng(0)
    x = (np.arange(200) % 4 + 0.3 * rng.standard_normal(200)).tolist()
    found = jackknife(200, lambda rows: sum(x[i] for i in rows) / len(rows))
    assert found.half == pytest.approx(of_mean(x).half, rel=0.35)


def test_the_jackknife_covers_a_frechet_distance() -> None:
    """The distance of samples of one Gaussian, shifted by a known one, over 40 sets: about 95 % hold the true value."""
    g, inside = torch.Generator().manual_seed(1), 0
    for _ in range(40):
        x, y = (torch.randn(200, 2, generator=g, dtype=torch.float64) for _ in range(2))
        y = y + 1.0  # the true distance is 2
        found = jackknife(200, lambda rows, x=x, y=y: frechet_distance(x[rows], y[rows]))  # type: ignore[misc]
        inside += abs(found.value - 2) <= found.half
    assert inside >= 34


class Frames(torch.nn.Module):
    """As `inception-2015-12-05.pt` is called."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features and images.dtype == torch.uint8
        return images.float().mean((2, 3))


class Videos(torch.nn.Module):
    """As `i3d_torchscript.pt` is called."""

    def forward(
        self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        assert rescale and resize and return_features
        return x.mean((2, 3, 4)) + 1


@pytest.fixture
def networks(tmp_path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for kind, module in (("frames", Frames()), ("videos", Videos())):
        path = tmp_path / f"{kind}.pt"
        torch.jit.script(module).save(str(path))
        found |= {f"{kind}_file": str(path), f"{kind}_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return found


def test_networks_of_papers_come_from_files_whose_checksum_is_named(networks: dict[str, str], tmp_path: Path) -> None:
    extractor = Scripted(**networks)
    with pytest.raises(ValueError, match="call prepare"):
        extractor.frames(torch.zeros(1, 3, 2, 8, 8))
    extractor.prepare(tmp_path, "cpu")
    video = torch.rand(20, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = (video + 1) * 127.5
    torch.testing.assert_close(extractor.frames(video), pixels.round().mean((3, 4)).transpose(1, 2))
    torch.testing.assert_close(extractor.videos(video), pixels.mean((2, 3, 4)) + 1)
    assert extractor.name == f"inception+i3d:{networks['frames_sha256'][:8]}:{networks['videos_sha256'][:8]}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"videos_file": "nowhere.pt"}, "videos_file: no file at nowhere.pt"),
        ({"frames_sha256": "yes"}, "name the one you trust"),
        ({"frames_sha256": "0" * 64}, "has SHA-256 "),
    ],
)
def test_a_network_that_nobody_vouches_for_is_not_run(
    networks: dict[str, str], tmp_path: Path, change: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Scripted(**{**networks, **change}).prepare(tmp_path, "cpu")


def test_the_linear_interpolator_is_the_mean_of_both_neighbours() -> None:
    video = torch.rand(2, 3, 9, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = (video + 1) * 127.5
    between = (pixels[:, :, :-1:2] + pixels[:, :, 2::2]) / 2
    expected = (255 - (pixels[:, :, 1::2] - between).abs().mean((1, 2, 3, 4))) / 255
    assert torch.equal(smoothness(video, Linear()), expected)


@dataclass(frozen=True)
class Earlier:
    """An interpolator of somebody's own: the frame before."""

    label: str = "earlier"

    @property
    def name(self) -> str:
        return self.label

    def prepare(self, assets: Path, device: str) -> None:
        object.__setattr__(self, "_device", device)

    def between(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        assert self._device == "cpu"  # type: ignore[attr-defined]
        return before


def samples() -> list[Sample]:
    """Three clips of 9, 4 and no asked positions in sight; the tracker follows the first, loses the second midway."""
    path = line((4.0, 4.0), (0.5, 0.5), 9)
    batch = asking(path, (32, 32), render(path)).repeat(3)
    visible = batch.visible.clone()
    visible[1, :, 5:], visible[2] = False, False
    seen = torch.ones(3, 1, 9, dtype=torch.bool)
    seen[1, :, 3:] = False
    judge = Judge(LucasKanade(), Aesthetic(model="aesthetic_eval"), ROOT / "assets" / "tiny", "cpu")
    tracks = Tracks(path.expand(3, 1, 9, 2).clone(), seen, seen.float())
    return [Sample(batch.video, replace(batch, visible=visible), tracks, torch.tensor([False, True, False]), judge)]


def test_motion_consistency_is_one_estimate_with_its_own_interval() -> None:
    """Over positions, clips together: 8 of 8 and 2 of 4 are 10 of 12, where the mean of the clips is 0.75."""
    made = samples()
    found = measure(made, made)
    values = by_clip(made)
    known = intervals(values, made, made)
    assert values["motion_visible"][:2] == pytest.approx([1, 0.5]) and math.isnan(values["motion_visible"][2])
    for name, scale in (("motion_visible", 1), ("motion_consistency", 5)):
        assert found[name] == known[name]["value"] == pytest.approx(scale * 10 / 12)
        assert known[name]["clips"] == 2 and known[name]["over"] == "positions"
    assert known["motion_error_px"]["over"] == "clips"
    for name in ("motion_error_px", "epe_px"):
        assert found[name] == pytest.approx(known[name]["value"], abs=1e-6)
    assert math.isnan(values["epe_px"][2]) and found["motion_error_px_ci"] == known["motion_error_px"]["half"]


def test_what_cannot_be_scored_is_left_out_of_the_mean() -> None:
    made, spoilt = samples(), samples()
    spoilt[0].video[1, 0, 4, 2, 2] = torch.inf
    whole, found = by_clip(made)["aesthetic"], by_clip(spoilt)["aesthetic"]
    assert found[::2] == whole[::2] and math.isnan(found[1])


def test_the_interval_of_a_quotient_covers_it() -> None:
    """Clips whose number of positions goes with their score: 40 sets of 60 from a world with a known quotient."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(40):
        count = rng.integers(1, 33, 60)
        mean = np.clip(0.5 + count / 64 + 0.2 * rng.standard_normal(60), 0, None)
        total, number = torch.from_numpy(mean * count), torch.from_numpy(count).double()
        found = jackknife(60, _quotient(total, number))
        truth = 0.5 + (33 * 65 / 6) / (33 / 2) / 64  # E[n^2] / E[n] of 1 .. 32
        inside += abs(found.value - truth) <= found.half
    assert inside >= 34


def test_the_benchmark_has_drags_of_every_length_and_clips_of_its_own() -> None:
    clips = Sprites().batch("benchmark", range(60), (32, 32))
    reach = (clips.trajectory.xy[:, 0] - clips.trajectory.xy[:, 0, :1]).norm(dim=-1).amax(1)
    by_pace = [float(reach[i :: len(PACES)].median()) for i in range(len(PACES))]
    assert by_pace == sorted(by_pace) and by_pace[0] < 10 < 20 < by_pace[-1]
    other = Sprites().batch("heldout", range(60), (32, 32))
    assert not any(torch.equal(a, b) for a, b in zip(clips.video, other.video, strict=True))
    again = Sprites().batch("benchmark", [7], (32, 32))
    assert torch.equal(again.video[0], clips.video[7])


def plan(model: Path, run_dir: Path, *overrides: str) -> Plan:
    small = ["+debug=smoke", f"model.path={model}", f"run_dir={run_dir}", "world.sizes=[16x16,16x24]"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose("evaluate", [*small, "evaluation.split=benchmark", "evaluation.clips=5", *overrides]))


@pytest.fixture(scope="module")
def evaluations(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("evaluations")
    evaluate.run(plan(model, folder / "0"))
    evaluate.run(plan(model, folder / "1", "rollout.chunk=3"))
    return [folder / "0", folder / "1"]


def test_an_evaluation_tells_every_clip_intervals_and_speed(evaluations: list[Path]) -> None:
    for folder in evaluations:
        found = json.loads((folder / "evaluation.json").read_text())
        assert {
            "policy",
            "truth",
            "error_by_frame",
            "extractor",
            "interpolator",
            "clips",
            "tracker",
            "found_by",
            "judging_weights",
            "config",
        } <= set(found)
        assert len(set(found["names"])) == 5 and found["split"] == "benchmark" and found["interpolator"] == "linear"
        for name, column in found["by_clip"].items():
            assert len(column) == 5, name
        for name, known in found["intervals"].items():
            if name in found["policy"]:
                assert known["value"] == pytest.approx(found["policy"][name], rel=1e-4, abs=1e-6, nan_ok=True), name
        speed = found["speed"]
        assert 0 < speed["latency_s"] < speed["seconds"] and speed["frames_per_s"] > 0


def test_measuring_keeps_no_copy_of_the_policy(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(*_: object) -> None:
        raise AssertionError("a copy of the policy")

    monkeypatch.setattr("runtime.session.ReferencePolicy", copied)
    compares = plan(model, tmp_path, "algorithm.kl_weight=0.1", "evaluation.clips=2")
    with pytest.raises(AssertionError, match="a copy"):
        Session(compares.settings, compares.config)
    evaluate.run(compares)


def test_an_interpolator_of_ones_own_is_named_in_the_evaluation(
    evaluations: list[Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One Python file and one YAML file, by `_target_`."""
    own = "evaluation.interpolator={_target_: tests.test_benchmark_metrics.Earlier, label: mine}"
    evaluate.run(plan(model, tmp_path, f"+{own}"))
    usual, found = (json.loads((f / "evaluation.json").read_text()) for f in (evaluations[0], tmp_path))
    assert found["interpolator"] == "mine"
    for part in ("policy", "truth"):
        changed = {
            key for key in found[part] if found[part][key] != pytest.approx(usual[part][key], rel=0, nan_ok=True)
        }
        assert changed == {"smoothness"}, "and nothing else"
    with pytest.raises(ValueError, match="other interpolator"):
        read([evaluations[0], tmp_path])


def test_a_head_of_ones_own_judges_and_few_clips_at_a_time_are_measured_alike(
    evaluations: list[Path], model: Path, tmp_path: Path
) -> None:
    head = load_file(model / "aesthetic_eval" / "head.safetensors")
    save_file(
        {key: value + 1 if key.endswith("bias") else value for key, value in head.items()},
        tmp_path / "head.safetensors",
    )
    own = f"+evaluation.scorer_head={tmp_path / 'head.safetensors'}"
    with pytest.raises(FileNotFoundError, match=r"no aesthetic head at none.pth.*evaluation\.scorer_head"):
        plan(model, tmp_path, "+evaluation.scorer_head=none.pth")
    evaluate.run(plan(model, tmp_path / "own", own, "+evaluation.batch=1"))
    usual, found = (json.loads((f / "evaluation.json").read_text()) for f in (evaluations[0], tmp_path / "own"))
    assert found["policy"].pop("aesthetic") == pytest.approx(usual["policy"].pop("aesthetic") + 1, abs=1e-4)
    assert found["policy"] == pytest.approx(usual["policy"], abs=1e-3, nan_ok=True)
    same, other = found["judging_weights"], usual["judging_weights"]
    assert same["scorer"] != other["scorer"] and same["extractor"] == other["extractor"]


def test_side_by_side(evaluations: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("sys.argv", ["side_by_side.py", str(evaluations[0].parent), "--out", str(tmp_path)])
    assert side_by_side.main() == 0
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    assert [row[0] for row in rows] == ["", "0", "1", "true clips"] and len({len(row) for row in rows}) == 1
    assert "(95 % interval, " in rows[2][-1] and rows[1][-1] == ""
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:video/mp4;base64,") == 3 * len(list((evaluations[0] / "clips" / "true").glob("*.mp4"))) > 0
    assert "Frechet distances between features of" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr("sys.argv", ["side_by_side.py", str(tmp_path)])
    assert side_by_side.main() == 2 and "no evaluation in" in capsys.readouterr().err


def test_only_the_same_clips_are_compared(evaluations: list[Path], tmp_path: Path) -> None:
    found = json.loads((evaluations[0] / "evaluation.json").read_text())
    for key, value in ("names", ["other"]), ("extractor", "inception"), ("judging_weights", {"scorer": "00"}):
        (tmp_path / key).mkdir()
        (tmp_path / key / "evaluation.json").write_text(json.dumps({**found, key: value}))
        with pytest.raises(ValueError, match=f"other {key}"):
            read([evaluations[0], tmp_path / key])
    for key in ("world.seed", "rollout.frames", "evaluation.scorer", "evaluation.tracker.window"):
        other = json.loads(json.dumps(found))
        *parents, leaf = key.split(".")
        reduce(dict.__getitem__, parents, other["config"])[leaf] = 7
        (tmp_path / key).mkdir()
        (tmp_path / key / "evaluation.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=rf"0 and {key} were not measured alike: {key}: \S+ -> 7"):
            read([evaluations[0], tmp_path / key])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError, match="not made by"):
        write([tmp_path / "run"], tmp_path)
