"""Tables of many runs: a cell is run once, never mistaken for another, and goes on where it stopped."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from experiments import ablation_step1, compare, learn, result_pages
from runtime import cells
from runtime.cells import Cell, Probe

CELL = Cell("arm", 3, "evaluate.py", ("seed=3",), (Probe("longer", ("model.transformer={folder}/transformer",)),))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Scripts that would have run; each leaves a result."""
    calls: list[tuple[str, ...]] = []

    def start(script: str, overrides: tuple[str, ...], folder: Path, threads: int) -> None:
        calls.append((script, folder.name, *overrides))
        found = {"policy": {"motion_error_px": 2.0}, "truth": {}, "error_by_frame": [1.0, 3.0]}
        (folder / "evaluation.json").write_text(json.dumps(found))

    monkeypatch.setattr(cells, "_start", start)
    return calls


def test_a_cell_is_run_once_with_its_probes(tmp_path: Path, started: list[tuple[str, ...]]) -> None:
    row = cells.run(CELL, tmp_path, 1, "w")
    assert started == [
        ("evaluate.py", "arm_3", "seed=3"),
        ("evaluate.py", "longer", f"model.transformer={tmp_path / 'arm_3'}/transformer"),
    ]
    assert row["after"]["motion_error_px"] == 2.0 and row["probes"]["longer"]["error_by_frame"] == [1.0, 3.0]
    assert cells.run(CELL, tmp_path, 1, "w") == row and len(started) == 2


def test_what_was_interrupted_goes_on(tmp_path: Path, started: list[tuple[str, ...]]) -> None:
    cells.run(CELL, tmp_path, 1, "w")
    (tmp_path / "arm_3" / "result.json").unlink()
    cells.run(CELL, tmp_path, 1, "w")
    assert [call[1] for call in started] == ["arm_3", "longer", "arm_3"], "the probe was done"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("changed", "weights"), [(("seed=4",), "w"), (("seed=3",), "other")])
def test_another_command_or_other_weights_are_refused(
    tmp_path: Path, started: list[tuple[str, ...]], finished: bool, changed: tuple[str, ...], weights: str
) -> None:
    cells.run(CELL, tmp_path, 1, "w")
    if not finished:
        (tmp_path / "arm_3" / "result.json").unlink()
    with pytest.raises(RuntimeError, match="another command or of other weights"):
        cells.run(Cell("arm", 3, "evaluate.py", changed), tmp_path, 1, weights)


