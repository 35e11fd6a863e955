"""Live generation makes the frames of the sampler, waits for nothing, holds its memory, and can go back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from tensordict import TensorDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.draws import Stream as Draws
from data.draws import normals
from envs.ar_video import start
from envs.control import assemble_condition
from envs.transitions import CPS
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.codecs import VideoCodec
from policies.first_frame import FirstFrameWanTransformer3DModel
from policies.sampler import generate
from policies.stream import Episode, Stream, VideoStream
from tests.pictured import TINY, filled, pictured
from tests.test_causal_dit import RULES

FRAMES, LATENT, SIGMAS = 12, (3, 4, 6), [1.0, 0.755, 0.522, 0.0]
KEYS = ((3, 0, 0, 0), (3, 0, 0, 1))


@pytest.fixture(scope="module")
def network() -> CausalWanTransformer3DModel:
    return pictured("first")


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def episode(frames: int = FRAMES, stochastic: bool = False, size: tuple[int, int] = LATENT[1:]) -> TensorDict:
    condition = normal(1, 2, frames, 10, *size)
    condition[:, 0, :4], condition[:, 1:, :4] = 1, 0
    return start(
        condition=condition,
        text=normal(2, 2, 5, 12),
        sigma_table=torch.tensor(SIGMAS),
        stochastic=torch.tensor([stochastic, stochastic, False]),
        key=torch.tensor(KEYS),
        latent_shape=(3, *size),
        image=normal(3, 2, 5, 10),
    )


def stream_of(model: Any, rule: Causality, state: TensorDict, **more: Any) -> Stream:
    shape = tuple(state["latents"].shape[2:])
    return Stream(model, rule, SIGMAS, Episode(state["text"], KEYS, state["image"]), shape, **more)


def run(stream: Stream, state: TensorDict, chunk: int) -> Tensor:
    return torch.cat([stream.step(part) for part in state["condition"].split(chunk, 1)], 1)


@pytest.mark.parametrize("rule", [rule for rule in RULES if FRAMES % rule.chunk == 0], ids=str)
def test_a_stream_is_the_sampler(network: CausalWanTransformer3DModel, rule: Causality) -> None:
    state = episode()
    expected = generate(network, CPS(), rule, state).latents[:, :, -1]
    torch.testing.assert_close(run(stream_of(network, rule, state), state, rule.chunk), expected, atol=1e-6, rtol=0)


def test_a_renoising_stream_is_the_renoising_sampler(network: CausalWanTransformer3DModel) -> None:
    state, kernel = episode(stochastic=True), CPS(eta=1.0)
    expected = generate(network, kernel, Causality(), state).latents[:, :, -1]
    ours = run(stream_of(network, Causality(), state, renoise=kernel), state, 1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_a_given_first_frame_costs_nothing_and_changes_nothing() -> None:
    model, state = filled(FirstFrameWanTransformer3DModel(**TINY, in_channels=6)), episode()
    state = state.exclude("image").set("image", normal(3, 2, 5, 10))
    expected = generate(model, CPS(), Causality(window=2), state.exclude("image")).latents[:, :, -1]
    stream = Stream(model, Causality(window=2), SIGMAS, Episode(state["text"], KEYS), LATENT)
    torch.testing.assert_close(run(stream, state, 1), expected, atol=1e-5, rtol=0)


class Waits(TorchDispatchMode):
    """Refuses whatever would make the host wait for the device."""

    REFUSED = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.REFUSED:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", [Causality(window=2, sink=1), Causality(chunk=3, window=4)], ids=str)
def test_no_step_waits_for_the_device(network: CausalWanTransformer3DModel, rule: Causality) -> None:
    state = episode()
    stream = stream_of(network, rule, state)
    with Waits():
        run(stream, state, rule.chunk)
        with pytest.raises(AssertionError, match="waits"):
            float(state["sigma"].sum())


@pytest.mark.parametrize("frames", [1, 81])
@pytest.mark.parametrize("rule", [Causality(chunk=1, window=25), Causality(window=7)], ids=str)
def test_any_number_of_frames_and_a_cache_of_25(
    network: CausalWanTransformer3DModel, rule: Causality, frames: int
) -> None:
    state = episode(frames)
    expected = generate(network, CPS(), rule, state).latents
    torch.testing.assert_close(run(stream_of(network, rule, state), state, 1), expected[:, :, -1], atol=1e-5, rtol=0)
    with torch.no_grad():  # and the parallel pass agrees, at the first step of all frames
        clean, noisy = (torch.cat([expected[:, :, n], state["condition"]], 2) for n in (-1, 0))
        sigma = state["sigma"][..., 0]
        v = network.parallel(clean, noisy, sigma, state["text"], causality=rule, image=state["image"])
        after = expected[:, :, 0] + (0.755 - 1) * v
    torch.testing.assert_close(after, expected[:, :, 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(16, 32), (30, 46), (46, 30)], ids=str)
def test_other_sizes_and_chunks_of_three(network: CausalWanTransformer3DModel, size: tuple[int, int]) -> None:
    """128 tokens a frame, and the shape of 480x368 and 368x480 at half scale."""
    state, rule = episode(6, size=size), Causality(chunk=3, window=3)
    expected = generate(network, CPS(), rule, state).latents[:, :, -1]
    torch.testing.assert_close(run(stream_of(network, rule, state), state, 3), expected, atol=1e-5, rtol=0)


def test_memory_is_flat_over_200_frames(network: CausalWanTransformer3DModel) -> None:
    """Bytes of all live tensors after 20 frames and after 200."""
    import gc

    def live() -> int:
        gc.collect()
        # Not what tracing left behind in other tests: a FakeTensor has no memory.
        found = (thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter))
        return sum(
            storage.nbytes()
            for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in found}.values()
        )

    state = episode(1)
    stream, sizes = stream_of(network, Causality(window=3), state), {}
    for m in range(200):
        stream.step(state["condition"])
        if m in (20, 199):
            sizes[m] = live()
    assert sizes[20] == sizes[199] and stream.frames == 200


def test_going_back_makes_the_same_frames_again_and_others_from_another_control(
    network: CausalWanTransformer3DModel,
) -> None:
    state = episode()
    stream = stream_of(network, Causality(window=2), state)
    parts = state["condition"].split(1, 1)
    for part in parts[:5]:
        stream.step(part)
    mark = stream.mark()
    first = [stream.step(part) for part in parts[5:]]
    stream.rewind(mark)
    other = [stream.step(-part) for part in parts[5:]]
    stream.rewind(mark)
    again = [stream.step(part) for part in parts[5:]]
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


@pytest.mark.slow
def test_compiled_blocks_make_the_same_frames(network: CausalWanTransformer3DModel) -> None:
    state, rule = episode(3), Causality(window=1)
    eager = run(stream_of(network, rule, state), state, 1)
    compiled = run(stream_of(network, rule, state, compile="default"), state, 1)
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=0)


def test_an_unknown_mode_is_refused(network: CausalWanTransformer3DModel) -> None:
    with pytest.raises(ValueError, match="compile must be one of none, default"):
        stream_of(network, Causality(), episode(), compile="fast")
    with pytest.raises(ValueError, match="makes 1 frame"):
        stream_of(network, Causality(), episode()).step(episode()["condition"])


# pixels


@pytest.fixture(scope="module")
def codec() -> VideoCodec:
    torch.manual_seed(0)
    return VideoCodec(
        AutoencoderKLWan(
            base_dim=4,
            z_dim=3,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * 3,
            latents_std=[1.0] * 3,
        )
    )


@pytest.mark.parametrize("chunk", [1, 3])
def test_pixels_are_those_of_the_whole_clip(
    network: CausalWanTransformer3DModel, codec: VideoCodec, chunk: int
) -> None:
    frames, rule = 6, Causality(chunk=chunk, window=3)
    control = normal(5, 2, 3, 4 * frames - 3, 16, 24).clamp(-1, 1)
    picture = normal(6, 2, 3, 1, 16, 24).clamp(-1, 1)
    reference, drawn = codec.encode(picture)[:, 0], codec.encode(control)
    noise = normals(Draws.REFERENCE_NOISE, [(*key[:3], m) for key in KEYS for m in range(frames)], LATENT)
    state = episode(frames)
    state["condition"] = assemble_condition(reference, drawn, noise.unflatten(0, (2, frames)))
    expected = codec.decode(generate(network, CPS(), rule, state).latents[:, :, -1])
    video = VideoStream(stream_of(network, rule, state), codec, reference)
    ends = range(4 * chunk - 3, control.shape[2] + 1, 4 * chunk)
    pieces = [control[:, :, max(0, end - 4 * chunk) : end] for end in ends]
    made = [video.step(piece) for piece in pieces[:2]]
    mark = video.mark()
    made += [video.step(piece) for piece in pieces[2:]]
    torch.testing.assert_close(torch.cat(made, 2), expected, atol=1e-4, rtol=0)
    assert made[0].shape[2] == 4 * chunk - 3
    video.rewind(mark)
    assert all(map(torch.equal, [video.step(piece) for piece in pieces[2:]], made[2:]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_gpu_compiled_frames_are_the_eager_ones_and_no_step_synchronises(mode: str) -> None:
    model = filled(CausalWanTransformer3DModel(**TINY, in_channels=13)).cuda()
    state, rule = episode(6).cuda(), Causality(window=2)
    ours = Episode(state["text"], KEYS)
    eager = run(Stream(model, rule, SIGMAS, ours, LATENT), state, 1)
    stream = Stream(model, rule, SIGMAS, ours, LATENT, compile=mode)
    torch.testing.assert_close(run(stream, state, 1), eager, atol=1e-4, rtol=1e-4)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream.step(state["condition"][:, :1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
