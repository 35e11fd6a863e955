"""The supervised stages: their losses by hand, and each stage end to end at the smallest size."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from algorithms.distillation.noise import noised
from algorithms.distillation.pool import LatentPool, encode_pool
from algorithms.distillation.settings import (
    DMD,
    ConsistencyStage,
    Distill,
    FineTune,
    ODEStage,
    OwnHistoryStage,
    TeacherForcingStage,
)
from algorithms.pretraining import towers, vae
from algorithms.pretraining.chain import Chain, Recipe, Studying, Teaching
from algorithms.pretraining.loop import Fit, learning_rate, optimise
from algorithms.pretraining.transformer import Shape
from data.pool import ClipPool
from data.sprites import Sprites, vocabulary
from metrics.clip_vision import ClipVision
from policies.ema import EMA
from rewards.aesthetic import load_head
from runtime.models import Pretrained
from runtime.networks import Networks

WORLD = Sprites(frames=5, sizes=["16x16", "16x24"], max_sprites=2)
VAE = vae.VAEStage(base_dim=4, dim_mult=[1, 1, 2], z_dim=4, steps=2, batch=4, long_from=0.5, pool=4)
TOWERS = towers.TowerStage(width=16, layers=2, projection=8, steps=2, batch=4, pool=4)
SHAPE = Shape(dim=32, heads=2, layers=1, ffn=32)


def distillation(**changes: Any) -> Distill:
    """Settings of the smallest distillation."""
    plain: dict[str, Any] = {
        "teacher_forcing": TeacherForcingStage(batch=2),
        "own_history": OwnHistoryStage(batch=2),
        "ode": ODEStage(batch=2),
        "consistency": ConsistencyStage(batch=2),
        "dmd": DMD(batch=2, layers=[0], generator_every=1),
    }
    return Distill(teacher="teacher", pool=3, **plain | changes)


RECIPE = Recipe(
    vae=VAE,
    towers=TOWERS,
    initial=Teaching(FineTune(fresh=True, control=False, batch=2, pool=3), 2, shape=SHAPE),
    teacher=Teaching(FineTune(batch=2, pool=3), 2),
    few_step=Studying(distillation(teacher_forcing=TeacherForcingStage(steps=2, batch=2)), 2),
    student=Studying(distillation(own_history=OwnHistoryStage(steps=2, batch=2), match=False, track_noise=2.0), 0),
)


def silent(line: str) -> None:
    """Report to nobody."""


# The loop.


def test_learning_rate_warms_up_and_decays_to_two_percent() -> None:
    fit = Fit(steps=1000, lr=2.0)
    assert learning_rate(fit, 0) == pytest.approx(0.02)
    assert learning_rate(fit, 49) == pytest.approx(1.0, rel=0.01)
    assert learning_rate(fit, 500) == pytest.approx(2 * (0.02 + 0.98 / 2))
    assert learning_rate(fit, 999) == pytest.approx(0.04, rel=0.01)
    rates = [learning_rate(fit, step) for step in range(1000)]
    assert rates[:90] == sorted(set(rates[:90])), "rising"
    assert rates[100:] == sorted(set(rates[100:]), reverse=True), "falling"


def test_optimise_minimises_and_reports() -> None:
    weight = nn.Parameter(torch.tensor([3.0, -2.0]))
    lines: list[str] = []
    seen: list[Tensor] = []

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        seen.append(weight.detach().clone())
        return (weight - 1).square().sum(), {"step": step}

    optimise([weight], Fit(300, 0.1, weight_decay=0.0), loss_of, "square", lines.append)
    torch.testing.assert_close(weight.detach(), torch.ones(2), atol=0.02, rtol=0)
    assert len(seen) == 300
    first = (seen[1] - seen[0]).abs()
    torch.testing.assert_close(first, torch.full((2,), learning_rate(Fit(300, 0.1), 0)), atol=1e-6, rtol=0)
    assert [line.split(" loss")[0] for line in lines] == [f"square {n}/300" for n in (0, 100, 200, 299)]
    assert "loss 13.0000 step 0.0000" in lines[0]


@pytest.mark.parametrize("muon", [False, True])
def test_an_interrupted_stage_ends_with_the_same_weights(muon: bool, tmp_path: Path) -> None:
    def train(stop: int | None, state: Path | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = nn.Linear(4, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(random(*parameter.shape))
        ema = EMA(model, 0.99)

        def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
            if step == stop:
                raise KeyboardInterrupt
            return (model(random(8, 4, seed=step)) - 1).square().mean(), {}

        matrices = [model.weight] if muon else []
        optimise(model.parameters(), Fit(1100, 0.01), loss_of, "line", silent, ema, matrices, state)
        return dict(model.state_dict()), ema.state_dict()

    whole = train(None, None)
    with pytest.raises(KeyboardInterrupt):
        train(777, tmp_path / "state.pt")
    parts = train(None, tmp_path / "state.pt")
    for ours, theirs in zip(whole, parts, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_pool() -> LatentPool:
    return LatentPool(random(8, 3, 2, 4, 4), random(8, 3, 2, 4, 4, seed=1), random(8, 5, 6, seed=2), 8)


def test_noised_by_hand() -> None:
    x0, eps = torch.full((1, 2, 1, 1, 1), 2.0), torch.full((1, 2, 1, 1, 1), -1.0)
    sigma = torch.tensor([[0.25, 1.0]])
    assert noised(x0, eps, sigma).flatten().tolist() == [1.25, -1.0]
    # x0 = x - sigma v.
    x = noised(x0, eps, sigma)
    torch.testing.assert_close(x - sigma[..., None, None, None] * (eps - x0), x0)


def test_latent_pool_draws_by_key() -> None:
    pool = latent_pool()
    latents, condition, text = pool.sample((0, 2, 5), 4)
    again = pool.sample((0, 2, 5), 4)
    assert torch.equal(again[0], latents) and torch.equal(again[1], condition)
    assert not torch.equal(pool.sample((0, 2, 6), 4)[0], latents)
    rows = [int((pool.latents == latent).flatten(1).all(1).nonzero()) for latent in latents]
    assert len(set(rows)) == 4 and torch.equal(text, pool.text[rows])
    assert torch.equal(condition[:, 0, 4:6], latents[:, 0]), "the reference is the clip's own first frame"
    assert torch.equal(condition[:, :, 6:], pool.control[rows])
    noise = condition[:, 1:, 4:6]
    assert (noise - latents[:, 1:]).abs().amax((1, 2, 3, 4)).min() > 0.1 and 0.5 < noise.std() < 1.5


# The VAE.


def test_vae_loss_by_hand() -> None:
    video, zero = random(2, 3, 5, 4, 4), torch.zeros(2, 4, 2, 1, 1)
    assert float(vae.vae_loss(video, video, zero, zero, 1.0)) == 0
    # A constant error has no difference term; one edge missed in a row of two costs |1| + 1 there as well.
    assert float(vae.vae_loss(video, video + 0.5, zero, zero, 1.0)) == pytest.approx(0.5 + 0.25, abs=1e-5)
    flat, edge = torch.zeros(1, 1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 1, 2)
    assert float(vae.vae_loss(flat, edge, zero, zero, 1.0)) == pytest.approx(0.5 + 0.5 + 0.5 * 2)
    normal = torch.distributions.Normal(torch.tensor(0.7), torch.tensor(0.3).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    found = vae.vae_loss(video, video, zero + 0.7, zero + 2 * 0.3, 0.01)
    assert float(found) == pytest.approx(0.01 * float(kl), rel=1e-5)


def test_unclamped_decoding_is_decoding_before_the_clamp() -> None:
    model = vae.build_vae(VAE)
    with torch.no_grad():
        z = 3 * random(1, 4, 3, 4, 4)
        frames, free = model.decode(z).sample, vae.decode_unclamped(model, z)
        torch.testing.assert_close(free.clamp(-1, 1), frames, atol=1e-6, rtol=0)
        model.decoder.conv_out.bias.add_(2)
        assert vae.decode_unclamped(model, z).max() > 1


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_training_windows_are_of_clips_or_of_heatmaps(share: float) -> None:
    pools = [ClipPool(Sprites(frames=9, sizes=["16x16"]), (16, 16), range(4))]
    stage = vae.VAEStage(heatmap_share=share)
    windows = vae.training_clips(pools, stage, 3, 4, 5)
    assert windows.shape == (4, 3, 5, 16, 16)
    assert torch.equal(windows, vae.training_clips(pools, stage, 3, 4, 5))
    videos = pools[0].batch(range(4)).video.unfold(2, 5, 1).movedim(-1, 3).movedim(2, 1).flatten(0, 1)
    found = [bool((videos == window).flatten(1).all(1).any()) for window in windows]
    assert found == [share == 0.0] * 4
    # In a heatmap the third plane says whether a position is asked for: the same at every pixel.
    flat = (windows[:, 2].flatten(2).std(-1) == 0).all(1)
    assert flat.tolist() == [share == 1.0] * 4


# The towers.


@pytest.mark.parametrize("kind", towers.DEGRADATIONS)
def test_damage_grows_with_severity(kind: str) -> None:
    images = WORLD.batch("train", range(6), (16, 24)).video[:, :, 0]
    noise = random(*images.shape)

    def error(severity: float) -> Tensor:
        damaged = towers.degrade(images, [kind] * 6, torch.full((6,), severity), noise)
        assert damaged.min() >= -1 and damaged.max() <= 1
        return (damaged - images).abs().mean((1, 2, 3))

    assert error(0.0).max() == 0
    errors = torch.stack([error(severity) for severity in (0.0, 0.25, 0.5, 0.75, 1.0)])
    assert (errors.diff(dim=0) > 0).all()
    assert errors[-1].min() > 0.02


def test_each_image_gets_its_own_damage() -> None:
    images = WORLD.batch("train", range(5), (16, 16)).video[:, :, 0]
    noise, severity = random(*images.shape), torch.linspace(0.2, 1, 5)
    mixed = towers.degrade(images, list(towers.DEGRADATIONS), severity, noise)
    for i, kind in enumerate(towers.DEGRADATIONS):
        assert torch.equal(mixed[i], towers.degrade(images, [kind] * 5, severity, noise)[i])


def test_clip_loss_is_least_for_matched_pairs() -> None:
    pairs, temperature = torch.eye(4), torch.tensor(2.0)
    scale = math.exp(2.0)
    matched = towers.clip_loss(pairs, pairs, temperature)
    assert float(matched) == pytest.approx(-math.log(math.exp(scale) / (math.exp(scale) + 3)), rel=1e-3)
    for shift in (1, 2, 3):
        assert towers.clip_loss(pairs, pairs.roll(shift, 0), temperature) > matched + 1
    assert float(towers.clip_loss(torch.ones(4, 1), torch.ones(4, 1), temperature)) == pytest.approx(math.log(4))
    huge = towers.clip_loss(pairs, pairs.roll(1, 0), torch.tensor(50.0))
    assert float(huge) == pytest.approx(100.0), "the temperature is capped"


def test_tokenizer_round_trip() -> None:
    tokenizer = towers.build_tokenizer(vocabulary())
    prompt = "a striped red disc moves up and left over sand"
    ids = tokenizer(prompt).input_ids
    assert tokenizer.decode(ids) == f"{prompt} </s>" and len(ids) == len(prompt.split()) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt
    assert tokenizer("A Striped RED disc moves up and left over sand").input_ids == ids
    odd = tokenizer.decode(tokenizer("a zebra moves").input_ids)
    assert odd == "a <unk> moves </s>"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == len(vocabulary()) + 3


# End to end.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole chain, two steps a stage; nothing may touch torch's global generator."""
    out = tmp_path_factory.mktemp("tiny")
    before = torch.get_rng_state()
    Chain(WORLD, out, silent, RECIPE).run()
    assert torch.equal(torch.get_rng_state(), before)
    return out