def test_a_result_that_is_recorded_is_not_made_again(
    tmp_path: Path, started: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folders of the runs are gone, as in a fresh clone; results of other weights are replaced."""
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "results")
    todo = [Cell("arm", seed, "evaluate.py", (f"seed={seed}",)) for seed in range(3)]
    first = cells.run_all("table", todo[:2], tmp_path / "runs", "w", 2)
    assert [row["seed"] for row in first] == [0, 1] and len(started) == 2
    again = cells.run_all("table", todo[1:], tmp_path / "elsewhere", "w", 1)
    assert [row["seed"] for row in again] == [1, 2] and len(started) == 3
    recorded = cells.rows_in(tmp_path / "results" / "table.jsonl")
    assert sorted(row["seed"] for row in recorded) == [0, 1, 2], "a part of the table keeps the rest"
    cells.run_all("table", todo[:1], tmp_path / "others", "other", 1)
    assert len(started) == 4 and len(cells.rows_in(tmp_path / "results" / "table.jsonl")) == 1


def test_cells_share_the_run_that_they_start_from(tmp_path: Path, started: list[tuple[str, ...]]) -> None:
    first = Cell("first", 0, "distill.py", ("steps=8",))
    todo = [Cell(arm, 0, "distill.py", ("from={after}/x",), after=first) for arm in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda cell: cells.run(cell, tmp_path, 1, "w"), todo))
    assert started[0] == ("distill.py", "first_0", "steps=8"), "before those that need it, and once"
    assert sorted(started[1:]) == [("distill.py", f"{arm}_0", f"from={tmp_path / 'first_0'}/x") for arm in "ab"]
    assert rows[0]["command"].startswith("python experiments/distill.py steps=8; python experiments/distill.py from=")


def test_weights_are_told_apart_by_content_and_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m.safetensors").write_bytes(b"1")
    first = cells.weights_of(tmp_path)
    (tmp_path / "note.json").write_text("{}")
    assert cells.weights_of(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    moved = cells.weights_of(tmp_path)
    (tmp_path / "b" / "m.safetensors").write_bytes(b"2")
    assert len({first, moved, cells.weights_of(tmp_path)}) == 3


def test_seconds_are_those_of_training_over_all_parts(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "eval/x": 1},
        {"step": 1, "seconds/rollout": 2.5, "seconds/rest": 0.5},
        {"step": 2, "seconds/rest": 4},
    ]
    assert cells.training_seconds(tmp_path, {}) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cells.training_seconds(tmp_path, {}) == 7
    assert cells.training_seconds(tmp_path, {"seconds": 12.4}) == 12


def test_intervals_by_hand() -> None:
    """Mean 2, standard deviation 1, t = 4.303 for three values."""
    low, high = cells.interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


def row(arm: str, seed: int, error: float, probes: bool = False) -> dict[str, Any]:
    metrics = dict.fromkeys({*learn.METRICS, *ablation_step1.METRICS}, 1.0) | {"motion_error_px": error}
    found = (
        {name: {"after": metrics, "error_by_frame": [error] * 8} for name in ablation_step1.PROBES} if probes else {}
    )
    return {"arm": arm, "seed": seed, "after": metrics, "truth": metrics, "seconds": 60, "probes": found}


def test_the_tables_say_what_was_found(tmp_path: Path) -> None:
    found = learn.table([row("student", 0, 4.0), *(row("grpo", s, e) for s, e in enumerate((2.0, 3.0, 4.0)))])
    assert "| grpo | 3 | 3.000 ± 1.000 |" in found and "-50.0 %, -25.0 %, +0.0 %; mean in [-87.1, +37.1] %" in found
    rows = [
        row("teacher", 0, 1.0, probes=True),
        *(row("self_rollout", s, e, probes=True) for s, e in enumerate((2.0, 4.0))),
    ]
    found = ablation_step1.table(rows)
    assert (
        found.count("3.000 ± 1.414") == 1 + len(ablation_step1.PROBES)
        and len({line.count("|") for line in found.splitlines()[:-2]}) == 1
    )
    ablation_step1.draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_the_cells_of_step_1_are_all_arms_and_seeds() -> None:
    made = ablation_step1.cells(2, 8, "a", "b", ["updates=5", "rollout.window=3"])
    assert [c.name for c in made[:2]] == ["initial_0", "teacher_0"] and len(made) == 2 + 2 * len(
        ablation_step1.STUDENTS
    )
    teacher = made[1]
    assert "rollout.chunk=9" in teacher.overrides and [p.name for p in teacher.probes] == ["long2", "long4"]
    assert {"rollout.frames=36", "rollout.chunk=36", "model.transformer=b"} <= set(teacher.probes[1].overrides)
    chunked = next(c for c in made if c.arm == "self_forcing_chunk3")
    assert {"updates=5", "stage.teacher=b", "model.transformer={after}/transformer"} <= set(chunked.overrides)
    both = [next(c for c in made if (c.arm, c.seed) == (arm, 1)).after for arm in ("self_forcing", "teacher_forcing")]
    assert both[0] == both[1] and both[0] is not None and both[0].name == "warm_up_1_1"
    assert chunked.after is not None and {"rollout.chunk=3", "stage.match=false"} <= set(chunked.after.overrides)
    assert all("rollout.window=3" in p.overrides and "updates=5" not in p.overrides for p in chunked.probes)
    assert all("rollout.chunk=3" in p.overrides for p in chunked.probes)


def test_the_comparison_of_algorithms(tmp_path: Path) -> None:
    made = compare.cells(2, 50, 8, ["schedule=all"])
    assert [c.name for c in made[:3]] == ["student_0", "grpo_0", "ppo_0"] and len(made) == 1 + 2 * 5
    assert all("schedule=all" in c.overrides for c in made)
    assert all("schedule=all" in p.overrides and "step_000050" in p.overrides[-1] for c in made for p in c.probes)
    assert all({"algorithm.epochs=1", "algorithm.minibatches=2"} <= set(c.overrides) for c in made[1:])
    points = [{"update": n, "motion_error_px": 4.0 - n / 50} for n in (0, 50)]
    moved = {"kl": {"after": {"kl_to_start": 0.01}}}
    rows = [row("student", 0, 4.0) | {"curve": None}]
    rows += [row("grpo", s, e) | {"curve": points, "probes": moved} for s, e in enumerate((2.0, 3.0))]
    lines = compare.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert "| grpo | 2 | 2.500 ± 0.707 |" in lines[3] and "| 0.0100 |" in lines[3] and "% | 60 |" in lines[3]
    compare.draw(rows, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_the_page_of_an_algorithm_explains_what_its_runs_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_pages, "RESULTS", tmp_path)
    logs = [{"step": n, "reward": float(n), "seconds/rest": 0.1, "stochastic/step_0": 0.5} for n in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in logs))
    found = result_pages.logged(tmp_path)
    assert found["reward"] == [5.5, 25.5]
    points = [{"update": n, "motion_error_px": 4.0 - n / 50, "aesthetic": 4.0} for n in (0, 50)]
    more = {"before": {**points[0], "frechet": 0.5}, "curve": points, "logged": found, "processor": "a CPU"}
    more |= {"probes": {"kl": {"after": {"kl_to_start": 0.01}}}, "date": "2026-01-01", "command": "python a; python b"}
    rows = [row("grpo", seed, 3.0 + seed) | more for seed in range(2)]
    result_pages.write("grpo", rows, compare.METRICS)
    page = (tmp_path / "grpo.md").read_text()
    assert "4.000 → 3.000" in page and "3.500 ± 0.707" in page and "python a\npython b" in page
    assert "| `stochastic/step_0` | 0.5 | 0.5 | share of frames whose step n was stochastic |" in page
    assert (tmp_path / "grpo.png").stat().st_size > 5000
    with pytest.raises(KeyError, match="does not explain nonsense"):
        result_pages.meaning("nonsense", result_pages.meanings())
