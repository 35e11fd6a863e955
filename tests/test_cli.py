"""The command line: one line and exit code 2 for what a person can mend; sweeps go on; help explains
everything."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import runtime
from runtime import checkpoint, cli
from runtime.checkpoint import Snapshot
from runtime.config import Plan
from runtime.models import Pretrained

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setattr(Pretrained, "check", lambda self, frames: None)
    monkeypatch.chdir(tmp_path)
    for name in ("ARDRAG_TRACEBACK", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, experiment: Callable[[Plan], None] | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["experiments/grpo.py", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main("grpo", experiment or (lambda plan: print("ran", plan.settings.run_dir, plan.settings.seed)))
        out, err = capfd.readouterr()
        return int(left.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["reward=nosuch"], ["reward=nosuch does not exist", "aesthetic, identity, motion, remote, smoothness"]),
        (["reward=motion+nosuch"], ["reward=nosuch does not exist", "aesthetic, identity, motion, remote, smoothness"]),
        (["algorithm=nosuch"], ["algorithm=nosuch", "grpo"]),
        (["schedule=nosuch"], ["random_k", "single", "window"]),
        (["transition=nosuch"], ["cps, dance_sde, flow_sde, ode"]),
        (["world=nosuch"], ["clips", "sprites"]),
        (["reward=motion+"], ["empty"]),
        (["reward=inf*motion"], ["'inf' is not a finite number"]),
        (["reward.motion.weight=nan"], ["reward.motion.weight must be finite"]),
        (["rollout.group_size=1"], ["rollout.group_size=1", "2 or more"]),
        (["schedule=none"], ["nothing to learn", "schedule=single"]),
        (["algorithm.minibatches=3"], ["does not divide"]),
        (["world=clips"], ["world.folder is missing"]),
        (["world=clips", "world.folder=/does/not/exist"], ["no folder at /does/not/exist"]),
        (["world=clips", "world.folder=bad"], ["broken.mp4"]),
        (["checkpoint=/does/not/exist"], ["no such folder"]),
        (["checkpoint=bad"], ["not a complete checkpoint"]),
        (["checkpoint=other/checkpoints/step_000001"], ["another model", "elsewhere -> assets/tiny"]),
        (["run_dir=other"], ["earlier run", "resume=true"]),
        (["resume=true"], ["run_dir"]),
        (["updats=3"], ["did you mean 'updates'"]),
        (["+optimizer.learning_rate=3"], ["optimizer.learning_rate does not exist"]),
        (["rewrd=motion"], ["did you mean 'reward'"]),
        (["updates=1.5"], ["integer"]),
        (["updates=["], ["'['"]),
        (["world=[1,2]"], ["world=[1,2]: a config group takes the name of a choice, such as world=clips"]),
        (["--help", "world=[1,2]"], ["world=[1,2]: a config group takes the name of a choice"]),
        (["-m", "seed=1,2", "tracker@evaluation.tracker=[1]"], ["tracker@evaluation.tracker=[1]: a config group"]),
        (["reward=null"], ["reward=null: a config group takes the name of a choice, such as reward=aesthetic"]),
        (["reward=motion+[aesthetic"], ["reward=motion+[aesthetic: cannot be read", "quote"]),
        (["=updates"], ["=updates: names no key before the =; write key=value"]),
        (["model.path=${nosuch}"], ["nosuch"]),
        (["--config-dir", "/does/not/exist"], ["/does/not/exist"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(
    command: Run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.mp4").write_bytes(b"not a video")
    config = {"model": {"_target_": "runtime.models.Pretrained", "path": "elsewhere", "control": "presence"}}
    checkpoint.save(tmp_path / "other", Snapshot(1, config, {"weights": {"w": torch.ones(1)}}), keep=1)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = command(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert sorted(tmp_path.rglob("*")) == before, "a refused run leaves nothing behind"


def test_an_accepted_run_gets_its_folder_and_exits_0(command: Run) -> None:
    code, out, _ = command("seed=4")
    assert code == 0 and out.startswith("ran outputs/grpo/") and out.endswith(" 4\n")
    assert command("run_dir=here")[1] == "ran here 0\n"


def test_setup_errors_of_the_experiment_are_one_line_later_ones_keep_their_traceback(command: Run) -> None:
    def setup(plan: Plan) -> None:
        with cli.setup_phase():
            raise ValueError("weights do not fit:\n  a\n  b")

    def later(plan: Plan) -> None:
        raise ValueError("boom")

    assert command(experiment=setup)[::2] == (2, "error: weights do not fit: a; b\n")
    code, _, err = command(experiment=later)
    assert code == 1 and "Traceback" in err and err.endswith("error: ValueError: boom\n")


def test_traceback_on_request(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARDRAG_TRACEBACK", "1")
    code, _, err = command("updates=0")
    assert code == 2 and "Traceback" in err


def test_a_sweep_reports_what_is_refused_and_goes_on(command: Run) -> None:
    code, out, err = command("-m", "seed=1,-1,2", "reward=motion,motion+0.5*aesthetic", "run_dir=cells")
    assert code == 2
    assert [line.split()[-1] for line in out.splitlines()] == ["1", "1", "2", "2"]
    folders = [line.split()[1] for line in out.splitlines()]
    assert folders == ["cells/0", "cells/1", "cells/4", "cells/5"]
    assert err.count("seed must lie in") == 2 and "2 of 6 runs" in err


def test_a_sweep_goes_on_where_a_cell_cannot_be_composed(command: Run) -> None:
    code, out, err = command("-m", "seed=1,2", "schedule=single,nosuch,all", "reward=motion,motin")
    assert code == 2 and [line.split()[-1] for line in out.splitlines()] == ["1", "1", "2", "2"]
    assert err.count("schedule=nosuch does not exist; choose one of all, first") == 4
    assert err.count("reward=motin does not exist") == 4 and "8 of 12 runs" in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    code, out, err = command("-m", "seed=1,2", "nosuch.key=1,2")
    assert code == 2 and not out and "nosuch.key does not exist" in err
    code, out, err = command("-m", "seed=1,2", "world=sprites,[1,2]")
    assert code == 2 and [line.split()[-1] for line in out.splitlines()] == ["1", "2"]
    assert err.count("world=[1,2]: a config group takes the name of a choice") == 2 and "2 of 4 runs" in err


def test_a_type_error_of_an_experiment_is_not_taken_for_a_wrong_choice(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise TypeError("a defect")

    monkeypatch.setattr(cli, "explain", broken)
    with pytest.raises(TypeError, match="a defect"):
        command("--help")


def test_the_clock_of_a_run_starts_with_the_process_and_in_a_sweep_with_its_cell(command: Run) -> None:
    found: list[float] = []

    def experiment(plan: Plan) -> None:
        found.append(plan.started)

    assert command("-m", "seed=1,2", experiment=experiment)[0] == 0
    assert runtime.STARTED == found[0] < found[1] <= time.monotonic()
    program = "import runtime, sys; assert runtime.STARTED; assert not {'hydra', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(cli.__file__).parents[1])


@pytest.mark.parametrize("option", [("--cfg", "job"), ("--cfg=job",), ("-c", "job"), ("--info", "defaults")])
def test_what_help_names_of_hydra_works(command: Run, option: tuple[str, ...]) -> None:
    code, out, err = command("seed=7", *option)
    assert code == 0 and not err and "ran outputs" not in out
    assert "seed: 7" in out or "Defaults List" in out


def test_help_explains_choices_and_fields(command: Run) -> None:
    code, out, _ = command("--help", "schedule=window")
    assert code == 0
    for text in (
        "schedule.interval=25",
        "iterations between two moves",
        "reward=motion ",
        "rollout.group_size=8",
        "optimizer.lr=0.0005",
        "-m",
    ):
        assert text in out
    assert command("-h", "schedule=nosuch")[0] == 2
