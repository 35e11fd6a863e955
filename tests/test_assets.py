"""The shipped models: complete, small, safe to load, made by the recipe beside them, and better than nothing."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from algorithms.pretraining.chain import RECIPE, Recipe
from data.sprites import Sprites
from envs.ar_video import start
from envs.transitions import ODE
from policies.causality import Causality
from policies.sampler import generate
from runtime.models import ROOT, Pretrained

TINY = ROOT / "assets" / "tiny"
STAGES = Recipe().stages()


def test_files_are_few_small_and_safe() -> None:
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 25e6


@pytest.mark.parametrize("name", STAGES)
def test_make_tiny_would_train_with_the_settings_in_the_recipe(name: str) -> None:
    recipe = json.loads((TINY / RECIPE).read_text())
    assert set(recipe) == set(STAGES)
    assert recipe[name]["settings"] == json.loads(json.dumps(asdict(STAGES[name]))) and recipe[name]["seconds"] > 0


@torch.no_grad()
def test_the_student_draws_the_clip_it_is_asked_for() -> None:
    networks = Pretrained(str(TINY)).load("cpu")
    clips = Sprites().batch("heldout", range(8), (32, 32))
    latents = networks.video.encode(clips.video)
    keys = [(0, 0, p) for p in range(8)]
    condition, text = networks.condition(clips, keys, "cpu"), networks.text.encode(clips.prompts)
    sigmas, steps = torch.tensor([1.0, 0.755, 0.522, 0.0]), torch.zeros(3, dtype=torch.bool)
    begin = start(condition, text, sigmas, steps, torch.tensor([[0, 0, p, 0] for p in range(8)]), latents.shape[2:])
    frames = generate(networks.transformer, ODE(), Causality(), begin).latents[:, :, -1]
    video = networks.video.decode(frames)

    def error(a: torch.Tensor) -> float:
        return (a - clips.video).square().mean().item()

    still = clips.video[:, :, :1].expand_as(clips.video)
    assert error(networks.video.decode(latents)) < 4 * 10**-2.3, "at least 23 dB"
    assert error(video) < 0.9 * error(still), "nearer to the clip than its first frame"
