from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.clip import ClipBatch
from metrics.clip_vision import ClipVision
from rewards.aesthetic import Aesthetic, load_head
from rewards.base import Reward, RewardContext, RewardFailed, RewardTerm, latent_frames, per_latent_mean
from rewards.composite import Composite, metrics_of, normalize_in_groups
from rewards.motion import Motion
from rewards.smoothness import Smoothness
from tests.moving import asking, line, render
from tracking.ncc import NCC
from tracking.trackers import Truth
from tracking.weights import read_weights

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "aesthetic"
PATH = line((9.0, 10.0), (0.7, 0.5))


def motion(xy: Tensor, visible: Tensor | None = None, **settings: object) -> Motion:
    reward = Motion(**settings)  # type: ignore[arg-type]
    reward.prepare(RewardContext("cpu", Truth(xy, visible), Path("assets")))
    return reward


class TestMotion:
    @pytest.mark.parametrize(("profile", "expected"), [("paper", 4.98), ("train", 4.88), ("tight", 4.01)])
    def test_reference_values(self, profile: str, expected: float) -> None:
        """Ceiling 5, and the values of a 10 px diagonal error at 368x640."""
        size = (368, 640)
        path = line((100.0, 100.0), (3.0, 2.0), 5)
        off = torch.zeros(5, 2)
        off[1:] = 10 / math.sqrt(2)
        video = torch.zeros(1, 3, 5, *size)
        exact = motion(path[None, None], profile=profile).score(video, asking(path, size)).value
        wrong = motion((path + off)[None, None], profile=profile).score(video, asking(path, size)).value
        torch.testing.assert_close(exact, torch.tensor([[0.0, 5.0]]), atol=1e-4, rtol=0)
        assert wrong[0, 0] == 0 and abs(float(wrong[0, 1]) - expected) < 0.006

    def test_equals_a_slow_reference(self) -> None:
        g = torch.Generator().manual_seed(0)
        batch, tracks, frames, size = 3, 2, 13, (24, 40)
        asked = torch.rand(batch, tracks, frames, 2, generator=g) * 24
        found = asked + torch.randn(asked.shape, generator=g) * 4
        presence = torch.rand(asked.shape[:-1], generator=g) < 0.7
        presence[:, 0, 0] = True
        visible = torch.rand(presence.shape, generator=g) < 0.7
        control = asking(asked[0, 0], size)
        trajectory = replace(control.trajectory, xy=asked, presence=presence, intensity=presence.float())
        batch_ = ClipBatch(torch.zeros(batch, 3, frames, *size), trajectory, [""] * 3, presence, [""] * 3, [""] * 3)
        got = motion(found, visible, profile="train").score(batch_.video, batch_).value
        for b in range(batch):
            assert got[b, 0] == 0
            for m in range(1, 4):
                scores = []
                for t in range(4 * m - 3, 4 * m + 1):
                    for k in range(tracks):
                        if presence[b, k, t] and presence[b, k, 0]:
                            d = (found[b, k, t] - asked[b, k, t]) / torch.tensor([39.0, 23.0])
                            scores.append(max(0.0, 250 * (0.02 - float(d @ d))) if visible[b, k, t] else 0.0)
                assert float(got[b, m]) == pytest.approx(sum(scores) / max(len(scores), 1), abs=1e-4)

    def test_what_is_not_asked_does_not_count_and_what_is_invisible_scores_zero(self) -> None:
        video, control = torch.zeros(1, 3, 17, 32, 32), asking(PATH)
        half = control.trajectory.presence.clone()
        half[..., 9:] = False
        asked_half = replace(control, trajectory=replace(control.trajectory, presence=half))
        value = motion(PATH[None, None]).score(video, asked_half).value[0]
        torch.testing.assert_close(value, torch.tensor([0.0, 5, 5, 0, 0]), atol=1e-4, rtol=0)
        value = motion(PATH[None, None], half).score(video, control).value[0]
        torch.testing.assert_close(value, torch.tensor([0.0, 5, 5, 0, 0]), atol=1e-4, rtol=0)

    def test_metrics_are_what_they_say(self) -> None:
        video, control = torch.zeros(1, 3, 17, 32, 32), asking(PATH)
        off = PATH + torch.tensor([3.0, 4.0]) * (torch.arange(17) >= 9)[:, None]
        visible = torch.ones(1, 1, 17, dtype=torch.bool)
        visible[..., 15:] = False
        metrics = motion(off[None, None], visible, profile="train").score(video, control).metrics
        assert metrics["visible"] == pytest.approx(14 / 16)
        assert metrics["error_px"] == pytest.approx(5 * 6 / 14)
        assert metrics["clipped"] == pytest.approx(6 / 14)  # (5 / 31)^2 = 0.026 > alpha = 0.02
        still = PATH[:1].expand(17, 2)
        static = motion(still[None, None]).score(video, control)
        assert static.metrics["static"] == pytest.approx(float(static.value.mean()), abs=1e-4), "as the term is logged"

    def test_non_finite_video_is_invalid_not_zero(self) -> None:
        control = asking(PATH).repeat(2)
        video = torch.zeros(2, 3, 17, 32, 32)
        video[1, 0, 3, 4, 5] = float("nan")
        term = motion(PATH[None, None].repeat(2, 1, 1, 1)).score(video, control)
        assert term.valid[0].all() and not term.valid[1].any() and term.value.isfinite().all()

    @pytest.mark.parametrize("agreement", ["median", "mean"])
    def test_support_points_of_a_translation_agree_with_the_point(self, agreement: str) -> None:
        video, control = render(PATH)[None], asking(PATH, video=render(PATH))
        alone, supported = Motion(), Motion(support=4, agreement=agreement)
        for reward in (alone, supported):
            reward.prepare(RewardContext("cpu", NCC(), Path("assets")))
        a, b = alone.score(video, control), supported.score(video, control)
        assert (a.value - b.value).abs().max() < 0.2
        assert b.metrics["error_px"] < 0.3

    def test_median_support_outvotes_one_wrong_point_and_the_mean_does_not(self) -> None:
        video, control = torch.zeros(1, 3, 17, 32, 32), asking(PATH)
        shift = (PATH - PATH[0])[None, None].repeat(1, 5, 1, 1)
        ring = torch.tensor([[0, 0], [1.5, 0], [0, 1.5], [-1.5, 0], [0, -1.5]])
        xy = PATH[0] + ring[None, :, None] + shift
        xy[:, 2, 1:] += 10
        median = motion(xy, support=4).score(video, control).metrics["error_px"]
        mean = motion(xy, support=4, agreement="mean").score(video, control).metrics["error_px"]
        assert median == pytest.approx(0, abs=1e-4)
        assert mean == pytest.approx(2 * math.sqrt(2), abs=1e-4)


