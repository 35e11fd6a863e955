"""Tables of many runs: a cell is run once, never mistaken for another, and goes on where it stopped."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from experiments import ablation_step1, compare, learn, result_pages
from runtime import cells, composed
from runtime.cells import Cell, Home, Probe

CELL = Cell("arm", 3, "evaluate.py", ("seed=3",), (Probe("longer", ("model.transformer={folder}/transformer",)),))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Scripts that would have run; each leaves a result."""
    calls: list[tuple[str, ...]] = []

    def start(script: str, overrides: tuple[str, ...], folder: Path, threads: int) -> None:
        calls.append((script, folder.name, *overrides))
        found: dict[str, Any] = {"policy": {"motion_error_px": 2.0}, "truth": {}, "error_by_frame": [1.0, 3.0]}
        found["speed"] = {"latency_s": 0.5}
        (folder / "evaluation.json").write_text(json.dumps(found))

    monkeypatch.setattr(cells, "_start", start)
    return calls


def test_a_cell_is_run_once_with_its_probes(tmp_path: Path, started: list[tuple[str, ...]]) -> None:
    row = cells.run(CELL, tmp_path, 1, "w")
    assert started == [
        ("evaluate.py", "arm_3", "seed=3"),
        ("evaluate.py", "longer", f"model.transformer={tmp_path / 'arm_3'}/transformer"),
    ]
    assert row["after"]["motion_error_px"] == 2.0 and row["probes"]["longer"] == {
        "after": {"motion_error_px": 2.0},
        "error_by_frame": [1.0, 3.0],
        "speed": {"latency_s": 0.5},
    }
    assert cells.run(CELL, tmp_path, 1, "w") == row and len(started) == 2


def test_what_was_interrupted_goes_on(tmp_path: Path, started: list[tuple[str, ...]]) -> None:
    cells.run(CELL, tmp_path, 1, "w")
    (tmp_path / "arm_3" / "result.json").unlink()
    cells.run(CELL, tmp_path, 1, "w")
    assert [call[1] for call in started] == ["arm_3", "longer", "arm_3"], "the probe was done"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changed", "weights", "words"),
    [(("seed=4",), "w", "another command;"), (("seed=3",), "other", "another weights;")],
)
def test_another_command_or_other_weights_are_refused(
    tmp_path: Path, started: list[tuple[str, ...]], finished: bool, changed: tuple[str, ...], weights: str, words: str
) -> None:
    cell = Cell("arm", 3, "evaluate.py", ("seed=3",))
    cells.run(cell, tmp_path, 1, "w")
    if not finished:
        (tmp_path / "arm_3" / "result.json").unlink()
    with pytest.raises(RuntimeError, match=words):
        cells.run(Cell("arm", 3, "evaluate.py", changed), tmp_path, 1, weights)


def test_a_run_that_was_stopped_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped before its end"):
        cells.evaluated(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps({"curve": [{"update": 0}], "complete": False}))
    with pytest.raises(RuntimeError, match="stopped before its end"):
        cells.evaluated(tmp_path)


