"""The tiny decoder computes what its layout says, streams what it decodes, and is one setting of the full size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import live
from policies.stream import VideoStream
from policies.tiny_vae import WIDTHS, TinyDecoder
from runtime.wan import Wan
from runtime.wan_networks import _tiny

THIN, CHANNELS = (8, 6, 4, 5), 16


def released(widths: tuple[int, ...] = THIN) -> dict[str, Tensor]:
    """A checkpoint in the release's names, written down from its model code; the encoder stands for itself."""
    w0, w1, w2, w3 = widths
    shapes: dict[str, tuple[int, ...]] = {"decoder.1.weight": (w0, CHANNELS, 3, 3), "decoder.1.bias": (w0,)}
    for first, width, following, frames in ((3, w0, w1, 1), (9, w1, w2, 2), (15, w2, w3, 2)):
        for block in range(first, first + 3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"decoder.{block}.conv.{layer}.weight"] = (width, inputs, 3, 3)
                shapes[f"decoder.{block}.conv.{layer}.bias"] = (width,)
        shapes[f"decoder.{first + 4}.conv.weight"] = (width * frames, width, 1, 1)
        shapes[f"decoder.{first + 5}.weight"] = (following, width, 3, 3)
    shapes |= {"decoder.22.weight": (3, w3, 3, 3), "decoder.22.bias": (3,), "encoder.0.weight": (64, 3, 3, 3)}
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        fan = max(1, torch.Size(shape[1:]).numel())
        state[name] = torch.randn(shape, generator=draw) * (1.6 / fan) ** 0.5
    # Most pixels within [0, 1], where the clamp hides nothing.
    state["decoder.22.weight"] *= 0.05
    state["decoder.22.bias"] = torch.full((3,), 0.5)
    return state


