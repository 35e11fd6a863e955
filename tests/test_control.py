"""Control heatmaps, conditions, and the video codec that carries both."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from algorithms.pretraining.towers import TowerStage, build_text, build_tokenizer
from algorithms.pretraining.vae import VAEStage, build_vae
from data.sprites import Sprites
from envs.control import MASK_CHANNELS, assemble_condition, heatmap, heatmap_width
from policies.codecs import TextCodec, VideoCodec, use_channels_last
from tracking.trajectory import Trajectory

HEIGHT, WIDTH = 16, 24


def tracks(points: list[list[tuple[float, float]]], intensity: float = 0.5) -> Trajectory:
    """One clip `[1, K, T]` of points given per track and frame."""
    xy = torch.tensor(points)[None]
    shape = xy.shape[:-1]
    force, presence = torch.full(shape, intensity), torch.ones(shape, dtype=torch.bool)
    return Trajectory(xy, force, presence, HEIGHT, WIDTH, 8.0)


def unit(video: Tensor) -> Tensor:
    return (video + 1) / 2


def test_heatmap_is_a_gaussian_whose_peak_is_the_touched_pixel() -> None:
    path = tracks([[(5.0, 3.0), (20.0, 11.0)]], intensity=1.0)
    drawn = heatmap(path, vae_stride=4)
    assert drawn.shape == (1, 3, 2, HEIGHT, WIDTH)
    assert drawn.min() >= -1 and drawn.max() <= 1
    touch = unit(drawn)[0, 1]
    width = heatmap_width(HEIGHT, WIDTH, 4)
    for frame, (x, y) in enumerate([(5, 3), (20, 11)]):
        assert int(touch[frame].argmax()) == y * WIDTH + x
        assert touch[frame, y, x] == 1
        assert touch[frame, y, x - 3] == pytest.approx(math.exp(-9 / (2 * width**2)), abs=1e-6)
        assert touch[frame, y + 2, x - 1] == pytest.approx(math.exp(-5 / (2 * width**2)), abs=1e-6)


def test_width_is_a_share_of_the_short_edge_with_a_floor() -> None:
    assert heatmap_width(480, 832, 8) == pytest.approx(11.52)
    assert heatmap_width(832, 480, 8) == heatmap_width(480, 832, 8)
    assert heatmap_width(32, 40, 4) == pytest.approx(2.4), "0.6 VAE strides"


def test_presence_keeps_no_touch_no_force_and_not_asked_apart() -> None:
    path = tracks([[(5.0, 5.0)] * 3])
    path.intensity[..., 1] = 0
    path.presence[..., 2] = False
    apart, paper = unit(heatmap(path, 4))[0], unit(heatmap(path, 4, "grayscale"))[0]
    red, green, blue = apart[:, 0]
    assert red[5, 5] == 0.5 and green[5, 5] == 1 and (blue == 1).all()
    assert red[15, 23] < 1e-6, "not touched there"
    red, green, blue = apart[:, 1]
    assert (red == 0).all() and green[5, 5] == 1 and (blue == 1).all(), "touched without force"
    assert (apart[:, 2] == 0).all(), "not asked for"
    assert torch.equal(paper[0], apart[0]) and torch.equal(paper[0], paper[1])
    assert torch.equal(paper[0], paper[2])
    assert torch.equal(paper[:, 1], paper[:, 2]), "the paper's plane cannot tell the last two"


def only(path: Trajectory, k: int) -> Trajectory:
    rows = slice(k, k + 1)
    return replace(path, xy=path.xy[:, rows], intensity=path.intensity[:, rows], presence=path.presence[:, rows])


def test_the_larger_touch_counts() -> None:
    both = tracks([[(5.0, 5.0)], [(7.0, 5.0)]])
    both.intensity[0, 1] = 1.0
    single = [only(both, k) for k in range(2)]
    joint = unit(heatmap(both, 4))
    expected = torch.maximum(*(unit(heatmap(path, 4)) for path in single))
    torch.testing.assert_close(joint, expected)
    assert joint[0, 0, 0, 5, 7] == 1


def test_an_absent_track_draws_nothing() -> None:
    one = tracks([[(5.0, 5.0), (6.0, 5.0)]])
    padded = tracks([[(5.0, 5.0), (6.0, 5.0)], [(0.0, 0.0), (0.0, 0.0)]])
    padded.presence[0, 1] = False
    for mode in ("presence", "grayscale"):
        assert torch.equal(heatmap(padded, 4, mode), heatmap(one, 4, mode))


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'colour'; choose one of presence, grayscale"):
        heatmap(tracks([[(1.0, 1.0)]]), 4, "colour")


def test_condition_layout() -> None:
    reference, control = torch.full((2, 3, 4, 5), 2.0), torch.full((2, 6, 3, 4, 5), 3.0)
    noise = torch.arange(6.0)[None, :, None, None, None].expand(2, 6, 3, 4, 5)
    condition = assemble_condition(reference, control, noise)
    assert condition.shape == (2, 6, MASK_CHANNELS + 6, 4, 5)
    mask, image, last = condition.split([MASK_CHANNELS, 3, 3], 2)
    assert (mask[:, 0] == 1).all() and (mask[:, 1:] == 0).all()
    assert torch.equal(image[:, 0], reference) and torch.equal(image[:, 1:], noise[:, 1:])
    assert torch.equal(last, control)


@pytest.fixture(scope="module")
def codec() -> Iterator[VideoCodec]:
    """A VAE as it is before training, whose latents have a mean and a spread of their own."""
    vae = build_vae(VAEStage())
    spread = torch.linspace(0.5, 2.0, 8).tolist()
    vae.register_to_config(latents_mean=torch.linspace(-1, 1, 8).tolist(), latents_std=spread)
    yield VideoCodec(vae)


def pixels(frames: int = 13) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.rand((2, 3, frames, 16, 24), generator=draw) * 2 - 1


def test_codec_shapes_and_normalisation(codec: VideoCodec) -> None:
    video = pixels(5)
    latents = codec.encode(video)
    assert latents.shape == (2, 2, *codec.latent_shape(16, 24)) == (2, 2, 8, 4, 6)
    with torch.no_grad():
        raw = codec.vae.encode(video).latent_dist.mode()
        plain = codec.vae.decode(raw).sample
    mean, std = (torch.tensor(codec.vae.config[f"latents_{n}"]).view(8, 1, 1, 1) for n in ("mean", "std"))
    torch.testing.assert_close(latents, ((raw - mean) / std).transpose(1, 2))
    decoded = codec.decode(latents)
    assert decoded.shape == video.shape and decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", ["pixels", "heatmap"])
def test_encoding_a_prefix_is_the_prefix_of_the_encoding(codec: VideoCodec, source: str) -> None:
    """So a control can be given while the video is being generated."""
    video = pixels()
    if source == "heatmap":
        path = Sprites(frames=13).batch("train", range(2), (32, 32)).trajectory
        video = heatmap(path, codec.stride)
    whole = codec.encode(video)
    for frames in range(1, whole.shape[1]):
        prefix = codec.encode(video[:, :, : 4 * frames - 3])
        torch.testing.assert_close(prefix, whole[:, :frames], atol=1e-5, rtol=0)
    later = video.clone()
    later[:, :, -1] += 0.5
    assert (codec.encode(later)[:, -1] - whole[:, -1]).abs().max() > 1e-3, "the encoder does see the frame"


def test_streaming_decode_is_the_whole_decode(codec: VideoCodec) -> None:
    latents = codec.encode(pixels()) * 1.5
    whole = codec.decode(latents)
    for _ in range(2):  # nothing is left over from the stream before
        stream = codec.decode_stream()
        parts = [stream(latents[:, m]) for m in range(latents.shape[1])]
        assert [part.shape[2] for part in parts] == [1, 4, 4, 4]
        torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latents), whole, atol=0, rtol=0)


def test_streaming_encode_is_the_whole_encode(codec: VideoCodec) -> None:
    video = pixels()
    whole, stream = codec.encode(video), codec.encode_stream()
    pieces = [video[:, :, :1], *video[:, :, 1:].split(4, 2)]
    parts = [stream(piece) for piece in pieces[:2]]
    early = stream.clone()
    parts += [stream(piece) for piece in pieces[2:]]
    torch.testing.assert_close(torch.stack(parts, 1), whole, atol=1e-5, rtol=0)
    again = [early(piece) for piece in pieces[2:]]  # from the copy: what came later has not touched it
    assert all(map(torch.equal, again, parts[2:]))
    with pytest.raises(ValueError, match="takes 4 pixel frame"):
        stream(video[:, :, :1])


def test_streams_side_by_side_do_not_disturb_each_other(codec: VideoCodec) -> None:
    one = codec.encode(pixels())
    two = -one
    streams = codec.decode_stream(), codec.decode_stream()
    parts = [(streams[0](one[:, m]), streams[1](two[:, m])) for m in range(one.shape[1])]
    for latents, made in zip((one, two), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(made, 2), codec.decode(latents), atol=1e-5, rtol=0)


def test_a_number_of_frames_that_does_not_fit_is_refused(codec: VideoCodec) -> None:
    with pytest.raises(ValueError, match=r"6 frames cannot be encoded; the VAE takes 1 \+ 4 k"):
        codec.encode(pixels(6))


def test_channels_last_changes_no_number(codec: VideoCodec) -> None:
    plain = copy.deepcopy(codec)
    for parameter in plain.vae.parameters():
        parameter.data = parameter.data.contiguous()
    layers = [m for m in plain.vae.modules() if isinstance(m, nn.Conv3d) and min(m.weight.shape[:2]) > 1]
    assert layers[0].weight.is_contiguous()
    video = pixels(5)
    with torch.no_grad():
        raw = plain.vae.encode(video).latent_dist.mode()
        frames = plain.vae.decode(raw).sample
    use_channels_last(plain.vae)
    assert layers[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    latents = codec.encode(video)
    torch.testing.assert_close(latents, ((raw.transpose(1, 2) - codec.mean) / codec.std), atol=1e-5, rtol=0)
    torch.testing.assert_close(codec.decode(latents), frames, atol=1e-5, rtol=0)


def test_text_is_zero_beyond_the_prompt_and_never_cut_silently() -> None:
    tokenizer = build_tokenizer(["a", "red", "disc", "moves", "left"])
    codec = TextCodec(tokenizer, build_text(TowerStage(width=16, layers=2), len(tokenizer)), 8)
    text = codec.encode(["a red disc", "a red disc moves left"])
    assert text.shape == (2, 8, 16)
    assert (text[0, :4].abs().sum(-1) > 0).all() and (text[0, 4:] == 0).all()
    torch.testing.assert_close(codec.encode(["a red disc"]), text[:1], atol=1e-6, rtol=0)
    with pytest.warns(UserWarning, match="prompt cut to 8 tokens: 'a a a"):
        codec.encode(["a red disc", "a " * 8])
