"""Whole clips chunk by chunk: the actor's clips for chunks of one, a slow reference for chunks of three."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from envs.ar_video import start, step
from envs.transitions import CPS, ODE, ode_mean
from policies.actor import Actor, evaluate
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.sampler import generate, sample_rollout
from tests.test_actor import network as make

BATCH, FRAMES, LATENT = 3, 7, (3, 4, 6)
TABLE = torch.tensor([1.0, 0.755, 0.522, 0.0])


@pytest.fixture(scope="module")
def network() -> CausalWanTransformer3DModel:
    return make()


def episode(stochastic: list[bool]) -> TensorDict:
    draw = torch.Generator().manual_seed(1)
    return start(
        condition=torch.randn(BATCH, FRAMES, 4, *LATENT[1:], generator=draw),
        text=torch.randn(BATCH, 5, 12, generator=draw),
        sigma_table=TABLE,
        stochastic=torch.tensor(stochastic),
        key=torch.tensor([[3, 0, b, 0] for b in range(BATCH)]),
        latent_shape=LATENT,
    )


def test_chunks_of_one_are_what_the_actor_makes(network: CausalWanTransformer3DModel) -> None:
    rule, state = Causality(window=2, sink=1), episode([True, False, False])
    chain = generate(network, CPS(0.7), rule, state).latents
    actor = Actor(network, CPS(0.7), rule)
    for m in range(FRAMES):
        for n in range(3):
            action = actor(state)["action"]
            assert torch.equal(chain[:, m, n + 1], action)
            state = step(state, action)[0]
    assert torch.equal(chain[:, :, -1], state["latents"])


@pytest.mark.parametrize(
    "rule", [Causality(chunk=3, window=3), Causality(chunk=3, window=4, sink=2), Causality(chunk=9)]
)
def test_chunks_of_three_are_the_parallel_pass_step_by_step(
    network: CausalWanTransformer3DModel, rule: Causality
) -> None:
    state = episode([False] * 3)
    chain = generate(network, ODE(), rule, state).latents
    finished, condition = chain[:, :, -1], state["condition"]
    clean = torch.cat([finished, condition], 2)
    x = state["latents"]
    with torch.no_grad():
        for n in range(3):
            sigma = TABLE[n].expand(BATCH, FRAMES)
            v = network.parallel(clean, torch.cat([x, condition], 2), sigma, state["text"], causality=rule)
            x = ode_mean(x, v, TABLE[n], TABLE[n + 1])
            torch.testing.assert_close(x, chain[:, :, n + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(4, 6), (16, 32)], ids=["6 tokens", "128 tokens"])
@pytest.mark.parametrize(
    "rule", [Causality(chunk=3, window=3), Causality(chunk=3, window=4, sink=2), Causality(window=2, sink=1)], ids=str
)
def test_log_probs_of_acting_and_of_rescoring_agree_for_any_chunk(
    network: CausalWanTransformer3DModel, rule: Causality, size: tuple[int, int]
) -> None:
    draw = torch.Generator().manual_seed(2)
    mask = torch.rand(BATCH, FRAMES, 3, generator=draw) < 0.5
    mask[..., -1] = False
    state = start(
        condition=torch.randn(BATCH, FRAMES, 4, *size, generator=draw),
        text=torch.randn(BATCH, 5, 12, generator=draw),
        sigma_table=TABLE,
        stochastic=mask,
        key=torch.tensor([[3, 0, b, 0] for b in range(BATCH)]),
        latent_shape=(3, *size),
    )
    rollout = sample_rollout(network, CPS(0.7), rule, state)
    assert torch.equal(rollout["log_prob"] != 0, mask)
    with torch.no_grad():
        scores = evaluate(network, CPS(0.7), rule, rollout)
    torch.testing.assert_close(scores["log_prob"], rollout["log_prob"], atol=1e-5, rtol=0)


def test_renoising_is_the_sampler_of_self_forcing(network: CausalWanTransformer3DModel) -> None:
    """Fresh noise on the x0 prediction at every step: `cps` with eta 1."""
    state = episode([True, True, False])
    chain = generate(network, CPS(1.0), Causality(), state).latents
    clean = torch.cat([chain[:, :, -1], state["condition"]], 2)
    others = generate(network, CPS(1.0), Causality(), state.clone().set("key", state["key"] + 1)).latents
    with torch.no_grad():
        noisy = torch.cat([chain[:, :, 0], state["condition"]], 2)
        v = network.parallel(clean, noisy, torch.ones(BATCH, FRAMES), state["text"], causality=Causality())
    x0 = chain[:, :, 0] - v
    noise = (chain[:, :, 1] - (1 - 0.755) * x0) / 0.755
    assert abs(float(noise.mean())) < 0.1 and float(noise.std()) == pytest.approx(1, abs=0.1)
    assert not torch.equal(others[:, 0, 1], chain[:, 0, 1])


def test_collapse_ends_a_frame_with_its_prediction(network: CausalWanTransformer3DModel) -> None:
    state, rule = episode([True, True, False]), Causality(window=2)
    exits = torch.tensor([[0, 1, 2, 0, 1, 2, 0]] * (BATCH - 1) + [[2] * FRAMES])
    chain = generate(network, CPS(1.0), rule, state, collapse=exits).latents
    finished, condition = chain[:, :, -1], state["condition"]
    at = exits[..., None, None, None, None].expand(-1, -1, 1, *LATENT)
    x, sigma = chain.gather(2, at).squeeze(2), TABLE[exits]
    with torch.no_grad():
        v = network.parallel(
            torch.cat([finished, condition], 2), torch.cat([x, condition], 2), sigma, state["text"], causality=rule
        )
    torch.testing.assert_close(finished, x - sigma[..., None, None, None] * v, atol=1e-5, rtol=0)
    # An exit at the last step is no collapse: the last step ends at level 0, on the prediction itself.
    whole = generate(network, CPS(1.0), rule, state).latents
    torch.testing.assert_close(finished[-1], whole[-1, :, -1], atol=1e-5, rtol=0)


def test_a_frame_does_not_depend_on_the_noise_of_later_ones(network: CausalWanTransformer3DModel) -> None:
    state = episode([False] * 3)
    other: Tensor = state["latents"].clone()
    other[:, 5:] += 1
    for chunk, same in ((1, 5), (3, 3)):
        rule = replace(Causality(), chunk=chunk)
        ours, theirs = (
            generate(network, ODE(), rule, s).latents[:, :, -1] for s in (state, state.clone().set("latents", other))
        )
        assert torch.equal(ours[:, :same], theirs[:, :same]) and not torch.equal(ours, theirs)