def test_after_a_failure_no_cell_is_begun_and_what_ends_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, ...]]
) -> None:
    whole, failed = cells._start, Event()

    def start(script: str, overrides: tuple[str, ...], folder: Path, threads: int) -> None:
        if folder.name == "arm_0":
            failed.set()
            raise RuntimeError("arm_0 failed with exit code 1")
        failed.wait(60)
        time.sleep(0.5)  # the failure is seen first
        whole(script, overrides, folder, threads)

    monkeypatch.setattr(cells, "_start", start)
    monkeypatch.setattr(cells, "RESULTS", tmp_path)
    todo = [Cell("arm", seed, "evaluate.py", (f"seed={seed}",)) for seed in range(5)]
    with pytest.raises(RuntimeError, match="arm_0 failed"):
        cells.run_all("table", todo, tmp_path / "runs", "w", 2)
    kept = [row["seed"] for row in cells.rows_in(tmp_path / "table.jsonl")]
    assert 1 in kept and 4 not in kept and len(started) == len(kept) < 4
    other = [Cell("arm", 9, "evaluate.py", ("seed=9",))]
    cells.run_all("table", other, tmp_path / "runs", "w", 1)
    assert sorted(row["seed"] for row in cells.rows_in(tmp_path / "table.jsonl")) == [*kept, 9]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `conf/` that command lines are composed from."""
    monkeypatch.setattr(composed, "CONF", Path(shutil.copytree(composed.CONF, tmp_path / "conf")))
    composed._settings.cache_clear()
    yield tmp_path / "conf"
    composed._settings.cache_clear()


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


def change(file: Path, old: str, new: str) -> None:
    """Change a default; what was composed before is forgotten."""
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))
    composed._settings.cache_clear()


def test_a_default_that_changes_is_another_config(conf: Path) -> None:
    """What neither changes the result of a script nor is read by it makes no difference; nor does a seed."""
    grpo, evaluation = ("grpo.py", ("updates=3", "logger=local")), ("evaluate.py", ("model.transformer={after}/x",))
    both, one, measured = (composed.fingerprint(runs) for runs in ([grpo, evaluation], [grpo], [evaluation]))
    assert len({both, one, measured}) == 3
    places = ("run_dir=here", "resume=true", "engine.threads=7", "checkpoint={folder}/c", "logger=wandb", "seed=5")
    assert composed.fingerprint([("grpo.py", ("updates=3", *places))]) == one
    change(conf / "algorithm" / "grpo.yaml", "clip: 0.02", "clip: 0.03")
    assert composed.fingerprint([evaluation]) == measured, "an evaluation learns nothing"
    learned = composed.fingerprint([grpo])
    assert learned != one
    change(conf / "config.yaml", "updates: 120", "updates: 121")
    assert composed.fingerprint([grpo]) == learned, "its command says how many"
    change(conf / "config.yaml", "window: 7", "window: 6")
    assert composed.fingerprint([grpo]) != learned and composed.fingerprint([evaluation]) != measured


def test_what_does_not_compose_is_refused_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^python experiments/evaluate.py evaluation.clip=3: evaluation.clip does not"
    ):
        composed.fingerprint([("evaluate.py", ("evaluation.clip=3",))])


def test_composing_imports_no_torch() -> None:
    code = "import sys, runtime.composed as c; c.fingerprint([('grpo.py', ())]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=cells.ROOT).returncode == 0


def test_a_result_of_other_defaults_is_made_again_and_replaced(
    tmp_path: Path, started: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, conf: Path
) -> None:
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "results")
    todo = [Cell("arm", seed, "evaluate.py", (f"seed={seed}",)) for seed in range(2)]
    cells.run_all("table", todo, tmp_path / "runs", "w", 1)
    change(conf / "config.yaml", "window: 7", "window: 6")
    with pytest.raises(RuntimeError, match=r"result.json is of another config; remove "):
        cells.run_all("table", todo[:1], tmp_path / "runs", "w", 1)
    cells.run_all("table", todo[:1], tmp_path / "elsewhere", "w", 1)
    found = cells.rows_in(tmp_path / "results" / "table.jsonl")
    assert [row["seed"] for row in found] == [0, 1] and len({row["config"] for row in found}) == 2
    assert list(cells.recorded("table", todo, "w")) == ["arm_0"]


def test_cells_share_the_run_that_they_start_from(tmp_path: Path, started: list[tuple[str, ...]]) -> None:
    first = Cell("first", 0, "distill.py", ("updates=8",))
    todo = [Cell(arm, 0, "distill.py", ("model.transformer={after}/x",), after=first) for arm in ("a", "b")]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda cell: cells.run(cell, tmp_path, 1, "w"), todo))
    assert started[0] == ("distill.py", "first_0", "updates=8"), "before those that need it, and once"
    begun = f"model.transformer={tmp_path / 'first_0'}/x"
    assert sorted(started[1:]) == [("distill.py", f"{arm}_0", begun) for arm in "ab"]
    assert rows[0]["command"].startswith("python experiments/distill.py updates=8; python experiments/distill.py mod")


def test_a_cell_may_start_from_one_of_another_table(tmp_path: Path, started: list[tuple[str, ...]]) -> None:
    """It is made in that table's folder, with its weights, as that table would make it, and found there later."""
    first = Cell("first", 0, "distill.py", ("updates=8",))
    home = Home(tmp_path / "other", "v")
    cell = Cell("a", 0, "evaluate.py", ("model.transformer={after}/x",), after=replace(first, home=home))
    row = cells.run(cell, tmp_path / "here", 1, "w", lambda folder: {"read": True})
    assert row["read"] and started[1] == ("evaluate.py", "a_0", f"model.transformer={tmp_path / 'other' / 'first_0'}/x")
    assert cells.run(first, home.out, 1, home.weights)["weights"] == "v" and len(started) == 2


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


