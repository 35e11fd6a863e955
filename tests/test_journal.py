"""What supervised training tells of itself: metrics of every step, seconds over all parts, progress, curves."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from algorithms.distillation import strategies
from algorithms.distillation.dmd import DistributionMatching
from algorithms.distillation.settings import DMD
from algorithms.pretraining import loop
from algorithms.pretraining.loop import Fit, Interrupted, learning_rate, optimise
from runtime import curves, runlog
from runtime.journal import Journal
from runtime.progress import Progress
from tests.students import silent, student
from tests.test_distillation_stages import player


def test_seconds_are_those_of_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 10 s by this clock; between two parts it stands elsewhere."""
    now, weight, rows = [0.0], nn.Parameter(torch.ones(2)), list[dict[str, float]]()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        now[0] += 10
        return weight.square().sum(), {}

    def train(**more: Any) -> float:
        state, record = tmp_path / "state.pt", lambda step, metrics: rows.append(metrics)
        return optimise([weight], Fit(5, 0.1), loss_of, "square", silent, state=state, record=record, **more)

    with pytest.raises(Interrupted):
        train(stop=lambda: len(rows) == 3)
    now[0] = 7000.0
    assert train() == 50
    assert [row["seconds/loss"] for row in rows] == [10.0] * 5
    assert [row["lr"] for row in rows] == pytest.approx([learning_rate(Fit(5, 0.1), step) for step in range(5)])


def test_every_part_of_the_game_is_logged() -> None:
    players, rows = player(), list[dict[str, float]]()
    settings = DMD(generator_every=2, lr=1e-3, critic_lr=1e-3, layers=[0, 1], r1=1.0, r2=1.0, warmup=4)
    begin = lambda draw: student(players.student, key=draw)  # noqa: E731
    game = DistributionMatching(players, settings, strategies.SelfRollout(), begin, seed=0)
    game.train(1, silent, record=lambda step, metrics: rows.append(metrics))
    losses = {"flow_matching", "discriminator", "discriminator_accuracy", "r1", "r2", "critic_loss"}
    every = {*losses, "critic_grad_norm", "critic_lr", "lr", "seconds/critics"}
    generator = {"loss", "dmd", "dmd_gradient", "dmd_distance", "adversarial", "grad_norm", "seconds/generator"}
    assert set(rows[0]) == every | generator and set(rows[1]) == every
    assert rows[0]["loss"] == pytest.approx(rows[0]["dmd"] + 0.1 * rows[0]["adversarial"], rel=1e-5)
    assert [row["critic_lr"] for row in rows] == pytest.approx([2.5e-4, 5e-4]) and rows[0]["grad_norm"] > 0
    assert game.seconds >= sum(v for row in rows for k, v in row.items() if k.startswith("seconds/"))


def test_the_log_opens_where_training_goes_on(tmp_path: Path) -> None:
    opened: list[int] = []

    def open_log(folder: Path, config: dict[str, Any], step: int) -> runlog.RunLog:
        opened.append(step)
        return runlog.JsonLines(folder, step)

    session: Any = SimpleNamespace(
        settings=SimpleNamespace(logger=SimpleNamespace(open=open_log)), run_dir=tmp_path, config={}
    )
    for first, last in ((0, 4), (2, 6)):  # the first part kept its state after two steps
        with Journal(session, 6) as journal:
            journal.before = {"frechet": 2.0}
            for step in range(first + 1, last + 1):
                journal.record(step, {"loss": float(last)})
                assert (journal.progress.left() == "?") == (step == first + 1), "one step has no pace"
    for _ in range(2):  # killed between the evaluation and what is written of it
        with Journal(session, 6) as journal:
            journal.measured({"frechet": 1.0})
    assert opened == [0, 2, 6, 6]
    rows = [{"step": 0, "eval/frechet": 2.0}, *({"step": n, "loss": 4.0 if n < 3 else 6.0} for n in range(1, 7))]
    assert runlog.read(tmp_path) == [*rows, {"step": 6, "eval/frechet": 1.0}]


def test_lines_of_short_steps_are_apart_and_the_last_is_shown() -> None:
    out = io.StringIO()
    with Progress(total=5, console=Console(file=out, width=300), pause=100) as progress:
        for step in range(1, 6):
            progress.update(step, {"dmd/dmd": step / 10, "dmd/lr": 1.0}, {"critics": 1.0})
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[:3] for line in lines] == [
        [f"update {step}/5", f"dmd/dmd {step / 10:.4f}", "[critics 1.0 s]"] for step in (1, 5)
    ]


def test_every_stage_has_curves_of_its_own() -> None:
    found = [{"step": 1, "ode/loss": 1.0}, {"step": 2, "dmd/dmd": 1.0, "dmd/grad_norm": 1.0, "dmd/lr": 1.0}]
    named = (("ode", "loss"), ("dmd", "dmd"), ("dmd", "grad_norm"))
    assert [title for title, _ in curves._panels(found)] == [f"{stage}: {curves.LINES[key]}" for stage, key in named]
