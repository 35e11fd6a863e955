"""Operations counted from shapes are those that torch counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import Context, Work, of_parallel, of_pass, of_update
from policies.causal_dit import CausalWanTransformer3DModel, KVCache
from policies.causality import Causality
from tests.test_causal_dit import IMAGE, RULES, inputs, network

FRAMES, TOKENS = 7, 6


def counted(action: Callable[[], Any]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_parallel_pass(rule: Causality, image: bool) -> None:
    model, x = network(**(IMAGE if image else {})), inputs(batch=1)
    model.image_frames = "first"
    tokens = torch.zeros(1, 4, 10) if image else None
    context = Context(5, 4 if image else 0, int(image))

    def act() -> None:
        with torch.no_grad():
            model.parallel(x["clean"], x["noisy"], x["sigma"], x["text"], causality=rule, image=tokens)

    history, present = of_parallel(model.config, rule, FRAMES, TOKENS, context)
    assert counted(act) == history.forward + present.forward


def test_a_cached_pass_and_what_it_saves() -> None:
    model, x, cache = network(), inputs(batch=1), KVCache(Causality())
    frame, sigma = x["noisy"][:, :1], x["sigma"][:, :1]

    def act() -> None:
        with torch.no_grad():
            model.cached(frame, sigma, x["text"], cache, first=0)

    first, second = counted(act), counted(act)
    assert first == of_pass(model.config, 1, TOKENS, 1, Context(5)).forward
    assert second == of_pass(model.config, 1, TOKENS, 1, Context(5, remembered=True)).forward < first


@pytest.mark.parametrize("history_gradient", [False, True])
def test_learning_is_forward_and_twice_backward(history_gradient: bool) -> None:
    """To the inputs and weights of every layer. Nothing goes back to the input of the first layer, nor through what the
    last layer makes of the history: little where there are many layers."""
    model, x = network(num_layers=16), inputs(batch=1)
    rule = Causality(window=2, history_gradient=history_gradient)

    def act() -> None:
        model.parallel(x["clean"], x["noisy"], x["sigma"], x["text"], causality=rule).sum().backward()

    expected = of_update(model.config, rule, FRAMES, TOKENS, Context(5), adapters=False)
    assert counted(act) == pytest.approx(expected, rel=0.04)


def test_the_released_size_costs_two_and_a_half_gflop_per_token() -> None:
    shape: dict[str, Any] = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
    with torch.device("meta"):
        config = CausalWanTransformer3DModel(**shape, in_channels=16, freq_dim=256).config
    work = of_pass(config, 1, 1560, 8, Context(512, remembered=True))
    assert work.linear / 1560 == pytest.approx(2.5e9, rel=0.03)
    assert work.attention == pytest.approx(4 * 30 * 1536 * 1560 * (8 * 1560 + 512))
    assert Work(2.0, 1.0).trained() == 9 and Work(2.0, 1.0).trained(adapters=True) == 7