def row(arm: str, seed: int, error: float, probes: tuple[str, ...] = ()) -> dict[str, Any]:
    metrics = dict.fromkeys({*learn.METRICS, *ablation_step1.METRICS}, 1.0) | {"motion_error_px": error}
    measured = {"after": metrics, "error_by_frame": [error] * 8}
    fast = {"speed": {"latency_s": 0.25, "load": 1.0, "cores": 2}}
    found = {name: {**measured, **fast} for name in probes}
    return {"arm": arm, "seed": seed, **measured, "truth": metrics, "seconds": 60, "probes": found}


def test_the_tables_say_what_was_found(tmp_path: Path) -> None:
    found = learn.table([row("student", 0, 4.0), *(row("grpo", s, e) for s, e in enumerate((2.0, 3.0, 4.0)))])
    assert "| grpo | 3 | 3.000 ± 1.000 |" in found and "-50.0 %, -25.0 %, +0.0 %; mean in [-87.1, +37.1] %" in found


def test_the_tables_of_step_1_say_every_metric_of_both_samplers(tmp_path: Path) -> None:
    names = tuple(ablation_step1.probed("self_rollout"))
    students = [row("self_rollout", seed, error, names) for seed, error in enumerate((2.0, 4.0))]
    students[1]["probes"]["cache15"]["speed"]["load"] = 5.0
    rows = [row("teacher", 0, 1.0, ("long2", "long4")), *students]
    found = ablation_step1.tables(rows)
    assert {name for probes in ablation_step1.TABLES.values() for name in probes} == {"", *names}
    assert found.count("| 3.000 ± 1.414 | 1.000 ± 0.000 | 1.0000 ± 0.0000 |") == 1 + len(names)
    assert len({line.count("|") for line in found.splitlines() if line.startswith("|")}) == 1
    teacher = [line for line in found.splitlines() if line.startswith("| teacher |")]
    assert len(teacher) == 3, "it is sampled by the ODE only"
    assert teacher[0].endswith("| 1.000 |  | 60 |") and teacher[1].endswith("| 1.000 | 0.250 |  |")
    cached = next(line for line in found.splitlines() if "cache 15" in line)
    assert cached.endswith("| 0.250 ± 0.000 † |  |"), "and the latency of every cache"
    assert "smoothness 1.0000" in found and "features of ?" in found
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
    only = ["strategy.exit=per_frame", "stage.dmd.lr=1e-3", "stage.teacher_forcing.steps=4", "world.pan=0"]
    made_so = ablation_step1.cells(1, 8, "a", "b", ["updates=5", *only])
    student = made_so[-1]
    assert student.after is not None and set(only) - set(student.overrides) == {only[2]}
    assert not {"updates=5", *only[:2]} & set(student.after.overrides) and {*only[2:]} <= set(student.after.overrides)
    parts = [c.overrides for c in made_so] + [p.overrides for c in made_so for p in c.probes]
    assert all("world.pan=0" in overrides for overrides in parts)
    probes = {p.name: set(p.overrides) for p in chunked.probes}
    assert {"rollout.frames=36", "evaluation.sampler=renoise"} <= probes["renoise_long4"] and "cache15" not in probes
    paper = {p.name: set(p.overrides) for c in made if c.name == "self_rollout_0" for p in c.probes}
    assert {"rollout.frames=36", "rollout.window=25"} <= paper["cache25"]


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
    assert (
        "| grpo | 2 | 2.500 ± 0.707 |" in lines[3]
        and "| 0.0100 ± 0.0000 |" in lines[3]
        and "% | 60 (60 to 60) |" in lines[3]
    )
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
