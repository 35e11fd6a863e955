"""Timing, progress, signals, logs and the plain engine."""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from runtime import signals
from runtime.progress import Progress, clock, summary
from runtime.runlog import Wandb, read
from runtime.settings import Optimizer
from runtime.team import Team
from runtime.timing import PhaseTimer
from runtime.trainer import PlainTrainer


def test_phases_and_rest_sum_to_the_whole_and_inner_phases_are_not_counted_twice() -> None:
    timer, began = PhaseTimer(), time.perf_counter()
    with timer.phase("outer"):
        time.sleep(0.02)
        with timer.phase("inner"):
            time.sleep(0.03)
    time.sleep(0.01)
    seconds = timer.seconds()
    whole = time.perf_counter() - began
    assert sum(seconds.values()) == pytest.approx(whole, abs=2e-3)
    assert 0.02 <= seconds["outer"] < 0.03 <= seconds["inner"] and seconds["rest"] >= 0.01
    timer.reset()
    assert list(timer.seconds()) == ["rest"]


def test_progress_prints_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Progress(total=4, done=2, console=Console(file=out, width=300)) as progress:
        for frame in range(3):
            progress.rollout_step(frame, 3)
        metrics = {
            "reward": 1.5,
            "reward_terms/motion": 1.0,
            "motion/error_px": 2.25,
            "kl": 1e-3,
            "clip_fraction": 0.5,
            "other": 7,
        }
        progress.update(3, metrics, {"rollout": 1.0, "rest": 0.1})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("first rollout step after")
    for text in (
        "update 3/4",
        "reward 1.500",
        "motion 1.000",
        "error 2.25 px",
        "kl 0.001",
        "clipped 0.5",
        "[rollout 1.0 rest 0.1 s]",
        "left 0:00:00",
    ):
        assert text in lines[1]
    assert "other" not in lines[1]


def test_first_steps_are_told_apart_and_counted_from_the_start_of_the_process() -> None:
    out = io.StringIO()
    with Progress(total=1, console=Console(file=out, width=300), started=time.monotonic() - 100) as progress:
        progress.resume(0)
        for phase in ("evaluation", "rollout", "evaluation", "rollout"):
            progress.phase(phase)
            progress.rollout_step(0, 3)
            progress.rollout_step(1, 3)
    lines = out.getvalue().splitlines()
    assert [line.rsplit(" after ")[0] for line in lines] == ["first evaluation step", "first rollout step"]
    assert all(100 <= float(line.split()[-2]) < 110 for line in lines)


def test_what_goes_wrong_shows_in_the_line_and_only_then() -> None:
    fine = {"reward": 1.0, "groups_dropped": 0.0, "grad_norm": 2.0}
    assert summary(fine, {}) == "reward 1.000"
    assert "dropped 1 group" in summary(fine | {"groups_dropped": 1.0}, {})
    line = summary(fine | {"groups_dropped": 3.0, "skipped/gradient": 1.0}, {})
    assert "dropped 3 groups" in line and "LEFT OUT: gradient not finite" in line


def test_progress_draws_a_bar_on_a_terminal() -> None:
    out = io.StringIO()
    with Progress(total=4, console=Console(file=out, force_terminal=True, width=200)) as progress:
        progress.rollout_step(0, 9)
        progress.update(1, {"reward": 2.0}, {})
    assert "1/4" in out.getvalue() and "reward 2.000" in out.getvalue()


def test_clock_and_summary() -> None:
    assert [clock(s) for s in (0, 59.6, 3661)] == ["0:00:00", "0:01:00", "1:01:01"]
    assert summary({}, {}) == ""