@pytest.fixture(scope="module")
def networks(folder: Path) -> Networks:
    return Pretrained(path=str(folder)).load("cpu")


def test_the_folder_loads(folder: Path, networks: Networks) -> None:
    assert networks.video.channels == 4 and networks.video.stride == 4
    prompts = ["a striped red disc moves up over sand", "a zebra"]
    text = networks.text.encode(prompts)
    assert text.shape == (2, Pretrained("").text_length, TOWERS.width) and text.isfinite().all()
    tokenizer = towers.build_tokenizer(vocabulary())
    assert networks.text.tokenizer(prompts).input_ids == tokenizer(prompts).input_ids
    vision = ClipVision(folder / "aesthetic")
    assert (vision.width, vision.mean.flatten().tolist()) == (TOWERS.projection, [0.5] * 3)
    weight, bias = load_head(folder / "aesthetic" / "head.safetensors")
    middle = (towers.CLEAN_SCORE + towers.WORST_SCORE) / 2
    assert weight.shape == (TOWERS.projection,) and bias == pytest.approx(middle, abs=0.01)


def test_latents_are_normalised(networks: Networks) -> None:
    clips = WORLD.batch("train", range(10**6, 10**6 + 96), WORLD.buckets[0])
    latents = networks.video.encode(clips.video).transpose(0, 2).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-2, rtol=0)


