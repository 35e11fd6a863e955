"""The causal transformer: equal to diffusers in one block, and the same in its parallel and cached passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from policies.attention import attention_mask, block_mask, dense_mask, frames_of
from policies.causal_dit import CausalWanTransformer3DModel, KVCache
from policies.causality import CLEAN, NOISY, Causality

TINY: dict[str, Any] = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=7,
    out_channels=3,
    text_dim=12,
    freq_dim=16,
    ffn_dim=48,
    num_layers=2,
)
IMAGE = dict(image_dim=10, added_kv_proj_dim=32)
FRAMES = 7
RULES = [
    Causality(),
    Causality(window=2),
    Causality(window=2, sink=1),
    Causality(window=0, sink=2),
    Causality(chunk=3, window=3, sink=1),
    Causality(chunk=3, window=2),
    Causality(chunk=3, window=4, sink=2),
    Causality(chunk=FRAMES),
]


def network(**extra: Any) -> CausalWanTransformer3DModel:
    torch.manual_seed(0)
    model = CausalWanTransformer3DModel(**{**TINY, **extra})
    for parameter in model.parameters():  # so that no term is hidden behind a zero or a one
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(frames: int = FRAMES, height: int = 4, width: int = 6, batch: int = 2) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return {
        "clean": normal(batch, frames, 7, height, width),
        "noisy": normal(batch, frames, 7, height, width),
        "sigma": torch.rand(batch, frames, generator=draw),
        "text": normal(batch, 5, 12),
    }


def by_cache(
    model: CausalWanTransformer3DModel,
    x: dict[str, Tensor],
    rule: Causality,
    fused: bool = False,
    **extra: Any,
) -> Tensor:
    """Velocities of all noisy frames, chunk after chunk; the slow reference of the parallel pass."""
    cache, out, chunk = KVCache(rule), [], rule.chunk
    for start in range(0, FRAMES, chunk):
        noisy, sigma = x["noisy"][:, start : start + chunk], x["sigma"][:, start : start + chunk]
        first, commit = start, 0
        if start:
            done = x["clean"][:, start - chunk : start]
            zeros = torch.zeros_like(x["sigma"][:, :chunk])
            if fused:
                noisy, sigma = torch.cat([done, noisy], 1), torch.cat([zeros, sigma], 1)
                first, commit = start - chunk, chunk
            else:
                model.cached(done, zeros, x["text"], cache, first=start - chunk, commit=chunk, **extra)
        v = model.cached(noisy, sigma, x["text"], cache, first=first, commit=commit, **extra)
        out.append(v[:, commit:])
    assert cache.frames == rule.held(cache.end)
    return torch.cat(out, 1)


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("image", [False, True])
def test_one_block_equals_diffusers(per_frame: bool, image: bool) -> None:
    model = network(**(IMAGE if image else {}))
    reference = WanTransformer3DModel(**model.config)
    reference.load_state_dict(model.state_dict())
    x = inputs()
    # diffusers takes the last 512 context tokens for text.
    text = torch.randn(2, 512, 12, generator=torch.Generator().manual_seed(2)) if image else x["text"]
    tokens = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(3)) if image else None
    sigma = x["sigma"] if per_frame else x["sigma"][:, :1].expand(-1, FRAMES)
    timestep = 1000 * sigma.repeat_interleave(2 * 3, dim=1) if per_frame else 1000 * sigma[:, 0]
    video = x["noisy"].transpose(1, 2)
    with torch.no_grad():
        expected = reference(video, timestep, text, tokens).sample
        ours = model.parallel(x["clean"], x["noisy"], sigma, text, causality=Causality(chunk=FRAMES), image=tokens)
        torch.testing.assert_close(ours.transpose(1, 2), expected, atol=1e-5, rtol=0)
        door = model(video, timestep, text, tokens, return_dict=False)[0]
        torch.testing.assert_close(door, expected, atol=1e-5, rtol=0)
    assert expected.abs().mean() > 0.1


def test_image_context_with_any_text_length() -> None:
    model, x = network(**IMAGE), inputs()
    image = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(3))
    rule = Causality(chunk=FRAMES)
    with torch.no_grad():
        video, sigma = x["noisy"].transpose(1, 2), x["sigma"][:, :1]
        two = model(video, 1000 * sigma[:, 0], x["text"], image).sample.transpose(1, 2)
        one = model.parallel(x["clean"], x["noisy"], sigma.expand(-1, FRAMES), x["text"], causality=rule, image=image)
        other = model.parallel(
            x["clean"], x["noisy"], sigma.expand(-1, FRAMES), x["text"], causality=rule, image=-image
        )
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_cached_equals_parallel(rule: Causality, fused: bool) -> None:
    model, x = network(), inputs()
    with torch.no_grad():
        parallel = model.parallel(x["clean"], x["noisy"], x["sigma"], x["text"], causality=rule)
        torch.testing.assert_close(by_cache(model, x, rule, fused), parallel, atol=1e-5, rtol=0)


def test_cached_equals_parallel_with_image_tokens_and_128_tokens_per_frame() -> None:
    model, x = network(**IMAGE), inputs(height=16, width=32, batch=1)
    image = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(3))
    rule = Causality(window=2, sink=1)
    with torch.no_grad():
        parallel = model.parallel(x["clean"], x["noisy"], x["sigma"], x["text"], causality=rule, image=image)
        torch.testing.assert_close(by_cache(model, x, rule, True, image=image), parallel, atol=1e-5, rtol=0)


def test_the_rule_in_small_numbers() -> None:
    assert Causality(window=2, sink=1).held(5) == [0, 3, 4]
    for other in RULES:
        for end in range(0, 12, other.chunk):
            assert other.held(end) == [k for k in range(12) if other.visible(NOISY, end, CLEAN, k)]
    assert Causality(window=7).held(9) == [2, 3, 4, 5, 6, 7, 8]
    rule = Causality(chunk=3, window=4, sink=1)
    assert rule.held(6) == [0, 2, 3, 4, 5]
    assert [k for k in range(9) if rule.visible(NOISY, 7, NOISY, k)] == [6, 7, 8]
    assert [k for k in range(9) if rule.visible(CLEAN, 7, CLEAN, k)] == [0, 2, 3, 4, 5, 6, 7, 8]
    assert not any(rule.visible(CLEAN, 7, NOISY, k) for k in range(9))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_frame_sees_exactly_what_the_rule_says(rule: Causality) -> None:
    """Perturb one clean frame: with one layer, only frames whose rule holds it change."""
    model, x = network(num_layers=1), inputs()
    with torch.no_grad():
        before = model.parallel(x["clean"], x["noisy"], x["sigma"], x["text"], causality=rule)
        for frame in range(FRAMES):
            clean = x["clean"].clone()
            clean[:, frame] += 1
            after = model.parallel(clean, x["noisy"], x["sigma"], x["text"], causality=rule)
            changed = (after - before).abs().amax((0, 2, 3, 4)) > 1e-6
            expected = [frame in rule.held(m // rule.chunk * rule.chunk) for m in range(FRAMES)]
            assert changed.tolist() == expected


@pytest.mark.parametrize("tokens", [6, 128])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_flex_and_dense_masks_are_one_predicate(rule: Causality, tokens: int) -> None:
    cpu = torch.device("cpu")
    queries = frames_of(NOISY, range(FRAMES))
    keys = frames_of(CLEAN, range(FRAMES - 1)) + queries
    dense = dense_mask(rule, queries, keys, tokens, cpu)
    blocks = block_mask(rule, queries, keys, tokens, cpu)
    i, j = torch.arange(dense.shape[0])[:, None], torch.arange(dense.shape[1])
    assert torch.equal(blocks.mask_mod(torch.tensor(0), torch.tensor(0), i, j), dense)
    q, k = torch.randn(1, 2, dense.shape[0], 16), torch.randn(1, 2, dense.shape[1], 16)
    flex = torch.nn.attention.flex_attention.flex_attention(q, k, k, block_mask=blocks)
    torch.testing.assert_close(flex, torch.nn.functional.scaled_dot_product_attention(q, k, k, dense))
    assert attention_mask(rule, queries, keys, tokens, cpu) is attention_mask(rule, queries, keys, tokens, cpu)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("history_gradient", [False, True])
@pytest.mark.parametrize("chunk", [1, 3])
def test_gradients_equal_the_frame_by_frame_reference(chunk: int, history_gradient: bool, checkpointing: bool) -> None:
    rule = Causality(chunk=chunk, window=3, sink=1, history_gradient=history_gradient)
    model, x = network(), inputs()
    weight = torch.randn(2, FRAMES, 3, 4, 6, generator=torch.Generator().manual_seed(4)) / 100
    slow = gradients(model, (by_cache(model, x, rule) * weight).sum())
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    fast = gradients(
        model, (model.parallel(x["clean"], x["noisy"], x["sigma"], x["text"], causality=rule) * weight).sum()
    )
    assert_same(fast, slow)


def test_history_gradient_is_what_the_switch_says() -> None:
    """Gradient reaches the clean frames with the switch and not without it, in both passes."""
    for switch in (False, True):
        model, x = network(), inputs()
        x["clean"].requires_grad_()
        rule = Causality(window=3, history_gradient=switch)
        for v in (
            model.parallel(x["clean"], x["noisy"], x["sigma"], x["text"], causality=rule),
            by_cache(model, x, rule),
            by_cache(model, x, rule, fused=True),
        ):
            (gradient,) = torch.autograd.grad(v.square().sum(), x["clean"], allow_unused=True)
            reached = gradient is not None and bool(gradient[:, : FRAMES - 1].abs().amax((0, 2, 3, 4)).gt(0).all())
            assert reached == switch
            assert switch or gradient is None or gradient.abs().max() == 0


def test_cache_bounds_clone_and_reset() -> None:
    model, x = network(), inputs()
    cache, zeros = KVCache(Causality(window=2, sink=1)), torch.zeros(2, 1)

    def act(memory: KVCache, frame: int, commit: int = 0) -> Tensor:
        return model.cached(x["clean"][:, frame : frame + 1], zeros, x["text"], memory, first=frame, commit=commit)

    with torch.no_grad():
        for frame in range(5):
            act(cache, frame, commit=1)
        assert cache.frames == [0, 3, 4]
        assert all(pair[0].shape[2] == 3 * 6 for pair in cache._layers.values())
        copy, here = cache.clone(), act(cache, 5)
        act(cache, 5, commit=1)
        assert cache.frames == [0, 4, 5] and copy.frames == [0, 3, 4]
        assert torch.equal(act(copy, 5), here)
        with pytest.raises(ValueError, match="does not continue"):
            act(cache, 3)
        cache.reset()
        assert cache.frames == []
        act(cache, 0)


def test_remembered_text_saves_work_and_never_cuts_a_gradient() -> None:
    model, x, cache = network(), inputs(), KVCache(Causality())
    frame, sigma = x["noisy"][:, :1], x["sigma"][:, :1]
    with torch.no_grad():
        v = model.cached(frame, sigma, x["text"], cache, first=0)
        assert torch.equal(model.cached(frame, sigma, -x["text"], cache, first=0), v)
        cache.reset()
        assert not torch.equal(model.cached(frame, sigma, -x["text"], cache, first=0), v)
    after = gradients(model, model.cached(frame, sigma, x["text"], cache, first=0).sum())
    fresh = gradients(model, model.cached(frame, sigma, x["text"], KVCache(Causality()), first=0).sum())
    assert_same(after, fresh)


def test_frames_beyond_the_rotary_table_are_refused() -> None:
    with pytest.raises(ValueError, match="rope_max_seq_len is 4"):
        x = inputs()
        network(rope_max_seq_len=4).parallel(x["clean"], x["noisy"], x["sigma"], x["text"], causality=Causality())


def test_weights_travel_in_diffusers_format(tmp_path: Any) -> None:
    model = network()
    WanTransformer3DModel(**TINY).save_pretrained(tmp_path / "wan")
    CausalWanTransformer3DModel.from_pretrained(tmp_path / "wan")
    model.save_pretrained(tmp_path / "ours")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
