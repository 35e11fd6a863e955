"""The configuration tree: every choice composes, validates and builds; bad values are refused, never
changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hydra import compose
from hydra.errors import HydraException
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from metrics.interpolators import Linear
from runtime import explain, overrides, rules, schema
from runtime.config import CONF, Plan, plain, validate
from runtime.identity import differences, flatten, identity
from runtime.models import Pretrained
from runtime.settings import Settings

PRIMARIES = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem != "config")
CHOICES = [(g, p.stem) for g in explain.groups() for p in sorted((CONF / g).glob("*.yaml"))]
# groups without a default in train.yaml: +recipe=paper
ADDED = ("recipe", "debug", "stage", "strategy", "extractor", "interpolator")
REFUSED_ALONE = {
    ("schedule", "none"): "nothing to learn",
    ("transition", "ode"): "no stochastic steps",
    ("tracker", "lucas_kanade"): "must not be the one that rewards",
    ("tracker", "cotracker3"): r"needs CoTracker: pip install|tracker\.checkpoint is not set",
    ("stage", "distill"): "only a part trains",
    ("stage", "pairs"): "stage=pairs is DPO, not GRPO",
    ("extractor", "inception_i3d"): r"evaluation\.extractor\.frames_file: no file at",
    ("model", "wan2.1_1.3b"): "rounds most of an update away",
    ("model", "wan2.1_1.3b_t2v"): "rounds most of an update away",
}
PRIMARY = {"smoke_finetune": "finetune", "smoke_distill": "distill"}  # choices that are for one experiment

fast = settings(max_examples=60, suppress_health_check=list(HealthCheck))


pytestmark = pytest.mark.usefixtures("hydra_tree")


@pytest.fixture(autouse=True)
def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    # whether the embedded weights are there is not a question about configuration
    monkeypatch.setattr(Pretrained, "check", lambda self, frames: None)


def checked(*overrides: str) -> Plan:
    return validate(compose("train", list(overrides)))


def at(node: Any, key: str) -> Any:
    return reduce(lambda n, k: n[k] if isinstance(n, dict) else getattr(n, k), key.split("."), node)


def composed(group: str, choice: str, tmp_path: Path) -> dict[str, Any]:
    """Compose a choice; a folder of tiny frames stands in for every value that it demands."""
    config = plain(compose(PRIMARY.get(choice, "train"), [f"{'+' if group in ADDED else ''}{group}={choice}"]))
    for key in [key for key, value in flatten(config).items() if value == schema.MISSING]:
        picture = cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
        (tmp_path / "clip").mkdir(exist_ok=True)
        for i in range(64):
            (tmp_path / "clip" / f"{i:03d}.png").write_bytes(picture)
        parent, _, leaf = key.rpartition(".")
        at(config, parent)[leaf] = str(tmp_path)
    return config


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=["=".join(c) for c in CHOICES])
def test_every_choice_composes_validates_builds_and_is_explained(group: str, choice: str, tmp_path: Path) -> None:
    config = composed(group, choice, tmp_path)
    built = schema.build(Settings, config)
    refusal = REFUSED_ALONE.get((group, choice))
    refused = pytest.raises((ValueError, FileNotFoundError), match=refusal) if refusal else contextlib.nullcontext()
    with refused:
        rules.check(built)
        rules.parts(built)

    explained = {f.key: f.text for f in explain.fields(Settings, config)}
    assert set(explained) == {k for k in flatten(config) if not k.endswith(schema.TARGET)}
    assert [key for key, text in explained.items() if not text] == []

    text = (CONF / group / f"{choice}.yaml").read_text()
    assert re.match(r"(# @package .*\n)?# \S", text), "the first line says what the choice is"
    keys = [line for line in text.splitlines() if re.match(r"\s*[a-z]\w*:", line)]
    assert group in ADDED or [line for line in keys if "#" not in line] == [], "keys without a comment"


@pytest.mark.parametrize("primary", PRIMARIES)
def test_every_primary_validates(primary: str) -> None:
    assert isinstance(validate(compose(primary), primary).settings, Settings)


# nothing is changed silently

BASE: dict[str, Any] = {}


def base() -> dict[str, Any]:
    if not BASE:
        BASE.update(plain(compose("train")))
    return copy.deepcopy(BASE)


values = (
    st.integers(-3, 70)
    | st.floats(width=32)
    | st.booleans()
    | st.none()
    | st.text(max_size=5)
    | st.sampled_from(["per_frame", "lora", "hard", "all", "median", "cpu", "x"])
    | st.lists(st.floats(-1, 2) | st.integers(-1, 3) | st.text(max_size=3), max_size=4)
)


@fast
@given(st.data())
def test_a_value_arrives_as_given_or_is_refused_in_one_line(data: st.DataObject) -> None:
    config = base()
    key = data.draw(st.sampled_from(sorted(k for k in flatten(config) if not k.endswith(schema.TARGET))))
    value = data.draw(values)
    assume(key not in ("run_dir", "checkpoint"))
    parent, _, leaf = key.rpartition(".")
    (at(config, parent) if parent else config)[leaf] = value
    try:
        built = schema.build(Settings, config)
        rules.check(built)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        arrived = at(built, key)
        assert arrived == value and isinstance(arrived, bool) == isinstance(value, bool)


@settings(max_examples=20)
@given(
    st.sampled_from(
        ["updates", "rollout.frames", "reward.motion.alpha", "schedule.scope", "nosuch", "optimizer", "world"]
    ),
    st.sampled_from(
        [
            "1",
            "-1",
            "1.5",
            "abc",
            "null",
            "[1,2]",
            "{a:1}",
            "nan",
            "${nosuch}",
            "",
            "???",
            "true",
            "a=b",
            "'",
            "[",
            "1,2",
        ]
    ),
    st.sampled_from(["", "+", "++", "~"]),
)
def test_any_override_composes_and_validates_or_is_refused(key: str, value: str, sign: str) -> None:
    # the command line prints these as one line: tests/test_cli.py
    with contextlib.suppress(ValueError, HydraException, OmegaConfBaseException):
        overrides.check([f"{sign}{key}={value}"])
        checked(f"{sign}{key}={value}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.group_size=1"], "rollout.group_size=1.*2 or more"),
        (
            ["algorithm.minibatches=3"],
            "minibatches=3 does not divide the 64 samples.*1, 2, 4, 8, 16, 32 or 64",
        ),
        (["schedule=none"], "schedule=none leaves GRPO nothing to learn"),
        (["alarms.kl=0.1", "algorithm.kl_weight=0"], r"alarms\.kl=0\.1.*set it, such as algorithm\.kl_weight"),
        (["alarms.kl=0.1", "algorithm=nft", "algorithm.kl_weight=1"], r"alarms\.kl=0\.1: NFT uses no log-probs"),
        (["transition=ode"], "transition=ode"),
        (["rollout.sigmas=[1.0,0.0]"], "rollout.sigmas"),
        (["rollout.sigmas=[1.0,0.5,0.7,0.0]"], "fall strictly"),
        (["rollout.sigmas=[1.2,0.5,0.0]"], "fall strictly"),
        (["rollout.sigmas=[1.0,0.5,0.1]"], "fall strictly"),
        (["schedule=window", "schedule.size=3"], "schedule does not fit"),
        (["tracker=lucas_kanade"], "must not be the one that rewards"),
        ([f"reward.aesthetic.model={CONF.parent}/assets/tiny/aesthetic_eval"], "the model of a reward"),
        (["rollout.frames=1"], "rollout.frames must be at least 2"),
        (["rollout.chunk=2"], "chunks of 2"),
        (["rollout.window=0"], "rollout.window"),
        (["rollout.sink=-1"], "rollout.sink"),
        (["world.frames=17"], "world.frames=17 but rollout.frames=9"),
        (["updates=0"], "updates"),
        (["updates=1.5"], "updates must be an integer, got 1.5"),
        (["reward.motion.weight=inf"], "reward.motion.weight must be finite"),
        (["+updat=1"], "did you mean 'updates'"),
        (["+optimizer.learning=1"], "optimizer.learning does not exist"),
        (["optimizer.lr=fast"], "optimizer.lr must be a number, got 'fast'"),
        (["seed=???"], "seed is missing; add seed="),
        (["reward.motion._target_=rewards.motion.Motoin"], "cannot import"),
        (["reward.motion._target_=os.system"], "not a dataclass"),
        (["checkpoint=/does/not/exist"], "no such folder"),
    ],
)
def test_contradictions_name_key_and_fix(overrides: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        checked(*overrides)
    assert "\n" not in str(caught.value)


def test_validation_imports_nothing_heavy_and_takes_less_than_a_second() -> None:
    program = """