def test_training_and_acting_condition_alike(networks: Networks) -> None:
    """What a rollout is conditioned on is what the network was trained on, but for the noise."""
    bucket = WORLD.buckets[1]
    pool = encode_pool(WORLD, networks.video, networks.text, bucket, 3, first=2)
    clips = ClipPool(WORLD, bucket, range(2, 5)).batch(range(3))
    acting = networks.condition(clips, [(0, 0, p) for p in range(3)], "cpu")
    latents, training, text = pool.sample((0, 1), 3)
    order = [int((pool.latents == latent).flatten(1).all(1).nonzero()) for latent in latents]
    acting = acting[order]
    assert training.shape == acting.shape == (3, 2, networks.transformer.config.in_channels - 4, 4, 6)
    kept = torch.ones_like(acting, dtype=torch.bool)
    kept[:, 1:, 4:8] = False  # noise in place of the reference
    torch.testing.assert_close(training[kept], acting[kept], atol=1e-4, rtol=0)
    torch.testing.assert_close(text, networks.text.encode([clips.prompts[i] for i in order]), atol=1e-5, rtol=0)


def test_noise_of_the_tracks_is_in_the_control_alone(networks: Networks) -> None:
    bucket = WORLD.buckets[0]
    exact, noisy, again = (
        encode_pool(WORLD, networks.video, networks.text, bucket, 3, track_noise=std) for std in (0.0, 3.0, 3.0)
    )
    assert torch.equal(exact.latents, noisy.latents) and torch.equal(exact.text, noisy.text)
    assert (exact.control - noisy.control).abs().max() > 1e-2
    assert torch.equal(noisy.control, again.control)


