"""The supervised stages: their losses by hand, and each stage end to end at the smallest size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import AutoTokenizer

from algorithms.pretraining import flow, towers, vae
from algorithms.pretraining.loop import Fit, learning_rate, optimise
from data.pool import ClipPool
from data.sprites import Sprites, vocabulary
from metrics.clip_vision import ClipVision
from policies.codecs import VideoCodec
from policies.ema import EMA
from rewards.aesthetic import load_head
from runtime.models import Pretrained
from runtime.networks import Networks

WORLD = Sprites(frames=5, sizes=["16x16", "16x24"], max_sprites=2)
VAE = vae.VAEStage(base_dim=4, dim_mult=[1, 1, 2], z_dim=4, steps=2, batch=4, long_from=0.5, pool=4)
TOWERS = towers.TowerStage(width=16, layers=2, projection=8, steps=2, batch=4, pool=4)
FLOW = flow.FlowStage(dim=32, heads=2, layers=1, ffn=32, steps=2, batch=2, pool=3)
FEW_STEP = flow.FewStepStage(steps=2, batch=2)


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


# Flow matching.


class PointMass(nn.Module):
    """A flow model with one weight: the exact velocity of a point mass at `scale` times the true frame."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def parallel(self, clean: Tensor, noisy: Tensor, sigma: Tensor, text: Tensor, *, causality: Any) -> Tensor:
        x0, x = clean[:, :, :2], noisy[:, :, :2]
        return (x - self.scale * x0) / sigma[..., None, None, None]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_pool() -> flow.LatentPool:
    return flow.LatentPool(random(8, 3, 2, 4, 4), random(8, 3, 2, 4, 4, seed=1), random(8, 5, 6, seed=2))


def test_noised_by_hand() -> None:
    x0, eps = torch.full((1, 2, 1, 1, 1), 2.0), torch.full((1, 2, 1, 1, 1), -1.0)
    sigma = torch.tensor([[0.25, 1.0]])
    assert flow.noised(x0, eps, sigma).flatten().tolist() == [1.25, -1.0]
    # x0 = x - sigma v.
    x = flow.noised(x0, eps, sigma)
    torch.testing.assert_close(x - sigma[..., None, None, None] * (eps - x0), x0)


def test_flow_matching_finds_the_point_mass() -> None:
    model: Any = PointMass(0.8)
    trained: Any = flow.train_flow([latent_pool()], flow.FlowStage(steps=80, batch=4, lr=0.02, ema=0.0), model, silent)
    assert trained.scale.item() == pytest.approx(1.0, abs=0.03)


def test_few_step_student_learns_to_stay_on_the_clip_from_its_own_history() -> None:
    pool = latent_pool()
    model = flow.build_transformer(flow.FlowStage(dim=24, heads=2, layers=1, ffn=48), 2, 6)
    before = [p.detach().clone() for p in model.parameters()]
    drifts: list[float] = []
    stage = flow.FewStepStage(steps=201, batch=4, lr=1e-2, ema=0.0, own_history=1.0)

    def note(line: str) -> None:
        drifts.append(float(line.split("drift ")[1].split()[0]))

    student = flow.train_few_step([pool], stage, model, note)
    assert drifts[-1] < 0.5 * drifts[0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "the start stays as it is"
    condition = pool.sample((0, 4, 0), 4)[1]
    frames = [flow.own_frames(student, condition, pool.text[:4], stage.sigmas, 2, seed) for seed in (5, 5, 6)]
    assert torch.equal(frames[0], frames[1]) and not torch.equal(frames[0], frames[2])


def test_averaged_weights_are_returned_and_the_model_keeps_its_own() -> None:
    model: Any = PointMass(0.8)
    stage = flow.FlowStage(steps=30, batch=4, lr=0.02, ema=0.9)
    averaged: Any = flow.train_flow([latent_pool()], stage, model, silent)
    assert 0.8 < averaged.scale.item() < model.scale.item()


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
    assert pool.sample((0,), 4, text_dropout=1.0)[2].abs().max() == 0
    dropped = torch.cat([pool.sample((0, n), 8, text_dropout=0.3)[2].abs().sum((1, 2)) == 0 for n in range(50)])
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.08)


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
    """All stages, two steps each; nothing may touch torch's global generator."""
    out = tmp_path_factory.mktemp("tiny")
    before = torch.get_rng_state()
    vae.train_vae(WORLD, VAE, out / "vae", silent)
    towers.train_towers(WORLD, vocabulary(), TOWERS, out, "aesthetic", silent)
    video = VideoCodec(AutoencoderKLWan.from_pretrained(out / "vae"))
    partial = Pretrained(path=str(out))
    text = text_codec(out, partial.text_length)
    pools = [flow.encode_pool(WORLD, video, text, bucket, FLOW.pool) for bucket in WORLD.buckets]
    model = flow.build_transformer(FLOW, 4, TOWERS.width)
    teacher = flow.train_flow(pools, FLOW, model, silent)
    flow.train_few_step(pools, FEW_STEP, teacher, silent).save_pretrained(out / "transformer")
    assert torch.equal(torch.get_rng_state(), before)
    return out


def text_codec(out: Path, length: int) -> Any:
    from transformers import UMT5EncoderModel

    from policies.codecs import TextCodec

    encoder = UMT5EncoderModel.from_pretrained(out / "text_encoder")
    return TextCodec(AutoTokenizer.from_pretrained(out / "tokenizer"), encoder, length)


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
    pool = flow.encode_pool(WORLD, networks.video, networks.text, bucket, 3, first=2)
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
        flow.encode_pool(WORLD, networks.video, networks.text, bucket, 3, track_noise=std) for std in (0.0, 3.0, 3.0)
    )
    assert torch.equal(exact.latents, noisy.latents) and torch.equal(exact.text, noisy.text)
    assert (exact.control - noisy.control).abs().max() > 1e-2
    assert torch.equal(noisy.control, again.control)


def test_stages_are_functions_of_their_seed(folder: Path, tmp_path: Path) -> None:
    vae.train_vae(WORLD, VAE, tmp_path / "vae", silent)
    again = AutoencoderKLWan.from_pretrained(tmp_path / "vae").state_dict()
    first = AutoencoderKLWan.from_pretrained(folder / "vae").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    towers.train_towers(WORLD, vocabulary(), TOWERS, tmp_path, "aesthetic", silent)
    for name in (
        "aesthetic/model.safetensors",
        "aesthetic/head.safetensors",
        "text_encoder/model.safetensors",
    ):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
