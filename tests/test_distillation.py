"""Rollouts in training against inference, and their gradients against a slow reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from algorithms.distillation import strategies
from algorithms.distillation.rollouts import Student, at_exits, exit_steps, on_noised_truth, on_truth, window
from envs.transitions import ODE
from policies.actor import Actor
from policies.causality import Causality
from policies.kv_cache import KVCache
from policies.sampler import generate
from tests.students import BATCH, STEPS, TABLE, fixed, network, student, weights_gradient


class TestSelfRollout:
    def test_the_cache_holds_finished_frames_which_are_those_of_inference(self) -> None:
        """Tensor by tensor: what later frames see in training is what the sampler of evaluation makes."""
        who = student(network())
        inference = generate(who.network, who.kernel, who.causality, who.state).latents[:, :, -1]
        acted = self.acted(who)
        for step in range(STEPS):
            made = at_exits(who, fixed(who, step), collapse=False)
            assert torch.equal(made.frames, inference) and torch.equal(made.frames, acted)
            if step < STEPS - 1:
                assert (made.frames - made.x0).abs().max() > 1e-2, "not the guess at the exit step"

    def acted(self, who: Student) -> Tensor:
        """The same clips as the reinforcement learning's actor makes them."""
        from envs.ar_video import step

        actor, state = Actor(who.network, who.kernel, who.causality), who.state
        for _ in range(state["stochastic"].shape[1:].numel()):
            state = step(state, actor(state)["action"])[0]
        return state["latents"]

    def test_at_the_last_step_it_equals_collapse(self) -> None:
        who = student(network())
        last = fixed(who, STEPS - 1)
        ours, theirs = at_exits(who, last, collapse=False), at_exits(who, last, collapse=True)
        torch.testing.assert_close(ours.frames, theirs.frames, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.x0, theirs.x0, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.x0, ours.frames, atol=1e-5, rtol=0)

    def test_before_the_last_step_it_does_not(self) -> None:
        who = student(network())
        ours, theirs = (at_exits(who, fixed(who, 0), collapse=flag) for flag in (False, True))
        assert torch.allclose(ours.x0[:, 0], theirs.x0[:, 0], atol=1e-5), "the first frame has no history"
        assert (ours.x0[:, 1:] - theirs.x0[:, 1:]).abs().max() > 1e-3
        # Collapse writes the prediction itself into the history.
        torch.testing.assert_close(theirs.frames, theirs.x0, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("collapse", [False, True])
    def test_without_gradient_the_prediction_is_that_of_the_rollout(self, collapse: bool) -> None:
        who = student(network(), rule=Causality(chunk=3, window=3))
        exits = exit_steps(who, "per_frame")
        made = at_exits(who, exits, collapse)
        with torch.no_grad():
            torch.testing.assert_close(at_exits(who, exits, collapse).x0, made.x0.detach(), atol=1e-5, rtol=0)

    def test_no_gradient_crosses_frames(self) -> None:
        """d(frame i) / d(noise of frame j < i) is exactly 0; that of its own noise is not (exit step 0)."""
        who = student(network())
        noise = who.state["latents"].clone().requires_grad_(True)
        condition = who.state["condition"]
        inputs = torch.cat([noise, condition], 2)
        with torch.no_grad():
            frames = generate(who.network, who.kernel, who.causality, who.state).latents[:, :, -1]
        history = torch.cat([frames, condition], 2)
        v = who.network.parallel(history, inputs, torch.ones(BATCH, 6), who.state["text"], causality=who.causality)
        for i in range(6):
            (gradient,) = torch.autograd.grad((noise - v)[:, i].square().sum(), noise, retain_graph=True)
            reached = gradient.abs().amax((0, 2, 3, 4)) > 0
            assert reached.tolist() == [j == i for j in range(6)]
        made = at_exits(who, fixed(who, 0), collapse=False)
        torch.testing.assert_close(made.x0, noise - v, atol=1e-6, rtol=0)
        assert not made.frames.requires_grad

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize("chunk", [1, 3])
    @pytest.mark.parametrize(("frames", "window"), [(21, 7), (21, 15), (27, 25)])
    def test_gradients_equal_frame_by_frame_passes_with_a_rolling_cache(
        self, frames: int, window: int, chunk: int, checkpointing: bool
    ) -> None:
        """More frames than the cache holds: the parallel pass against a slow reference, under checkpointing as well."""
        rule = Causality(chunk=chunk, window=window)
        who = student(network(), frames=frames, rule=rule)
        exits = exit_steps(who, "per_frame")
        weight = torch.randn(who.truth.shape, generator=torch.Generator().manual_seed(3))
        slow = weights_gradient(who.network, (self.slowly(who, exits) * weight).sum())
        found = []
        if checkpointing:
            who.network.train().enable_gradient_checkpointing()
            found.append(weights_gradient(who.network, (self.slowly(who, exits) * weight).sum()))
        found.append(weights_gradient(who.network, (at_exits(who, exits, collapse=False).x0 * weight).sum()))
        for fast in found:
            assert fast.keys() == slow.keys()
            for name in fast:
                scale = max(1.0, float(slow[name].abs().max()))
                torch.testing.assert_close(fast[name] / scale, slow[name] / scale, atol=1e-4, rtol=0)

    def slowly(self, who: Student, exits: Tensor) -> Tensor:
        """Each chunk on its own: denoise, predict with gradient at the exit step, commit the finished frames."""
        state, rule = who.state, who.causality
        cache, found = KVCache(rule), []
        chain = generate(who.network, who.kernel, rule, state).latents
        x = chain.take_along_dim(exits[..., None, None, None, None], 2).squeeze(2)
        frames, sigma = x.shape[1], who.levels(exits)
        for first in range(0, frames, rule.chunk):
            part = slice(first, min(first + rule.chunk, frames))
            inputs = torch.cat([x[:, part], state["condition"][:, part]], 2)
            v = who.network.cached(inputs, sigma[:, part], state["text"], cache, first=first)
            found.append(x[:, part] - sigma[:, part, None, None, None] * v)
            clean = torch.cat([chain[:, part, -1], state["condition"][:, part]], 2)
            zeros = torch.zeros_like(sigma[:, part])
            with torch.no_grad():
                who.network.cached(clean, zeros, state["text"], cache, first=first, commit=rule.chunk)
        return torch.cat(found, 1)


@pytest.mark.parametrize("scope", strategies.SCOPES)
def test_exit_steps_are_uniform_keyed_and_shared_by_a_chunk(scope: str) -> None:
    model = network()
    many = [exit_steps(student(model, rule=Causality(chunk=3), key=k), scope) for k in range(200)]
    drawn = torch.cat(many)
    assert torch.equal(drawn[:, :3], drawn[:, :1].expand(-1, 3)) and torch.equal(
        drawn[:, 3:], drawn[:, 3:4].expand(-1, 3)
    )
    assert torch.equal(drawn[:, 0], drawn[:, 3]) == (scope == "per_video")
    share = torch.stack([(drawn == n).float().mean() for n in range(STEPS)])
    assert (share - 1 / 3).abs().max() < 0.06
    assert torch.equal(many[5], exit_steps(student(model, rule=Causality(chunk=3), key=5), scope))


@pytest.mark.parametrize("name", ["SelfRollout", "SelfForcing", "TeacherForcing", "DiffusionForcing", "Windowed"])
def test_clips_are_made_in_bfloat16_arithmetic_too(name: str) -> None:
    """`engine.precision=bf16`, with noise in the steps; levels and predictions stay float32."""
    who = student(network())
    exact = getattr(strategies, name)()(who)
    who.network.autocast_dtype = torch.bfloat16
    made = getattr(strategies, name)()(who)
    assert made.x0.dtype == torch.float32
    torch.testing.assert_close(made.x0, exact.x0, atol=0.3, rtol=0)


def test_teacher_forcing_denoises_given_the_truth() -> None:
    who = student(network(), kernel=ODE())
    exits = exit_steps(who, "per_frame")
    made = on_truth(who, exits)
    # Slowly: a frame alone, with the true ones in the cache.
    for m in range(6):
        history = torch.cat([who.truth, who.state["condition"]], 2)
        for b in range(BATCH):
            x = who.state["latents"][b : b + 1, m : m + 1]
            for n in range(int(exits[b, m]) + 1):
                cache = KVCache(who.causality)
                with torch.no_grad():
                    text = who.state["text"][b : b + 1]
                    for k in range(m):
                        part = history[b : b + 1, k : k + 1]
                        who.network.cached(part, torch.zeros(1, 1), text, cache, first=k, commit=1)
                    inputs = torch.cat([x, who.state["condition"][b : b + 1, m : m + 1]], 2)
                    v = who.network.cached(inputs, TABLE[n].view(1, 1), text, cache, first=m)
                x, x0 = x + (TABLE[n + 1] - TABLE[n]) * v, x - TABLE[n] * v
            torch.testing.assert_close(made.x0[b, m], x0[0, 0], atol=1e-5, rtol=0)


def test_diffusion_forcing_sees_the_noised_truth() -> None:
    """Its history stands at noise levels of its own, 0 among them, and is seen there."""
    who = student(network())
    steps = exit_steps(who, "per_frame", clean=True)
    assert steps.unique().tolist() == [0, 1, 2, 3]
    made = on_noised_truth(who, steps)
    seen, sigma = TABLE[steps], TABLE[steps.clamp(max=2)]

    def level(of: Tensor) -> Tensor:
        return (1 - of[..., None, None, None]) * who.truth + of[..., None, None, None] * who.state["latents"]

    torch.testing.assert_close(made.frames, level(seen))
    assert torch.equal(made.exits, steps.clamp(max=2))
    x = level(sigma)
    torch.testing.assert_close(made.x0, who.predict(level(seen), x, sigma, seen))
    for history, history_sigma in ((who.truth, seen), (made.frames, None)):
        other = who.predict(history, x, sigma, history_sigma)
        assert torch.equal(other[:, 0], made.x0[:, 0]) and not torch.allclose(other, made.x0, atol=1e-3)


@pytest.mark.parametrize(("chunk", "frames", "wide"), [(1, 2, 2), (3, 3, 3), (3, 2, 3), (4, 5, 8)])
def test_a_window_is_of_whole_chunks_and_reaches_every_frame(chunk: int, frames: int, wide: int) -> None:
    model, rule = network(), Causality(chunk=chunk, window=4)
    cuts = [range(6)[window(student(model, rule=rule, key=k), frames)] for k in range(40)]
    assert {m for cut in cuts for m in cut} == set(range(6)), "every frame is in some window"
    assert all(cut[0] % chunk == 0 and len(cut) <= wide for cut in cuts)
    assert max(map(len, cuts)) == min(wide, 6)
    who = student(model, rule=rule)
    made = strategies.Windowed(frames=frames)(who)
    assert range(6)[made.window] == cuts[0] and torch.equal(made.frames, strategies.SelfRollout()(who).frames)
