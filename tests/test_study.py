"""Studies: every schedule is a cell, and tables and figures say what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import study
from experiments.train import run
from tests.test_training import plan


def row(arm: str, share: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "signal": {
            size: {"within": {"share": share, "error": 0.001, "replicates": [share * k / 10 for k in range(5, 16)]}}
            for size in ("4", "8")
        },
        "metrics": {"return_std": 1.5, "motion/error_px": 4.0},
        "seconds_per_sample": {"rollout": 0.02, "update": 0.03},
        "excess_noise": [1.0, 1.25],
    }


def test_cells_are_all_schedules_under_both_kernels() -> None:
    made = study.cells(8, ["reward=motion"])
    assert len(made) == len({cell.name for cell in made}) == len(study.SCHEDULES) * len(study.KERNELS)
    assert all({"updates=8", "rollout.group_size=64", "reward=motion"} <= set(cell.overrides) for cell in made)
    window = next(cell for cell in made if cell.arm == "flow_sde_window")
    assert {"schedule.interval=1", "transition.eta=0.7"} <= set(window.overrides)


def test_the_table_of_schedules(tmp_path: Path) -> None:
    rows = [row("cps_single", 0.02), row("cps_all", 0.01), row("flow_sde_all", 0.005)]
    lines = study.schedule_table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    # 49 against 99 prompts for one unit, of 8 samples each; a resample lowers or raises both shares alike.
    assert lines[2].endswith("| 1.00 [1.00, 1.00] x | 1.00 [1.00, 1.00] x |")
    assert lines[3].endswith("| 2.02 [2.01, 2.03] x | 2.02 [2.01, 2.03] x |")
    assert lines[4].endswith("| 1.00 [1.00, 1.00] x | 1.00 [1.00, 1.00] x |"), "each kernel has its own first line"
    assert "1.000, 1.250" in lines[2] and "20 ± 1" in lines[2] and "| 20 | 30 |" in lines[2]
    study.draw_schedules(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_no_signal_needs_no_end_of_samples() -> None:
    assert study.need([0.5, 0.0, -0.1], "4").tolist() == [4.0, float("inf"), float("inf")]
    assert study.times(row("cps_all", -0.01), row("cps_single", 0.01), "8") == "inf [inf, inf] x"


def test_curves_of_finished_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, schedule in enumerate(("single", "all")):
        options = [f"schedule={schedule}", "updates=2", "evaluation.every=1"]
        run(plan(model, tmp_path / "sweep" / str(number), *options))
    rows = study.named([study.curve(folder) for folder in sorted((tmp_path / "sweep").iterdir())])
    assert "schedule=Single" in rows[0]["arm"] and "schedule=All" in rows[1]["arm"]
    points = rows[0]["points"]
    assert [p["update"] for p in points] == [0, 1, 2] and [p["frames"] for p in points] == [0, 12, 24]
    assert 0 == points[0]["seconds"] < points[1]["seconds"] < points[2]["seconds"]
    monkeypatch.setattr("runtime.cells.RESULTS", tmp_path / "results")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["study.py", "curves", str(tmp_path / "sweep"), "--name", "x"])
    study.main()
    assert (tmp_path / "results" / "x.png").stat().st_size > 5000
    assert len((tmp_path / "results" / "x.jsonl").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "results" / "x.jsonl").read_text().splitlines()[0])["points"] == points
    capsys.readouterr()
    stopped = json.loads((tmp_path / "sweep" / "1" / "evaluation.json").read_text()) | {"complete": False}
    (tmp_path / "sweep" / "1" / "evaluation.json").write_text(json.dumps(stopped))
    study.main()
    assert len((tmp_path / "results" / "x.jsonl").read_text().splitlines()) == 1
    assert "left out" in (said := capsys.readouterr().err) and "stopped or failed after update 2" in said
    monkeypatch.setattr("sys.argv", ["study.py", "curves", str(tmp_path / "results")])
    with pytest.raises(SystemExit, match="error: no finished runs in"):
        study.main()