def test_the_recipe_is_noted_and_nothing_is_trained_twice(folder: Path) -> None:
    noted = json.loads((folder / "recipe.json").read_text())
    assert {name: note["settings"] for name, note in noted.items()} == {
        name: json.loads(json.dumps(asdict(stage))) for name, stage in RECIPE.stages().items()
    }
    lines: list[str] = []
    Chain(WORLD, folder, lines.append, RECIPE).run()
    assert [line.split(":")[0] for line in lines] == list(noted) and all("found" in line for line in lines)
    other = replace(RECIPE, vae=replace(RECIPE.vae, seed=9))
    with pytest.raises(ValueError, match="vae was made with other settings than vae has now"):
        Chain(WORLD, folder, lines.append, other).run()


def test_the_initial_model_ignores_the_drag_and_the_student_is_made_from_it(folder: Path) -> None:
    channels = 4
    control = {
        name: load_file(next((folder / name).glob("*.safetensors")))["patch_embedding.weight"][:, -channels:].any()
        for name in ("initial", "teacher", "few_step", "transformer")
    }
    assert control == {"initial": False, "teacher": True, "few_step": True, "transformer": True}
    assert not json.loads((folder / "transformer" / "config.json").read_text())["_name_or_path"]


@pytest.mark.parametrize("lost", [["vae"], ["aesthetic"], ["few_step", "transformer"]])
def test_what_is_lost_is_trained_again_the_same(lost: list[str], folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for part in lost:
        shutil.rmtree(again / part)
    Chain(WORLD, again, silent, RECIPE).run()
    for path in folder.rglob("*.safetensors"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes(), path.name
