"""Every algorithm with every schedule, kernel and reward: it runs, with ratio 1 at first, or is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

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


def chosen(algorithm: str, schedule: str, transition: str, reward: str) -> list[str]:
    options = [f"algorithm={algorithm}", f"schedule={schedule}", f"transition={transition}", f"reward={reward}"]
    # In units of reward, rewards of an untrained model may differ too little for a pair.
    options += ["algorithm.margin=0.1", "algorithm.margin_in=spread"] if algorithm == "dpo" else []
    return options + (["schedule.k=2"] if schedule == "random_k" else [])


def learned(row: dict[str, Any]) -> bool:
    """Whether an update moved the weights, or rewards gave no reason to.

    An untrained model moves nothing that a tracker could follow: all motion rewards may be 0.
    """
    norm = row.get("grad_norm", 0.0)
    spread = row.get("group_std", math.nan)  # ppo compares no groups
    return math.isfinite(norm) and (norm > 0 or row["reward"] == 0 or spread == 0)


def check(algorithm: str, schedule: str, transition: str, reward: str, model: Path, run_dir: Path) -> None:
    options = chosen(algorithm, schedule, transition, reward)
    options += ["algorithm.epochs=1", "algorithm.minibatches=1"]  # then every ratio is 1
    words = reason(algorithm, schedule, transition)
    if words is not None:
        with pytest.raises(ValueError, match=words) as refused:
            plan(model, run_dir, *options)
        assert "\n" not in str(refused.value)
        return
    for row in two_updates(plan(model, run_dir, *options)):
        assert learned(row), row
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


@pytest.mark.parametrize("scope", ["per_frame", "one_pair"])
@pytest.mark.parametrize(("schedule", "algorithm"), list(zip(2 * ("single", "random_k"), ALGORITHMS[:4], strict=True)))
def test_scopes_of_a_schedule(scope: str, schedule: str, algorithm: str, model: Path, tmp_path: Path) -> None:
    """`one_pair` leaves most frames without a draw; only those that have one are learned from, except by NFT."""
    options = [*chosen(algorithm, schedule, "cps", "aesthetic"), f"schedule.scope={scope}"]
    made = plan(model, tmp_path, *options, "algorithm.minibatches=1", "algorithm.history_baseline=false")
    session = Session(made.settings, made.config)
    rollout = session.rollout()
    row = session.score(rollout, session.decode(rollout)) | session.update(rollout)
    drawn, steps = rollout["stochastic"], 1 if schedule == "single" else 2
    counts = drawn.sum((1, 2)) if scope == "one_pair" else drawn.sum(2)
    assert (counts == steps).all() and row.get("log_prob_gap", 0) <= 1e-5 and row["grad_norm"] > 0
    if algorithm != "nft":
        assert not (rollout["mask"] & ~drawn).any() and rollout["mask"].any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_minibatches(algorithm: str, model: Path, tmp_path: Path) -> None:
    """The first step is at ratio 1; in those after it the weights have moved, and all samples have their turn."""
    options = [*chosen(algorithm, "all", "cps", "aesthetic"), "algorithm.epochs=2", "algorithm.minibatches=2"]
    made = plan(model, tmp_path, *options, "optimizer.lr=1e-2")
    session = Session(made.settings, made.config)
    rollout = session.rollout()
    session.score(rollout, session.decode(rollout))
    seen: list[Tensor] = []
    session.loss_module.register_forward_pre_hook(lambda module, args: seen.append(args[0]["key"][:, 2:].clone()))
    row = session.update(rollout)
    assert len(seen) == 4 and row["grad_norm"] > 0 and row.get("log_prob_gap", 0) <= 1e-5
    for epoch in (seen[:2], seen[2:]):
        assert sorted(map(tuple, torch.cat(epoch).tolist())) == [(p, g) for p in range(2) for g in range(4)]
    if session.settings.algorithm.whole_groups:
        assert all(len(part[:, 0].unique()) == 1 for part in seen)
    if algorithm in ("grpo", "guard", "ppo"):
        assert row["ratio_deviation"] > 0, "later mini-batches are off the policy that acted"


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
