"""The actor, its re-scoring, what trains and what it is averaged into."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from data.draws import Stream, normal
from envs.ar_video import start, step
from envs.rollout import RolloutCollector
from envs.transitions import CPS, FlowSDE, ode_mean
from policies.actor import Actor
from policies.adapters import Adaptation, ReferencePolicy
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.ema import EMA
from tests import scored

BATCH, FRAMES, STEPS, LATENT = 4, 5, 3, (3, 4, 6)
SHORT = Causality(window=2, sink=1)


def network(seed: int = 0) -> CausalWanTransformer3DModel:
    return scored.network(seed, channels=(7, 3), text_dim=12, ffn_dim=48)


def per_sample() -> Tensor:
    """Every pattern there is: none, one or both of the first two steps, differing by sample and frame."""
    draw = torch.Generator().manual_seed(7)
    mask = torch.rand(BATCH, FRAMES, STEPS, generator=draw) < 0.5
    mask[..., -1] = False
    return mask


SCHEDULES: dict[str, Tensor] = {
    "second": torch.tensor([False, True, False]),
    "both": torch.tensor([True, True, False]),
    "none": torch.tensor([False, False, False]),
    "per_sample": per_sample(),
}


def episode(schedule: str = "per_sample", seed: int = 3) -> TensorDict:
    draw = torch.Generator().manual_seed(seed)
    return start(
        condition=torch.randn(BATCH, FRAMES, 4, *LATENT[1:], generator=draw),
        text=torch.randn(BATCH, 5, 12, generator=draw),
        sigma_table=torch.tensor([1.0, 0.755, 0.522, 0.0]),
        stochastic=SCHEDULES[schedule],
        key=torch.tensor([[seed, 0, b // 2, b % 2] for b in range(BATCH)]),
        latent_shape=LATENT,
    )


def act(
    actor: Callable[[TensorDict], Any], first: TensorDict, visit: Callable[[TensorDict], None] | None = None
) -> TensorDict:
    """Act to the end of the episode and assemble the rollout."""
    state, actions, log_probs = first.clone(), [], []
    for _ in range(FRAMES * STEPS):
        actor(state)
        if visit:
            visit(state)
        actions.append(state["action"])
        log_probs.append(state["log_prob"][:, 0])
        state = step(state, state["action"])[0]
    grid = torch.stack(actions, 1).unflatten(1, (FRAMES, STEPS))
    rollout = first.select("condition", "text", "sigma", "stochastic", "key")
    rollout["latents"] = torch.cat([first["latents"].unsqueeze(2), grid], 2)
    rollout["log_prob"] = torch.stack(log_probs, 1).unflatten(1, (FRAMES, STEPS))
    return rollout


def gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kernel", [CPS(), FlowSDE()], ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rescoring_equals_acting(schedule: str, kernel: Any) -> None:
    actor = Actor(network(), kernel, SHORT)
    rollout = act(actor, episode(schedule))
    with torch.no_grad():
        scores, slow = actor.evaluate(rollout), actor.replay(rollout)
    torch.testing.assert_close(scores["log_prob"], rollout["log_prob"], atol=1e-5, rtol=0)
    assert torch.equal(slow["log_prob"], rollout["log_prob"])
    for name in ("mean", "std"):
        torch.testing.assert_close(scores[name], slow[name], atol=1e-5, rtol=0)
    assert torch.equal(scores["log_prob"] != 0, rollout["stochastic"])
    if schedule != "none":
        chosen = rollout["stochastic"]
        mean, std = scores["mean"][chosen], scores["std"][chosen][:, None, None, None]
        density = torch.distributions.Normal(mean, std).log_prob(rollout["latents"][:, :, 1:][chosen])
        torch.testing.assert_close(scores["log_prob"][chosen], density.mean((1, 2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("history_gradient", [False, True])
def test_rescoring_has_the_gradient_of_the_replay(history_gradient: bool, checkpointing: bool) -> None:
    actor = Actor(network(), CPS(), Causality(window=2, history_gradient=history_gradient))
    rollout = act(actor, episode())
    weight = torch.randn(BATCH, FRAMES, STEPS, generator=torch.Generator().manual_seed(5))
    fast = gradients(actor, (actor.evaluate(rollout)["log_prob"] * weight).sum())
    if checkpointing:  # when blocks are computed again, the cache has moved on
        actor.transformer.train().enable_gradient_checkpointing()
    slow = gradients(actor, (actor.replay(rollout)["log_prob"] * weight).sum())
    assert fast.keys() == slow.keys()
    for name in fast:
        scale = max(1.0, float(slow[name].abs().max()))
        torch.testing.assert_close(fast[name] / scale, slow[name] / scale, atol=1e-4, rtol=0)


def test_what_an_action_is() -> None:
    """The kernel's mean plus the keyed noise at stochastic steps, the ODE's step and log-prob 0 elsewhere."""
    actor, kernel = Actor(network(), CPS(), SHORT), CPS()
    seen = set()

    def check(state: TensorDict) -> None:
        m, n = int(state["frame"][0]), int(state["step"][0])
        with torch.no_grad():
            v = Actor(actor.transformer, kernel, SHORT).velocity(state, m, n)
        for b in range(BATCH):
            x, sigma, later = state["latents"][b, m], state["sigma"][b, m, n], state["sigma"][b, m, n + 1]
            expected = ode_mean(x, v[b], sigma, later)
            chosen = bool(state["stochastic"][b, m, n])
            if chosen:
                mean, std = kernel.moments(x, v[b], sigma, later)
                key = (*state["key"][b].tolist(), m, n)
                expected = mean + std * normal(Stream.TRANSITION_NOISE, key, LATENT)
            torch.testing.assert_close(state["action"][b], expected, atol=1e-5, rtol=0)
            assert bool(state["log_prob"][b, 0] != 0) == chosen
            seen.add((n, chosen))

    act(actor, episode(), check)
    assert len(seen) == 2 * STEPS - 1


def test_a_fresh_actor_continues_from_any_snapshot() -> None:
    actor = Actor(network(), CPS(), SHORT)

    def check(state: TensorDict) -> None:
        fresh = Actor(actor.transformer, CPS(), SHORT)(state.exclude("action", "log_prob"))
        for name in ("action", "log_prob"):
            torch.testing.assert_close(fresh[name], state[name], atol=1e-5, rtol=0)

    act(actor, episode(), check)


def test_memory_never_answers_for_another_state() -> None:
    """Undo, edits of the past and other episodes: always what a fresh actor does."""
    actor, states = Actor(network(), CPS(), SHORT), []
    act(actor, episode(), lambda state: states.append(state.exclude("action", "log_prob")))
    edited = states[2 * STEPS + 1].clone()
    edited["latents"][:, 0] += 1
    other, said, asked = edited.clone(), edited.clone(), edited.clone()
    other["key"][:, 0] += 1
    said["text"] = -said["text"]
    asked["condition"][:, 1] += 1
    early, late = states[3], states[12]
    for state in (states[7], edited, other, edited, said, edited, asked, states[7], early, late, states[0]):
        fresh = Actor(actor.transformer, CPS(), SHORT)(state.clone())["action"]
        torch.testing.assert_close(actor(state.clone())["action"], fresh, atol=1e-5, rtol=0)


def test_acting_does_not_depend_on_the_batch_split() -> None:
    whole = act(Actor(network(), CPS(), SHORT), episode())
    halves = [act(Actor(network(), CPS(), SHORT), part) for part in episode().split(BATCH // 2)]
    torch.testing.assert_close(torch.cat([h["latents"] for h in halves]), whole["latents"], atol=1e-5, rtol=0)


def test_log_probs_are_float32_under_autocast_and_for_stored_rounding() -> None:
    actor = Actor(network(), CPS(), SHORT)
    first = episode("both")
    first["latents"] = first["latents"].bfloat16()
    rollout = act(actor, first)
    assert rollout["latents"].dtype is torch.bfloat16 and rollout["log_prob"].dtype is torch.float32
    with torch.no_grad():
        plain = actor.evaluate(rollout)
        torch.testing.assert_close(plain["log_prob"], rollout["log_prob"], atol=1e-5, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            scores = actor.evaluate(rollout)
    assert all(value.dtype is torch.float32 for value in scores.values())
    chosen = rollout["stochastic"]
    actions, std = rollout["latents"][:, :, 1:][chosen].float(), scores["std"][chosen][:, None, None, None]
    exact = torch.distributions.Normal(scores["mean"][chosen].double(), std.double()).log_prob(actions.double())
    torch.testing.assert_close(scores["log_prob"][chosen].double(), exact.mean((1, 2, 3)), atol=1e-5, rtol=0)
    assert (scores["mean"] - plain["mean"]).abs().max() > 1e-4  # autocast was on


def test_rollouts_of_the_torchrl_collector() -> None:
    actor = Actor(network(), CPS(), Causality())
    collector = RolloutCollector(actor, lambda: episode("second"))
    for _ in range(2):
        rollout = collector.collect()
        assert torch.equal(rollout["latents"], act(actor, episode("second"))["latents"])
        with torch.no_grad():
            scores = actor.evaluate(rollout)["log_prob"]
        torch.testing.assert_close(scores, rollout["log_prob"], atol=1e-5, rtol=0)
    collector.close()


def test_the_network_may_be_wrapped() -> None:
    """Engines offer nothing but a call."""

    class Engine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = network()

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.module(*args, **kwargs)

    wrapped, plain = Actor(Engine(), CPS(), SHORT), Actor(network(), CPS(), SHORT)
    rollout = act(wrapped, episode())
    assert torch.equal(rollout["latents"], act(plain, episode())["latents"])
    assert torch.equal(wrapped.evaluate(rollout)["mean"], plain.evaluate(rollout)["mean"])


def test_refusals() -> None:
    with pytest.raises(ValueError, match="chunks of 3 are for generate"):
        Actor(network(), CPS(), Causality(chunk=3))(episode())
    state = episode()
    state["step"] = torch.tensor([[0], [1], [0], [0]])
    with pytest.raises(ValueError, match="same \\(frame, step\\)"):
        Actor(network(), CPS(), Causality())(state)
    settings: dict[str, Any] = {"chunk": 0, "window": -1, "sink": -1}
    for name, bad in settings.items():
        with pytest.raises(ValueError, match=rf"causality\.{name} must be"):
            replace(Causality(), **{name: bad})
    wrong: dict[str, Any] = {"kind": "lara", "rank": 0, "alpha": 0.0, "targets": []}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"adaptation\.{name}"):
            replace(Adaptation(), **{name: value})
    for kind in ("layers", "lora"):
        with pytest.raises(ValueError, match="no layer of the model: to_x"):
            Adaptation(kind, targets=["to_q", "to_x"]).apply(network())


def perturb(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(11)) * 0.1)


@pytest.mark.parametrize("kind", ["full", "layers", "lora"])
def test_reference_stays_the_initial_policy(kind: str) -> None:
    actor, adaptation = Actor(network(), CPS(), SHORT), Adaptation(kind, rank=4)
    rollout = act(actor, episode())
    with torch.no_grad():
        initial = actor.evaluate(rollout)
    adaptation.apply(actor.transformer)
    reference = ReferencePolicy(actor, adaptation)
    with torch.no_grad():
        assert torch.equal(actor.evaluate(rollout)["mean"], initial["mean"])
    perturb(actor)
    loss = actor.evaluate(rollout)["mean"].square().sum()
    again = reference.evaluate(rollout)
    assert torch.equal(again["mean"], initial["mean"]) and not again["mean"].requires_grad
    with torch.no_grad():
        assert (actor.evaluate(rollout)["mean"] - initial["mean"]).abs().max() > 1e-2
    # Asking the reference between the policy's forward and backward changes neither what trains nor how.
    interleaved = gradients(actor, loss)
    trainable = {name for name, p in actor.named_parameters() if p.requires_grad}
    assert all(("lora_" in name) == (kind == "lora") for name in trainable)
    assert interleaved.keys() == trainable
    plain = gradients(actor, actor.evaluate(rollout)["mean"].square().sum())
    assert all(torch.equal(plain[name], interleaved[name]) for name in plain)


def test_layers_trains_the_named_layers_and_nothing_else() -> None:
    model = network()
    Adaptation("layers", targets=["to_q", "attn1.to_v"]).apply(model)
    layers = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert layers == {f"blocks.{i}.{end}" for i in range(2) for end in ("attn1.to_q", "attn2.to_q", "attn1.to_v")}


def test_lora_acts_as_the_merged_weights() -> None:
    """Acting and re-scoring go through the adapters, which wrap the linear layers."""
    model = network()
    actor = Actor(model, CPS(), SHORT)
    Adaptation("lora", rank=4).apply(model)
    perturb(actor)
    rollout = act(actor, episode())
    with torch.no_grad():
        before = actor.evaluate(rollout)
        torch.testing.assert_close(before["log_prob"], rollout["log_prob"], atol=1e-5, rtol=0)
        model.fuse_lora()
        model.unload_lora()
        assert not any("lora" in name for name, _ in actor.named_parameters())
        torch.testing.assert_close(actor.evaluate(rollout)["mean"], before["mean"], atol=1e-4, rtol=0)


def test_adapters_are_drawn_by_key() -> None:
    def drawn(seed: int) -> dict[str, Tensor]:
        model = network()
        Adaptation("lora", rank=4).apply(model, seed)
        return {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}

    first = drawn(1)
    before = torch.random.get_rng_state()
    network()  # sets the global generator to the state it had before `apply`
    here = torch.random.get_rng_state()
    second = drawn(1)
    assert torch.equal(torch.random.get_rng_state(), here) and torch.equal(before, here)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other) for name, other in drawn(2).items())


def test_ema_follows_its_formula_and_swaps_back_bit_for_bit() -> None:
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    ema = EMA(layer, decay=0.9)
    weight = layer.weight.detach().clone()
    expected = weight.clone()
    for _ in range(3):
        weight = weight + math.pi
        with torch.no_grad():
            layer.weight.copy_(weight)
        ema.update()
        expected = 0.9 * expected + 0.1 * weight
    with pytest.raises(RuntimeError), ema.swap():
        torch.testing.assert_close(layer.weight.detach(), expected)
        raise RuntimeError
    assert torch.equal(layer.weight.detach(), weight)
    assert ema.state_dict().keys() == {"weight"}
    again = EMA(layer, decay=0.9)
    again.load_state_dict(ema.state_dict())
    assert torch.equal(again.shadow["weight"], ema.shadow["weight"])
    with pytest.raises(ValueError, match="another model: weight"):
        again.load_state_dict({"weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"ema\.decay"):
        EMA(layer, decay=1.0)


def test_settings_load_without_torch() -> None:
    code = "import policies.adapters, policies.causality, sys; assert not {'torch', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