import sys, time
from hydra import compose, initialize_config_dir
from runtime.config import CONF, validate
from runtime.models import Pretrained
Pretrained.check = lambda self, frames: None
with initialize_config_dir(str(CONF), version_base="1.3"):
    validate(compose("grpo"))
    assert time.process_time() < 1, time.process_time()
    for choice in ["logger=local", "adaptation=lora", "schedule=random_k", "reward=smoothness"]:
        validate(compose("grpo", [choice]))
import runtime.cli
heavy = "torch torchrl tensordict diffusers transformers cv2 av matplotlib wandb"
assert not set(heavy.split()) & set(sys.modules), set(heavy.split()) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CONF.parent)
    assert done.returncode == 0, done.stderr


def test_identity_ignores_where_and_how_long_but_nothing_else() -> None:
    one, same, other = (
        checked(*o).config
        for o in (
            ["optimizer.decay=0"],
            ["optimizer.decay=0", "updates=9", "run_dir=x", "logger=local", "saving.keep=5"],
            ["optimizer.decay=0", "optimizer.lr=2e-5", "schedule=all"],
        )
    )
    assert differences(identity(one), identity(same)) == []
    assert [d.split(":")[0] for d in differences(identity(one), identity(other))] == [
        "optimizer.lr",
        "schedule._target_",
        "schedule.scope",
    ]


