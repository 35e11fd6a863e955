"""The shipped models: complete, small, safe to load, made by the recipe beside them, and better than nothing."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch.nn.functional import normalize

from algorithms.pretraining.chain import RECIPE, Recipe
from algorithms.pretraining.towers import DEGRADATIONS, degrade
from data.draws import Stream, generator
from data.sprites import Sprites
from envs.ar_video import start
from envs.transitions import ODE
from metrics.clip_vision import ClipVision
from policies.causality import Causality
from policies.sampler import generate
from rewards.aesthetic import load_head
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
def test_the_scorer_orders_clean_slightly_damaged_and_damaged_frames() -> None:
    """In 95 % of held-out triples of each kind, at severities 0, 0.3 and 0.8 (docs/rewards.md has larger sets)."""
    vision, (w, b) = ClipVision(TINY / "aesthetic"), load_head(TINY / "aesthetic" / "head.safetensors")
    count, ordered = 120, dict.fromkeys(DEGRADATIONS, 0)
    world = Sprites(frames=5)
    for bucket in world.buckets:
        clips = world.batch("heldout", range(count), bucket)
        rng = generator(Stream.DATA, 7, *bucket)
        frames = clips.video[torch.arange(count), :, torch.from_numpy(rng.integers(0, 5, count))]
        noise = torch.from_numpy(rng.standard_normal(frames.shape).astype("float32"))
        for kind in DEGRADATIONS:
            damaged = [degrade(frames, [kind] * count, torch.full((count,), u), noise) for u in (0.0, 0.3, 0.8)]
            clean, slight, much = (normalize(vision(images), dim=-1) @ w + b for images in damaged)
            ordered[kind] += int(((clean > slight) & (slight > much)).sum())
    shares = {kind: hits / (count * len(world.buckets)) for kind, hits in ordered.items()}
    assert min(shares.values()) >= 0.95, shares


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