def reference(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    """The release's layout, layer by layer over all frames of one clip: `[M, C, h, w]` to `[4 M - 3, 3, H, W]`."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    x = F.relu(conv((latents / 3).tanh() * 3, "decoder.1"))
    for first, frames in ((3, 1), (9, 2), (15, 2)):
        for block in range(first, first + 3):
            past = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            inner = F.relu(conv(torch.cat([x, past], 1), f"decoder.{block}.conv.0"))
            x = F.relu(conv(F.relu(conv(inner, f"decoder.{block}.conv.2")), f"decoder.{block}.conv.4") + x)
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = conv(x, f"decoder.{first + 4}.conv")
        x = x.reshape(len(x) * frames, -1, *x.shape[2:])
        x = conv(x, f"decoder.{first + 5}")
    return (conv(F.relu(x), "decoder.22").clamp(0, 1) * 2 - 1)[3:]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "taew2_1.safetensors"
    save_file(released(), path)
    return path


@pytest.fixture(scope="module")
def decoder(file: Path) -> TinyDecoder:
    return TinyDecoder.load(file)


@pytest.mark.parametrize("frames", [1, 5])
def test_it_computes_what_the_released_layout_says(decoder: TinyDecoder, frames: int) -> None:
    latents = normal(1, 2, frames, CHANNELS, 3, 4)
    expected = torch.stack([reference(released(), clip).transpose(0, 1) for clip in latents])
    assert expected.shape == (2, 3, 4 * frames - 3, 24, 32)
    inside = (expected.abs() < 1).float().mean()
    assert inside > 0.5 and expected.std() > 0.1  # a clamped picture would compare nothing
    torch.testing.assert_close(decoder.decode(latents), expected, atol=1e-5, rtol=0)


def test_a_stream_is_the_whole_clip_and_counts_as_the_full_vae_does(decoder: TinyDecoder) -> None:
    latents, stream = normal(1, 2, 5, CHANNELS, 3, 4), decoder.decode_stream()
    pieces = [stream(latent) for latent in latents.unbind(1)]
    assert [piece.shape for piece in pieces] == [(2, 3, 1, 24, 32), *[(2, 3, 4, 24, 32)] * 4]
    assert all(piece.min() >= -1 and piece.max() <= 1 for piece in pieces)
    torch.testing.assert_close(torch.cat(pieces, 2), decoder.decode(latents), atol=1e-5, rtol=0)
    forgetful = torch.cat([decoder.decode_stream()(latent) for latent in latents.unbind(1)], 2)
    assert (forgetful[:, :, -1] - pieces[-1][:, :, -1]).abs().max() > 1e-2


def test_a_frame_never_sees_a_later_one(decoder: TinyDecoder) -> None:
    latents = normal(1, 1, 5, CHANNELS, 3, 4)
    other = latents.clone()
    other[:, 3:] = normal(2, 1, 2, CHANNELS, 3, 4)
    before, after = decoder.decode(latents), decoder.decode(other)
    torch.testing.assert_close(before[:, :, :9], after[:, :, :9], atol=1e-6, rtol=0)
    assert (before[:, :, 9] - after[:, :, 9]).abs().max() > 1e-2


def test_a_clone_goes_back_to_its_point_any_number_of_times(decoder: TinyDecoder) -> None:
    first, one, two = normal(3, 3, 1, CHANNELS, 3, 4)
    stream = decoder.decode_stream()
    stream(first)
    kept = stream.clone()
    straight = stream(one), stream(two)
    kept.clone()(two)
    again = kept.clone()
    assert torch.equal(again(one), straight[0]) and torch.equal(again(two), straight[1])


def test_what_is_remembered_is_one_frame_a_block(decoder: TinyDecoder) -> None:
    stream = decoder.decode_stream()
    sizes = []
    for seed in range(3):
        stream(normal(seed, 1, CHANNELS, 3, 4))
        sizes.append([kept.untyped_storage().nbytes() for kept in stream._memory if kept is not None])
    areas = [12] * 3 + [48] * 3 + [192] * 3
    assert sizes == [[4 * area * THIN[i // 3] for i, area in enumerate(areas)]] * 3


def test_a_video_stream_takes_it_and_goes_back(decoder: TinyDecoder) -> None:
    codec: Any = SimpleNamespace(encode_stream=lambda: nn.Identity())
    video = VideoStream(SimpleNamespace(), codec, torch.zeros(1), decoder.decode_stream())  # type: ignore[arg-type]
    latents = normal(4, 1, 4, CHANNELS, 3, 4)
    frames = torch.cat([video.decode(part) for part in latents.split([1, 3], 1)], 2)
    torch.testing.assert_close(frames, decoder.decode(latents), atol=1e-5, rtol=0)


def test_the_full_width_is_the_released_one_and_random_weights_repeat() -> None:
    ours, theirs = TinyDecoder.random(torch.bfloat16).state_dict(), released(WIDTHS)
    del theirs["encoder.0.weight"]
    assert {name: value.shape for name, value in ours.items()} == {n: value.shape for n, value in theirs.items()}
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}
    again = TinyDecoder.random(torch.bfloat16).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in ours.items())


def test_other_weights_are_refused_to_the_last_name(tmp_path: Path) -> None:
    state = released()
    state["decoder.23.weight"] = state.pop("decoder.22.weight")
    del state["decoder.8.weight"]
    state["decoder.3.conv.2.bias"] = torch.zeros(9)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="do not fit the tiny VAE") as error:
        TinyDecoder.load(tmp_path / "other.safetensors")
    text = str(error.value)
    assert "missing (2): decoder.22.weight, decoder.8.weight" in text
    assert "unexpected (1): decoder.23.weight" in text and "decoder.3.conv.2.bias is (9,), not (8,)" in text


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save(released(), tmp_path / "taew2_1.safetensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        TinyDecoder.load(tmp_path / "taew2_1.safetensors")
    with pytest.raises(FileNotFoundError, match=r"one \.safetensors file"):
        TinyDecoder.load(tmp_path)


WAN = Wan("t2v", image_frames="none", architecture=replace(Wan("i2v").architecture, image_dim=0))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"tiny_vae": "taew2_1.pth"}, "not a .safetensors file"),
        ({"tiny_vae": "random"}, "model.random=false"),
        ({"tiny_vae": "x.safetensors", "random": True}, "model.random=true"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(WAN, **settings)


def test_a_missing_file_is_refused_before_anything_loads(tmp_path: Path) -> None:
    model = replace(WAN, path=str(tmp_path), tiny_vae=str(tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"model\.tiny_vae=.*none\.safetensors: no such file"):
        model.check()


def test_the_setting_loads_the_file_at_the_precision_of_the_vae(file: Path) -> None:
    assert _tiny(WAN, "cpu") is None
    loaded = _tiny(replace(WAN, tiny_vae=str(file), vae_precision="bfloat16"), "cpu")
    assert loaded is not None and loaded.decoder[1].weight.dtype is torch.bfloat16
    frames = loaded.decode(normal(1, 1, 2, CHANNELS, 3, 4))
    assert frames.dtype is torch.float32
    exact = TinyDecoder.load(file).decode(normal(1, 1, 2, CHANNELS, 3, 4))
    assert 0 < (frames - exact).abs().mean() < 0.02  # rounding, not other weights: pixels are 0.5 apart


@pytest.mark.parametrize("tiny", [None, object()])
def test_the_benchmark_gives_both_figures_where_there_are_two(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def note(*given: Any) -> list[Any]:
        asked.append(given[-1])
        return []

    for name in ("first_frame", "steady"):
        monkeypatch.setattr(live, name, note)
    session: Any = SimpleNamespace(episodes=SimpleNamespace(networks=SimpleNamespace(tiny=tiny)))
    titles = list(live.measure(session, 1))
    assert asked == [False, False] + [True, True] * (tiny is not None)
    assert [title.endswith("tiny VAE") for title in titles] == asked