def test_first_signal_is_a_request_second_leaves_and_handlers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher passes on twice within a moment is one request."""
    before, left, now = signal.getsignal(signal.SIGTERM), list[int](), [100.0]
    monkeypatch.setattr(signals.os, "_exit", left.append)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with signals.StopFlag() as stop:
        assert not stop.requested
        for later, codes in ((0.0, []), (0.5, []), (2.0, [128 + signal.SIGTERM])):
            now[0] = 100.0 + later
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested and left == codes
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_signal_of_a_process_that_others_have_stopped_is_not_its_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left = list[int]()
    monkeypatch.setattr(signals.os, "_exit", left.append)
    with signals.StopFlag() as stop:
        stop.team = SimpleNamespace(any=lambda flag: True)  # type: ignore[assignment]
        with pytest.raises(signals.Stopped):
            stop.poll()
        monkeypatch.setattr(signals.time, "monotonic", lambda: 1e6)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and not left


def test_without_wandb_the_local_log_goes_on_after_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = Wandb().open(tmp_path, {}, 0)
    log.log(1, {"reward": 1.0})
    log.close()
    assert read(tmp_path) == [{"step": 1, "reward": 1.0}]
    assert capsys.readouterr().err.count("notice: wandb is not installed") == 1


class FakeWandb(ModuleType):
    """What of wandb a run uses; remembers what it is given, and fails at what it is told to."""

    def __init__(self, fails: Sequence[str] = ()) -> None:
        super().__init__("wandb")
        self.fails, self.starts, self.logged = fails, list[dict[str, Any]](), list[tuple[dict[str, Any], Any]]()
        self.Settings = self.Video = self.Image = lambda *a, **k: (a, k)
        self.Html = lambda path, inject: Path(path).read_text()

    def init(self, **given: Any) -> FakeWandb:
        self.starts.append(given)
        self._do("init")
        self.id = given["id"] or f"new{len(self.starts)}"
        return self

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._do("log")
        self.logged.append((metrics, step))

    def finish(self) -> None:
        self._do("finish")

    def _do(self, what: str) -> None:
        if what in self.fails:
            raise RuntimeError(f"cannot {what}")


def test_wandb_gets_videos_curves_and_report_and_a_resumed_run_goes_on_with_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "videos").mkdir()
    for name, text in (("videos/00.mp4", ""), ("videos/00.png", ""), ("curves.png", ""), ("report.html", "<html>")):
        (tmp_path / name).write_text(text)
    log = Wandb().open(tmp_path, {"resume": False}, 0)
    log.log(1, {"reward": 1.0})
    log.results(tmp_path)
    log.close()
    (first, step), (media, _) = fake.logged
    assert (first, step) == ({"reward": 1.0}, 1) and media["report"] == "<html>"
    assert media["videos/00"] == ((str(tmp_path / "videos" / "00.mp4"),), {})
    assert media["curves"] == ((str(tmp_path / "curves.png"),), {}) and len(media) == 3
    for resume in (True, False):
        Wandb().open(tmp_path, {"resume": resume}, 1)
    assert [start["id"] for start in fake.starts] == [None, "new1", None]
    assert {start["resume"] for start in fake.starts} == {"allow"}
    assert {start["mode"] for start in fake.starts} == {"offline"}


@pytest.mark.parametrize("fails", [["init"], ["log"], ["finish"], ["log", "finish"]])
def test_a_failure_of_wandb_is_one_notice_and_the_local_log_goes_on(
    fails: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails))
    log = Wandb().open(tmp_path, {}, 0)
    for step in (1, 2):
        log.log(step, {"reward": 1.0})
    log.results(tmp_path)
    log.close()
    assert [row["step"] for row in read(tmp_path)] == [1, 2]
    error = capsys.readouterr().err
    assert error.count("notice: wandb") == 1 and f"RuntimeError: cannot {fails[0]}" in error


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing() -> None:
    network = torch.nn.ParameterList([torch.ones(3)])
    (weight,) = network
    settings = Optimizer(lr=0.1, decay=0, betas=[0.9, 0.999], weight_decay=0, grad_clip=1, ema=0)
    trainer = PlainTrainer(network, None, settings, 0.0, Team())
    trainer.backward({"loss": (weight * torch.tensor([1.0, float("nan"), 1.0])).sum()})
    assert not torch.isfinite(torch.tensor(trainer.step()))
    assert weight.tolist() == [1, 1, 1] and not trainer.tensors() and weight.grad is None
    trainer.backward({"loss": (weight * torch.tensor([3.0, 4.0, 0.0])).sum()})
    assert trainer.step() == pytest.approx(5.0)
    assert weight[0] < 1
