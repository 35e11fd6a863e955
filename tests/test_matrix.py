"""Every algorithm with every schedule, kernel and reward: it runs, with ratio 1 at first, or is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from runtime.config import CONF, Plan, validate
from runtime.session import Session

ALGORITHMS = ("grpo", "guard", "dpo", "nft", "ppo")
SCHEDULES = ("single", "all", "first", "last", "window", "random_k", "none")
TRANSITIONS = ("cps", "flow_sde", "dance_sde", "ode")
REWARDS = ("motion", "aesthetic", "smoothness", "identity", "motion+aesthetic")
SMALL = ["+debug=smoke", "world.sizes=[16x16]", "evaluation.clips=2", "rollout.prompts=2", "rollout.group_size=4"]


def plan(model: Path, run_dir: Path, *overrides: str) -> Plan:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose("train", [*SMALL, f"model.path={model}", f"run_dir={run_dir}", *overrides]))


def reason(algorithm: str, schedule: str, transition: str) -> str | None:
    """Why a combination is refused; None where it runs."""
    if transition == "ode" and schedule != "none":
        return "transition=ode has no stochastic steps"
    if schedule == "none":
        return "makes all samples of a group the same" if algorithm == "nft" else "nothing to learn from"
    return None


def two_updates(made: Plan) -> list[dict[str, Any]]:
    session = Session(made.settings, made.config)
    found = []
    for _ in range(2):
        rollout = session.rollout()
        scored = session.score(rollout, session.decode(rollout))
        found.append(scored | session.update(rollout))
    return found


def check(algorithm: str, schedule: str, transition: str, reward: str, model: Path, run_dir: Path) -> None:
    options = [f"algorithm={algorithm}", f"schedule={schedule}", f"transition={transition}", f"reward={reward}"]
    options += ["algorithm.epochs=1", "algorithm.minibatches=1"]  # then every ratio is 1
    options += ["schedule.k=2"] if schedule == "random_k" else []
    words = reason(algorithm, schedule, transition)
    if words is not None:
        with pytest.raises(ValueError, match=words) as refused:
            plan(model, run_dir, *options)
        assert "\n" not in str(refused.value)
        return
    for row in two_updates(plan(model, run_dir, *options)):
        # An untrained model moves nothing that a tracker could follow: all motion rewards may be 0.
        norm = row.get("grad_norm", 0.0)
        assert math.isfinite(norm) and (norm > 0 or row["reward"] == 0 or row.get("pairs") == 0), row
        assert row.get("log_prob_gap", 0) <= 1e-5 and row.get("ratio_deviation", 0) <= 2e-5


COMBINATIONS = list(itertools.product(ALGORITHMS, SCHEDULES, TRANSITIONS))


@pytest.mark.parametrize(
    ("number", "algorithm", "schedule", "transition"),
    [(i, *each) for i, each in enumerate(COMBINATIONS)],
    ids=["-".join(each) for each in COMBINATIONS],
)
def test_every_combination_runs_or_is_refused(
    number: int, algorithm: str, schedule: str, transition: str, model: Path, tmp_path: Path
) -> None:
    """The rewards take turns."""
    turn = number + number // len(TRANSITIONS)
    check(algorithm, schedule, transition, REWARDS[turn % len(REWARDS)], model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize(("algorithm", "schedule", "transition"), COMBINATIONS)
def test_the_whole_matrix(
    algorithm: str, schedule: str, transition: str, reward: str, model: Path, tmp_path: Path
) -> None:
    check(algorithm, schedule, transition, reward, model, tmp_path)


def test_nft_learns_from_deterministic_rollouts(model: Path, tmp_path: Path) -> None:
    options = ["algorithm=nft", "schedule=none", "transition=ode", "rollout.share_initial_noise=false"]
    for row in two_updates(plan(model, tmp_path, *options)):
        assert row["grad_norm"] > 0 and row["stochastic/step_0"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["algorithm=dpo", "algorithm.pairs=3"], r"algorithm\.pairs=3 needs groups of 6 or more"),
        (["algorithm=dpo", "algorithm.minibatches=4"], r"does not divide the 2 groups of an update"),
        (["algorithm=ppo", "rollout.group_size=3", "algorithm.minibatches=4"], "does not divide the 6 samples"),
        (["algorithm=guard", "rollout.group_size=1"], "Guard compares the samples of a group"),
    ],
)
def test_what_does_not_fit_is_refused(options: list[str], words: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        plan(model, tmp_path, *options)


def test_ppo_takes_groups_of_one(model: Path, tmp_path: Path) -> None:
    rows = two_updates(plan(model, tmp_path, "algorithm=ppo", "rollout.group_size=1", "rollout.prompts=4"))
    assert all(row["grad_norm"] > 0 and "explained_variance" in row for row in rows)
