"""CONTRIBUTING's promise: a reward in a folder outside this repository, one Python file and one YAML file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
from runtime.cli import main
from runtime.models import Pretrained
Pretrained.check = lambda self, frames: None
main("grpo", lambda plan: print(plan.settings.reward))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The two files, as CONTRIBUTING shows them."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name, language in (("redness.py", "python"), ("reward/redness.yaml", "yaml")):
        found = re.search(rf"`my_folder/{re.escape(name)}`\n\n```{language}\n(.*?)```", text, re.S)
        assert found
        path = tmp_path / "my_folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found[1])
    return tmp_path / "my_folder"


def experiment(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "--config-dir", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_a_reward_in_a_scratch_folder_works_from_the_command_line(folder: Path) -> None:
    done = experiment(folder, "reward=motion+0.5*redness", "reward.redness.gain=2")
    assert done.returncode == 0, done.stderr
    assert "'redness': Redness(weight=0.5, gain=2.0)" in done.stdout and "'motion': Motion(weight=1.0" in done.stdout

    bad = experiment(folder, "reward=redness", "reward.redness.gain=-1")
    assert (bad.returncode, bad.stderr) == (2, "error: reward.redness.gain must be positive, got -1.0\n")

    listed = experiment(folder, "reward=nosuch")
    assert "choose one of aesthetic, identity, motion, redness, remote, smoothness" in listed.stderr

    shown = experiment(folder, "--help", "reward=redness")
    assert "reward=redness" in shown.stdout and "factor of the difference" in shown.stdout


def test_a_run_is_rewarded_by_it(folder: Path, tmp_path: Path) -> None:
    if not (ROOT / "assets" / "tiny" / "transformer").is_dir():
        pytest.skip("the embedded model is not there")
    script = [sys.executable, "experiments/grpo.py", "--config-dir", str(folder), f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*script, "reward=0.5*redness", "+debug=smoke", "world.sizes=[32x32]"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    update = next(row for row in rows if "reward" in row)
    assert update["reward"] == pytest.approx(0.5 * update["reward_terms/redness"]) and update["grad_norm"] > 0


def test_the_reward_shown_is_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    import redness

    video = torch.zeros(2, 3, 9, 4, 4)
    video[1, 0, 5:9] = 0.5  # the pixel frames of latent frame 2
    term = redness.Redness(gain=2.0).score(video, None)
    assert term.value.tolist() == [[0, 0, 0], [0, 0, 1]] and term.valid.all()