def test_learning_rate_falls_to_zero_after_the_last_update_and_that_is_part_of_a_run() -> None:
    settings = checked("optimizer.lr=1e-3", "optimizer.decay=0.5", "updates=4").settings
    rates = [settings.optimizer.share(i, settings.updates) for i in range(5)]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0])
    assert [replace_decay(0.0).share(i, 4) for i in range(4)] == [1.0] * 4
    assert replace_decay(1.0).share(1, 4) == pytest.approx(0.75)
    one, longer = (checked("optimizer.decay=0.5", f"updates={n}").config for n in (4, 5))
    assert differences(identity(one), identity(longer)) == ["updates: 4 -> 5"]


def replace_decay(decay: float) -> Any:
    return dataclasses.replace(checked("optimizer.lr=1e-3").settings.optimizer, decay=decay)


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("reward.aesthetic.model=nowhere", r"nowhere holds no config\.json.*reward\.aesthetic\.model"),
        ("evaluation.scorer=nowhere", r"nowhere holds no config\.json.*evaluation\.scorer"),
        ("reward.aesthetic.head=nowhere.pth", r"no aesthetic head at nowhere\.pth"),
        ("+evaluation.scorer_head=nowhere.pth", r"no aesthetic head at nowhere\.pth.*evaluation\.scorer_head"),
    ],
)
def test_networks_that_score_and_judge_are_looked_for_before_anything_loads(override: str, missing: str) -> None:
    with pytest.raises(FileNotFoundError, match=missing):
        checked("reward=motion+aesthetic", override)


@pytest.mark.parametrize(("experiment", "needed"), [("export", ""), ("serve", "reward"), ("evaluate", "judge")])
def test_networks_are_looked_for_where_they_are_loaded(experiment: str, needed: str) -> None:
    rewarded, judged = "reward.aesthetic.model=nowhere", "evaluation.scorer=nothing"
    for override, roles in ((rewarded, ("reward", "judge")), (judged, ("judge",))):
        config = compose(experiment, ["reward=motion+aesthetic", override])
        missing = (
            pytest.raises(FileNotFoundError, match="holds no config") if needed in roles else contextlib.nullcontext()
        )
        with missing:
            validate(config, experiment)


def test_an_interpolator_that_lacks_its_file_is_refused_before_anything_loads() -> None:
    class Absent(Linear):
        def check(self, assets: Path) -> None:
            raise FileNotFoundError("evaluation.interpolator.file: no file at weights.pt")

    built = checked().settings
    with pytest.raises(FileNotFoundError, match="no file at weights"):
        rules.parts(dataclasses.replace(built, evaluation=dataclasses.replace(built.evaluation, interpolator=Absent())))
