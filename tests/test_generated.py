"""Generated command lines: a plan, or a line that names its key, in under a second and without torch; plans run."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.errors import ConfigCompositionException

from runtime.config import CONF
from runtime.hydra_sum import parse_sum
from tests import generated

ROOT = CONF.parent


def made(lines: int, sums: int, first: int = 0) -> dict[str, Any]:
    program = [sys.executable, "-m", "tests.generated", str(lines), str(sums), str(first)]
    done = subprocess.run(program, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def check(found: dict[str, Any], lines: int, sums: int) -> None:
    assert found["wrong"] == [] and found["imported"] == []
    assert 0.15 * lines < len(found["valid"]) < 0.85 * lines, "both happen"
    assert 0.1 * sums < found["sums"] < 0.9 * sums


def test_a_command_line_is_a_plan_or_a_line_that_names_its_key() -> None:
    check(made(90, 60), 90, 60)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_command_lines_and_ten_thousand_sums() -> None:
    check(made(2000, 10_000, 10_000), 2000, 10_000)


def test_reward_strings_are_parsed_or_refused_with_their_key() -> None:
    parsed = 0
    for seed in range(1000, 2000):
        text = generated.reward_string(random.Random(seed))
        try:
            parsed += bool(parse_sum(text))
        except ConfigCompositionException as error:
            assert str(error).startswith("reward=") and "\n" not in str(error)
    assert 200 < parsed < 800


def runnable() -> list[tuple[int, str, list[str]]]:
    """Twenty command lines that are valid for a run of reinforcement learning that needs no service."""
    found: list[tuple[int, str, list[str]]] = []
    for seed in random.Random(0).sample(range(100_000), 3000):
        primary, line = generated.command_line(random.Random(seed))
        text = " ".join(line)
        if primary not in ("grpo", "ppo", "dpo", "train") or "remote" in text or "stage" in text or "debug" in text:
            continue
        if len(found) < 20 and generated.outcome(primary, [*line, "+debug=smoke"]).plan is not None:
            found.append((seed, primary, line))
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_valid_command_lines_run(tmp_path: Path) -> None:
    chosen = generated.in_tree(runnable)
    assert len(chosen) == 20
    ran = 0
    for seed, primary, line in chosen:
        script = ROOT / "experiments" / f"{primary}.py"
        command = [sys.executable, str(script), *line, "+debug=smoke", f"run_dir={tmp_path / str(seed)}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (seed, line, done.stderr[-2000:])
        assert done.returncode == 0 or done.stderr.count("error: ") == 1
        ran += done.returncode == 0
    assert ran >= 18  # a model's files may refuse what a config cannot know