@pytest.mark.parametrize("name", ["garbage.pth", "garbage.safetensors", "tensor.pth", "code.pth"])
def test_what_holds_no_weights_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.startswith("garbage"):
        path.write_bytes(b"\x80not weights" * 9)
    else:
        torch.save(torch.zeros(3) if name == "tensor.pth" else {"run": Path}, path)
    with pytest.raises(ValueError, match=r"holds no (weights|tensors by name)") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


def tiny_clip(folder: Path, width: int = 768) -> Path:
    """A random CLIP tower with the projection width of ViT-L/14, so that it takes the real head."""
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=width,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    weight = torch.linspace(-1, 1, width)[None]
    save_file({"weight": weight, "bias": torch.tensor([5.0])}, folder / "head.safetensors")
    return folder


class TestAesthetic:
    def scorer(self, assets: Path, **settings: object) -> Aesthetic:
        tiny_clip(assets / "aesthetic")
        reward = Aesthetic(**settings)  # type: ignore[arg-type]
        reward.prepare(RewardContext("cpu", NCC(), assets))
        return reward

    @pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
    @pytest.mark.parametrize(
        ("file", "sha256", "expected"),
        [
            (
                "sac+logos+ava1-l14-linearMSE.pth",
                "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                [1.655, 2.359, 3.070, 3.672, 4.238, 4.701, 5.073, 5.365, 5.577, 5.747],
            ),
            (
                "sa_0_4_vit_l_14_linear.pth",
                "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
                [-2.458, -0.138, 1.895, 3.585, 5.100, 6.470, 7.787, 9.048, 10.226, 11.304],
            ),
        ],
    )
    def test_published_heads(self, tmp_path: Path, file: str, sha256: str, expected: list[float]) -> None:
        w, b = load_head(DATA / file, sha256)
        embeddings = torch.from_numpy(np.stack([np.load(DATA / f"vit_l_14_rating{i}.npy").ravel() for i in range(10)]))
        scores = torch.nn.functional.normalize(embeddings.float(), dim=-1) @ w + b
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-3, rtol=0)
        # As a reward: a tower of the width of ViT-L/14 under the real head, raw and cut to LAION's range.
        tiny_clip(tmp_path / "aesthetic")
        video = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        embedded = torch.nn.functional.normalize(
            ClipVision(tmp_path / "aesthetic")(video[0, :, ::4].transpose(0, 1)), dim=-1
        )
        for clamp in (False, True):
            reward = Aesthetic(head=str(DATA / file), sha256=sha256, clamp=clamp)
            reward.prepare(RewardContext("cpu", NCC(), tmp_path))
            raw = embedded @ w + b
            wanted = raw.clamp(1, 10) if clamp else raw
            torch.testing.assert_close(reward.score(video, asking(PATH)).value[0], wanted, atol=1e-4, rtol=0)
        if "linearMSE" in file:
            assert float(w.norm()) == pytest.approx(17.9956, abs=1e-3) and b == pytest.approx(5.23665, abs=1e-4)

    @pytest.mark.parametrize("frames", [1, 3, 4])
    def test_scores_the_last_frames_of_each_latent_frame(self, tmp_path: Path, frames: int) -> None:
        reward = self.scorer(tmp_path, frames=frames)
        video = torch.rand(2, 3, 9, 24, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        value = reward.score(video, asking(PATH).repeat(2)).value
        vision = ClipVision(tmp_path / "aesthetic")
        w, b = load_head(tmp_path / "aesthetic" / "head.safetensors")
        for m, picks in enumerate([[0], list(range(5 - frames, 5)), list(range(9 - frames, 9))]):
            e = torch.stack([vision(video[:, :, t]) for t in picks], 1)
            expected = ((e / e.norm(dim=-1, keepdim=True)) @ w + b).mean(1)
            torch.testing.assert_close(value[:, m], expected, atol=1e-4, rtol=0)

    def test_preprocessing_equals_transformers(self, tmp_path: Path) -> None:
        from transformers import CLIPImageProcessorPil

        vision = ClipVision(tiny_clip(tmp_path))
        rng = np.random.default_rng(0)
        smooth = torch.from_numpy(rng.uniform(0, 255, (1, 3, 6, 8)).astype(np.float32))
        image = torch.nn.functional.interpolate(smooth, size=(48, 64), mode="bicubic").clamp(0, 255).round()
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        expected = processor(image[0].permute(1, 2, 0).byte().numpy(), return_tensors="pt").pixel_values
        assert (vision.pixels(image / 127.5 - 1) - expected).abs().max() < 0.03  # theirs rounds to 8 bits

    def test_clamp_and_invalid_samples(self, tmp_path: Path) -> None:
        raw, clamped = self.scorer(tmp_path / "a"), self.scorer(tmp_path / "b", clamp=True)
        for reward in (raw, clamped):
            vision, w, _ = reward._scorer  # type: ignore[attr-defined]
            object.__setattr__(reward, "_scorer", (vision, w, 100.0))
        video = torch.zeros(2, 3, 5, 16, 16)
        video[1, :, 2] = float("inf")
        a, b = raw.score(video, asking(PATH).repeat(2)), clamped.score(video, asking(PATH).repeat(2))
        assert (a.value[0] > 10).all() and (b.value[0] == 10).all()
        assert a.valid.tolist() == [[True, True], [False, False]]

    def test_bad_files_are_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            Aesthetic().prepare(RewardContext("cpu", NCC(), tmp_path))
        folder = tiny_clip(tmp_path / "aesthetic", width=32)
        with pytest.raises(ValueError, match="SHA-256"):
            load_head(folder / "head.safetensors", "0" * 64)
        torch.save({"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}, tmp_path / "bad.pth")
        with pytest.raises(ValueError, match="not an aesthetic head"):
            load_head(tmp_path / "bad.pth")
        others = {"no bias": {"weight": torch.zeros(1, 5)}, "flat": {"weight": torch.zeros(5), "bias": torch.zeros(1)}}
        for name, layers in others.items():
            torch.save(layers, tmp_path / f"{name}.pth")
            with pytest.raises(ValueError, match="not an aesthetic head"):
                load_head(tmp_path / f"{name}.pth")
        torch.save({"weight": torch.zeros(1, 5), "bias": torch.zeros(1)}, tmp_path / "narrow.pth")
        with pytest.raises(ValueError, match="5 dimensions"):
            Aesthetic(head=str(tmp_path / "narrow.pth")).prepare(RewardContext("cpu", NCC(), tmp_path))


class TestSmoothness:
    def test_static_and_linear_change_score_one_and_a_flash_does_not(self) -> None:
        control = asking(PATH)
        ramp = torch.linspace(-1, 1, 17)[None, None, :, None, None].expand(1, 3, 17, 32, 32)
        for video in (torch.zeros(1, 3, 17, 32, 32), ramp):
            value = Smoothness().score(video, control).value
            torch.testing.assert_close(value, torch.tensor([[0.0, 1, 1, 1, 1]]), atol=1e-6, rtol=0)
        flash = torch.zeros(1, 3, 17, 32, 32)
        flash[:, :, 10] = 1.0  # judged at t = 10, 11, 12: differences 1/4, 1/2, 1/4 of the range [0, 1]
        value = Smoothness().score(flash, control).value
        torch.testing.assert_close(value, torch.tensor([[0.0, 1, 1, 0.75, 1]]), atol=1e-6, rtol=0)


@dataclass(frozen=True)
class Given:
    """A reward that returns what it is told."""

    value: Tensor
    weight: float = 1.0
    valid: Tensor | None = None
    fails: bool = False

    def prepare(self, context: RewardContext) -> None:
        pass

    def score(self, video: Tensor, batch: ClipBatch) -> RewardTerm:
        if self.fails:
            raise RewardFailed("server is down")
        valid = torch.ones_like(self.value, dtype=torch.bool) if self.valid is None else self.valid
        return RewardTerm(self.value, valid, {"extra": 3.0})


VIDEO = torch.zeros(4, 3, 5, 8, 8)
BATCH = asking(line((1.0, 1.0), (0.1, 0.1), 5), (8, 8)).repeat(4)


class TestComposite:
    a = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 9]])
    b = torch.tensor([[10.0, -2], [30, 4], [0, 6], [7, 0]])

    def test_weighted_sum_keeps_raw_terms(self) -> None:
        out = Composite({"a": Given(self.a, 2.0), "b": Given(self.b, -0.5)}).score(VIDEO, BATCH)
        assert out.batch_size == torch.Size([4])
        torch.testing.assert_close(out["reward"], 2 * self.a - 0.5 * self.b)
        assert torch.equal(out["reward_terms", "a"], self.a) and torch.equal(out["reward_terms", "b"], self.b)
        assert out["valid"].all()

    def test_normalize_then_sum_ignores_the_scale_of_a_term(self) -> None:
        plain = Composite({"a": Given(self.a), "b": Given(self.b)}, combine="normalize_then_sum", epsilon=1e-8)
        scaled = Composite(
            {"a": Given(self.a), "b": Given(1000 * self.b + 7)}, combine="normalize_then_sum", epsilon=1e-8
        )
        x, y = plain.score(VIDEO, BATCH, group=2)["reward"], scaled.score(VIDEO, BATCH, group=2)["reward"]
        torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
        torch.testing.assert_close(x[:2], torch.tensor([[-2.0, -2], [2, 2]]), atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="divides 4 samples, got 3"):
            plain.score(VIDEO, BATCH, group=3)

    def test_normalization_leaves_out_invalid_samples(self) -> None:
        valid = torch.tensor([[True], [True], [False]])
        out = normalize_in_groups(torch.tensor([[1.0], [3.0], [99.0]]), valid, 3, 1e-8)
        torch.testing.assert_close(out[:2], torch.tensor([[-1.0], [1.0]]), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_is_invalid(self, bad: float) -> None:
        broken = self.b.clone()
        broken[2, 1] = bad
        out = Composite({"a": Given(self.a), "b": Given(broken)}).score(VIDEO, BATCH)
        assert out["valid"].logical_not().nonzero().tolist() == [[2, 1]]
        assert out["reward"].isfinite().all()
        with pytest.raises(RewardFailed, match="b is invalid for 1 of 4"):
            Composite({"a": Given(self.a), "b": Given(broken)}, on_failure="stop").score(VIDEO, BATCH)

    def test_beyond_the_range_of_float32_is_not_finite(self) -> None:
        wide = self.b.double()
        wide[2, 1] = 1e300
        out = Composite({"a": Given(self.a), "b": Given(wide)}).score(VIDEO, BATCH)
        assert out["valid"].logical_not().nonzero().tolist() == [[2, 1]] and out["reward"].isfinite().all()

    def test_failed_term_invalidates_the_batch_or_stops(self) -> None:
        terms: dict[str, Reward] = {"a": Given(self.a), "b": Given(self.b, fails=True)}
        assert not Composite(terms).score(VIDEO, BATCH)["valid"].any()
        with pytest.raises(RewardFailed, match="server is down"):
            Composite(terms, on_failure="stop").score(VIDEO, BATCH)

    def test_metrics(self) -> None:
        reward = Composite({"a": Given(self.a, 3.0)})
        assert metrics_of(reward.evaluate(VIDEO, BATCH)) == {"a": float(self.a.mean()), "a/extra": 3.0, "a/failed": 0.0}


@pytest.mark.parametrize("cls", [Motion, Aesthetic, Smoothness])
@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_finite(cls: type, weight: float) -> None:
    with pytest.raises(ValueError, match="weight must be finite"):
        cls(weight=weight)
    with pytest.raises(ValueError, match=r"b\.weight must be finite"):
        Composite({"b": Given(torch.zeros(1, 1), weight)})


@pytest.mark.parametrize(
    "settings",
    [{"profile": "loose"}, {"alpha": -1.0}, {"scale": float("inf")}, {"support": -1}, {"agreement": "mode"}],
)
def test_bad_motion_settings_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"reward.motion.{next(iter(settings))} must"):
        Motion(**settings)  # type: ignore[arg-type]


def test_latent_frames() -> None:
    assert [latent_frames(t) for t in (1, 5, 33)] == [1, 2, 9]
    with pytest.raises(ValueError, match="got 8"):
        latent_frames(8)
    value = torch.arange(9.0)[None, None]
    mean = per_latent_mean(value, torch.ones(1, 1, 9, dtype=torch.bool))
    assert mean.tolist() == [[0.0, 2.5, 6.5]]
