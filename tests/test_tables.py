"""The paper's tables: what trains, what is measured, and what need not run again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from threading import Barrier

import pytest
from hydra import compose, initialize_config_dir

from algorithms.pretraining.chain import Recipe
from experiments import tables
from metrics.intervals import Estimate
from runtime import cells, schema
from runtime.cells import Home
from runtime.config import CONF, plain
from runtime.settings import Settings


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, tuple[str, ...]]]:
    """Scripts that `tables.py` would have run; each leaves what it would leave. Two runs of GRPO go side by side."""
    calls: list[tuple[str, str, tuple[str, ...]]] = []
    beside = Barrier(2, timeout=60)

    def start(script: str, overrides: tuple[str, ...], folder: Path, threads: int) -> None:
        calls.append((script, folder.name, overrides))
        if folder.name.startswith("grpo_"):
            beside.wait()
        known = {name: Estimate(1.0, 0.1, 9).__dict__ for name in tables.METRICS}
        metrics = dict.fromkeys(tables.METRICS, 1.0)
        found = {"policy": metrics, "truth": metrics, "error_by_frame": [1.0], "extractor": "toy", "intervals": known}
        checkpoint = next((text.partition("=")[2] for text in overrides if text.startswith("checkpoint=")), None)
        more = {"speed": {"latency_s": 0.5}, "config": {"checkpoint": checkpoint}}
        (folder / "evaluation.json").write_text(json.dumps(found | more))
        row = {"step": 1, "reward_terms/motion": 1.0, "reward_terms/aesthetic": 2.0}
        (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(cells, "_start", start)
    monkeypatch.setattr(cells, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    return calls


def make_tables(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """Run `tables.py` with two seeds; returns what it publishes."""
    sizes = ["--seeds", "2", "--updates", "3", "--steps", "4", "--clips", "9"]
    places = [text for name in ("out", "learn", "step1") for text in (f"--{name}", str(folder / "runs" / name))]
    monkeypatch.setattr("sys.argv", ["tables.py", *sizes, *places, *options])
    tables.main()
    return (folder / "results" / "tables.md").read_text()


def test_the_tables_train_what_is_missing_measure_every_row_and_stand_beside_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, str, tuple[str, ...]]]
) -> None:
    text = make_tables(tmp_path, monkeypatch)
    measured = [(name, overrides) for script, name, overrides in started if script == "evaluate.py" and "_" in name]
    rows = {name.rsplit("_", 1)[0]: overrides for name, overrides in measured if name[-1].isdigit()}
    assert {*tables.TABLE2, *tables.TABLE3} <= set(rows)
    assert "rollout.window=25" in rows["cache25"] and tables.LONG in rows["cache7"] and tables.LONG not in rows["full"]
    assert f"checkpoint={tmp_path}/runs/learn/grpo_1/checkpoints/step_000003" in dict(measured)["full_1"]
    order = [name for _, name, _ in started if name.endswith("_1")]
    row = "no_self_rollout"
    chain = ["warm_up_1_1", "teacher_forcing_1", f"{row}_weak_1", f"{row}_grpo_1", f"{row}_1"]
    for names in (chain, ["teacher_forcing_1", f"{row}_own_weak_1"], ["grpo_1", "cache25_1"]):
        assert [order.index(name) for name in names] == sorted(order.index(name) for name in names)
    assert len(order) == len(set(order)), "what rows share is trained once"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for script, name, overrides in started:
            if name in ("no_self_rollout_own_weak_0", "chunk3_weak_0", "chunk3_grpo_0", "cache15_0", "teacher_0"):
                schema.build(Settings, plain(compose(Path(script).stem, list(overrides))))  # every key exists
    assert text.count("the paper") == 10 and "353.75" in text and "features of toy" in text
    assert "| 1.0000 ± 0.0000 |" in text and "| 1.0000 (± 0.1000) |" in text, "seeds and clips are told apart"
    assert (tmp_path / "results" / "tables.png").stat().st_size > 0


def test_rows_of_the_tables_that_are_recorded_need_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, str, tuple[str, ...]]]
) -> None:
    """Not even those that they start from, as in a fresh clone; a part of the rows publishes all of them."""
    text = make_tables(tmp_path, monkeypatch, "--rows", "no_rl,full")
    count = len(started)
    assert text.count("the paper") == 3 and count == 7
    shutil.rmtree(tmp_path / "runs")
    figure = tmp_path / "results" / "tables.png"
    figure.unlink()
    assert make_tables(tmp_path, monkeypatch, "--rows", "no_rl") == text and len(started) == count
    assert figure.is_file(), "of the recorded runs"
    recorded = tmp_path / "results" / "tables.jsonl"
    recorded.write_text("".join(line for line in recorded.open() if "full_alone" not in line))
    make_tables(tmp_path, monkeypatch, "--rows", "no_rl,full")
    assert len(started) == count, "nothing is trained for a latency alone"
    more = make_tables(tmp_path, monkeypatch, "--rows", "full,cache15")
    assert more.count("the paper") == 4 and len(started) == count + 6
    with pytest.raises(SystemExit):
        make_tables(tmp_path, monkeypatch, "--rows", "nosuch")


def test_other_students_see_weak_tracks_as_the_shipped_one_did() -> None:
    """The same stage as in the recipe of the shipped chain, but for what a row is about."""
    made = tables.Rows(Home(Path(), "w"), Home(Path(), "w"), 120, 300, 9).student("no_self_rollout_own", 0).after
    assert made is not None
    with initialize_config_dir(str(CONF), version_base="1.3"):
        stage = schema.build(Settings, plain(compose("distill", [*made.overrides[:-1]]))).stage
    shipped = Recipe().student.stage
    assert stage.own_history == shipped.own_history and not stage.teacher_forcing.steps
    for name in ("from_teacher", "eta", "pool", "track_noise", "match"):
        assert getattr(stage, name) == getattr(shipped, name), name
