"""The loop of the embedded model runs full-size Wan's classes: GRPO and DPO, LoRA and all weights, both kinds."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose

from runtime.config import validate
from runtime.models import ROOT
from runtime.session import Session
from tests.wan_fixtures import OVERRIDES, write

SMOKE = ["+debug=smoke", "world.sizes=[32x32]", "device=cpu"]


pytestmark = pytest.mark.usefixtures("hydra_tree")


def session(run_dir: Path, *overrides: str, reward: str = "motion") -> Session:
    plan = validate(compose("grpo", [*SMOKE, *OVERRIDES, f"reward={reward}", f"run_dir={run_dir / 'run'}", *overrides]))
    return Session(plan.settings, plan.config)


def iterate(made: Session) -> dict[str, float]:
    rollout = made.rollout()
    video = made.decode(rollout)
    return made.score(rollout, video) | made.update(rollout)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=wan2.1_1.3b", "adaptation=lora", "model.architecture.image_dim=80"],
        ["model=wan2.1_1.3b_t2v", "adaptation=full", "algorithm=dpo", "algorithm.pairs=1", "algorithm.margin=0"],
    ],
    ids=["i2v lora grpo", "t2v full dpo"],
)
def test_an_iteration_from_a_checkpoint(overrides: list[str], tmp_path: Path) -> None:
    kind = "t2v" if "t2v" in overrides[0] else "i2v"
    write(tmp_path / "model", kind, "diffusers")
    where = [f"model.path={tmp_path / 'model'}", f"model.features={tmp_path / 'features'}"]
    # Random weights move nothing that a tracker could find: a pair needs a reward that tells clips apart.
    made = session(tmp_path, *overrides, *where, reward="motion" if kind == "i2v" else "smoothness")
    before = [p.detach().clone() for p in made.parameters]
    metrics = iterate(made)
    assert metrics["log_prob_gap"] <= 1e-5 and metrics["grad_norm"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, made.parameters, strict=True))
    assert list((tmp_path / "features").glob("*.safetensors"))
    made.save()
    samples = made.evaluate_start()[1]
    assert samples[0].video.shape[-2:] == (32, 32)


@pytest.mark.parametrize(
    "how",
    [
        ["adaptation=lora", "model.precision=bfloat16"],
        ["adaptation=full", "model.precision=float32", "engine.precision=bf16"],
    ],
)
def test_low_precision_has_float32_log_probs_and_float32_weights_that_train(how: list[str], tmp_path: Path) -> None:
    image = ["model.architecture.image_dim=80", "model.random=true"]
    made = session(tmp_path, "model=wan2.1_1.3b", *image, *how)
    assert {p.dtype for p in made.parameters} == {torch.float32}
    assert made.actor.transformer.compute_dtype == torch.bfloat16
    rollout = made.rollout()
    assert rollout["log_prob"].dtype == torch.float32 and "image" in rollout
    made.score(rollout, made.decode(rollout))
    gap = made.update(rollout)["log_prob_gap"]
    assert gap <= 1e-2
    velocity = made.actor.velocity(made.episodes.training(0, 0)[0], 0, 0)
    assert velocity.dtype == torch.float32 and torch.equal(velocity, velocity.bfloat16().float())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["finetune", "distill"])
@pytest.mark.parametrize("kind", ["i2v", "t2v"])
def test_step_1_trains_a_checkpoint_that_can_be_loaded_again(kind: str, script: str, tmp_path: Path) -> None:
    write(tmp_path / "model", kind, "diffusers")
    name = {"i2v": "wan2.1_1.3b", "t2v": "wan2.1_1.3b_t2v"}[kind]
    shape = ["model.architecture.image_dim=80", "model.image_frames=none"] if kind == "i2v" else []
    own = {"finetune": ["model.transformer=transformer"], "distill": ["stage.teacher=transformer"]}[script]
    layers = ["stage.dmd.layers=[1]"] if script == "distill" else []
    where = [f"model.path={tmp_path / 'model'}", "model.features=null", f"run_dir={tmp_path / 'run'}", "device=cpu"]
    arguments = [f"+debug=smoke_{script}", f"model={name}", *OVERRIDES, *shape, *own, *layers, *where]
    command = [sys.executable, f"experiments/{script}.py", *arguments, "world.sizes=[32x32]"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    plan = compose("grpo", [f"model={name}", *OVERRIDES, *shape, *where[:2], "adaptation=lora", "world.sizes=[32x32]"])
    wan = replace(validate(plan).settings.model, transformer=str(tmp_path / "run" / "transformer"))
    wan.check()
    trained = wan.load_transformer("cpu").patch_embedding.weight
    assert trained[:, -16:].any(), "control was learned"
