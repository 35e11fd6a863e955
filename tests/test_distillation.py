"""Rollouts in training against inference, gradients against a slow reference, and the stages' steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms.distillation import strategies, warmup
from algorithms.distillation.dmd import DistributionMatching, Players
from algorithms.distillation.finetune import add_control, bidirectional, finetune, fresh, velocity
from algorithms.distillation.rollouts import Generated, Student, at_exits, exit_steps, on_noised_truth, on_truth, window
from algorithms.distillation.scores import Discriminator, Noise, guided_x0, predict_x0
from algorithms.distillation.settings import DMD, FineTune
from algorithms.distillation.warmup import Teacher
from algorithms.pretraining.flow import LatentPool
from envs.ar_video import start
from envs.transitions import CPS, ODE
from policies.actor import Actor
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.ema import EMA
from policies.kv_cache import KVCache
from policies.sampler import generate

BATCH, LATENT, STEPS = 3, (2, 4, 4), 3
TABLE = torch.tensor([1.0, 0.755, 0.522, 0.0])
SHORT = Causality(window=2)


def network(seed: int = 0, control: bool = True) -> CausalWanTransformer3DModel:
    """A very small model with weights far from zero."""
    model = CausalWanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=(3 if control else 2) * LATENT[0] + 4,
        out_channels=LATENT[0],
        text_dim=6,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=32,
    )
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.15)
    return model.eval()


def student(
    model: CausalWanTransformer3DModel, frames: int = 6, rule: Causality = SHORT, key: int = 0, kernel: Any = None
) -> Student:
    """The student before clips of random conditions."""
    draw = torch.Generator().manual_seed(1)
    state = start(
        condition=torch.randn(BATCH, frames, 4 + 2 * LATENT[0], *LATENT[1:], generator=draw),
        text=torch.randn(BATCH, 5, 6, generator=draw),
        sigma_table=TABLE,
        stochastic=torch.tensor([True, True, False]),
        key=torch.tensor([[7, key, b, 0] for b in range(BATCH)]),
        latent_shape=LATENT,
        share_initial_noise=False,
    )
    truth = torch.randn(BATCH, frames, *LATENT, generator=draw)
    return Student(model, kernel or CPS(eta=1.0), rule, state, truth)


def silent(line: str) -> None:
    """No report."""


def fixed(who: Student, step: int) -> Tensor:
    return torch.full(who.truth.shape[:2], step)


def weights_gradient(model: CausalWanTransformer3DModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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
    def test_gradients_equal_frame_by_frame_passes_with_a_rolling_cache(self, chunk: int, checkpointing: bool) -> None:
        """21 frames, cache of 7: the parallel pass against a slow reference, under gradient checkpointing too."""
        rule = Causality(chunk=chunk, window=7)
        who = student(network(), frames=21, rule=rule)
        exits = exit_steps(who, "per_frame")
        weight = torch.randn(who.truth.shape, generator=torch.Generator().manual_seed(3))
        slow = weights_gradient(who.network, (self.slowly(who, exits) * weight).sum())
        if checkpointing:
            who.network.train().enable_gradient_checkpointing()
        fast = weights_gradient(who.network, (at_exits(who, exits, collapse=False).x0 * weight).sum())
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
    masks = [window(student(model, rule=rule, key=k), frames)[0] for k in range(40)]
    assert torch.stack(masks).any(0).all(), "every frame is in some window"
    assert all(int(mask.int().argmax()) % chunk == 0 and int(mask.sum()) <= wide for mask in masks)
    assert max(int(mask.sum()) for mask in masks) == min(wide, 6)
    who = student(model, rule=rule)
    made = strategies.Windowed(frames=frames)(who)
    assert torch.equal(made.mask[0], masks[0]) and torch.equal(made.frames, strategies.SelfRollout()(who).frames)


class TestTeacher:
    def test_control_starts_without_effect(self) -> None:
        plain = network(control=False)
        both, x = add_control(plain), torch.randn(BATCH, 6, *LATENT)
        who = student(both)
        sigma, condition = torch.full((BATCH, 6), 0.5), who.state["condition"]
        before = velocity(plain, x, sigma, condition[:, :, : -LATENT[0]], who.state["text"])
        torch.testing.assert_close(velocity(both, x, sigma, condition, who.state["text"]), before, atol=1e-6, rtol=0)
        with pytest.raises(ValueError, match="takes 8 channels, this one 10"):
            add_control(both)

    def test_a_fresh_model_has_no_control_until_it_is_trained_with_it(self) -> None:
        model, pool = fresh(network(), seed=3), self.pool()
        twin = fresh(network(), seed=3)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        control = model.patch_embedding.weight[:, -LATENT[0] :]
        for wanted in (False, True):
            finetune([pool], FineTune(control=wanted, batch=4, pool=8), model, torch.zeros(1, 5, 6), 3, report=silent)
            assert bool(control.abs().max() > 0) == wanted

    def test_it_is_diffusers_bidirectional_forward(self) -> None:
        model, x = network(), torch.randn(BATCH, 6, *LATENT)
        who = student(model)
        video = torch.cat([x, who.state["condition"]], 2).transpose(1, 2)
        with torch.no_grad():
            ours = velocity(model, x, torch.full((BATCH, 6), 0.5), who.state["condition"], who.state["text"])
            theirs = model(video, torch.full((BATCH,), 500.0), who.state["text"]).sample.transpose(1, 2)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert bidirectional(6).visible(1, 0, 1, 5)

    def test_guidance_is_cond_plus_g_times_the_difference(self) -> None:
        model, who = network(), student(network())
        x, sigma, negative = torch.randn(BATCH, 6, *LATENT), torch.full((BATCH, 6), 0.5), torch.randn(1, 5, 6)
        condition, text = who.state["condition"], who.state["text"]
        with torch.no_grad():
            cond = predict_x0(model, x, sigma, condition, text)
            uncond = predict_x0(model, x, sigma, condition, negative.expand(BATCH, -1, -1))
            torch.testing.assert_close(
                guided_x0(model, x, sigma, condition, text, negative, 3.0), 4 * cond - 3 * uncond, atol=1e-5, rtol=1e-4
            )
            assert torch.equal(guided_x0(model, x, sigma, condition, text, negative, 0.0), cond)

    def pool(self) -> LatentPool:
        """Eight times the same clip, with different conditions."""

        def draw(*shape: int, seed: int) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        x0 = draw(1, 3, *LATENT, seed=0).repeat(8, 1, 1, 1, 1)
        return LatentPool(x0, draw(8, 3, *LATENT, seed=1), draw(8, 5, 6, seed=2))

    def test_the_teacher_is_asked_with_its_guidance(self) -> None:
        model, who = network(), student(network())
        x, sigma, negative = torch.randn(BATCH, 6, *LATENT), torch.full((BATCH, 6), 0.5), torch.randn(1, 5, 6)
        rest = (x, sigma, who.state["condition"], who.state["text"])
        with torch.no_grad():
            expected = guided_x0(model, *rest, negative, 2.0)
        assert torch.equal(Teacher(model, negative, 2.0).x0(*rest), expected)

    def test_clips_are_noised_at_levels_of_the_shifted_table(self) -> None:
        like = torch.zeros(4000, 2, 1, 1, 1)
        noise = Noise.draw(like, (1,), 5.0)
        assert torch.equal(noise.sigma[:, 0], noise.sigma[:, 1])
        u = (torch.arange(4000) + 0.5) / 4000
        expected = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)
        assert (noise.sigma[:, 0].sort().values - expected).abs().max() < 0.03
        assert not torch.equal(noise.eps, Noise.draw(like, (2,), 5.0).eps)

    def test_some_prompts_give_way_to_the_negative_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Tensor] = []
        real = velocity

        def spy(model: Any, x: Tensor, sigma: Tensor, condition: Tensor, text: Tensor) -> Tensor:
            seen.append(text)
            return real(model, x, sigma, condition, text)

        monkeypatch.setattr("algorithms.distillation.finetune.velocity", spy)
        negative = torch.full((1, 5, 6), 7.0)
        finetune([self.pool()], FineTune(batch=8, pool=8, text_dropout=0.25), network(), negative, 40, report=silent)
        share = float((torch.stack(seen) == 7.0).all((2, 3)).float().mean())
        assert share == pytest.approx(0.25, abs=0.07)

    def test_finetuning_learns_the_point_mass(self) -> None:
        lines: list[str] = []
        stage = FineTune(batch=4, lr=0.01, ema=0.0, pool=8)
        finetune([self.pool()], stage, network(), torch.zeros(1, 5, 6), 200, report=lines.append)
        first, last = (float(line.split()[3]) for line in (lines[0], lines[-1]))
        assert last < 0.5 * first


def player(seed: int = 0) -> Players:
    teacher = network(3).requires_grad_(False)
    made = Players(
        network(seed).requires_grad_(True),
        network(4).requires_grad_(True),
        Discriminator(teacher, [0, 1], 8),
        Teacher(teacher, torch.zeros(1, 5, 6), 1.0),
    )
    return made


class TestDistributionMatching:
    def matching(self, **changes: Any) -> DistributionMatching:
        players = player()
        settings = replace(DMD(generator_every=2, lr=1e-3, critic_lr=1e-3, layers=[0, 1]), **changes)
        return DistributionMatching(
            players, settings, strategies.SelfRollout(), lambda draw: student(players.student, key=draw), seed=0
        )

    def test_each_step_moves_its_own_side_only(self) -> None:
        game = self.matching()
        sides = {"student": game.weights, "critic": game.critics}
        for step, moved in ((game.generator_step, "student"), (game.critic_step, "critic")):
            before = {name: [p.detach().clone() for p in side] for name, side in sides.items()}
            step(0)
            for name, side in sides.items():
                same = [torch.equal(a, b) for a, b in zip(before[name], side, strict=True)]
                assert all(same) if name != moved else not any(same[:3]), name
        assert all(p.grad is None for p in game.players.teacher.network.parameters())

    def test_the_generator_follows_the_gap_of_the_scores(self) -> None:
        """Where fake and real agree, and nobody discriminates, the student stays."""
        game = self.matching(adversarial=0.0)
        game.players.fake.load_state_dict(game.players.teacher.network.state_dict())
        game.players.teacher = replace(game.players.teacher, guidance=0.0)
        before = [p.detach().clone() for p in game.weights]
        metrics = game.generator_step(0)
        assert metrics["dmd"] == 0
        assert all(torch.equal(a, b) for a, b in zip(before, game.weights, strict=True))

    def test_the_student_is_drawn_from_the_fake_score_to_the_real_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        game = self.matching(adversarial=0.0)
        who = game.begin(0)
        made = game.strategy(who)
        noise = Noise.draw(made.x0, (0,), 5.0)
        monkeypatch.setattr(Teacher, "x0", lambda self, x, *rest: torch.full_like(x, 3.0))
        monkeypatch.setattr("algorithms.distillation.dmd.predict_x0", lambda model, x, *rest: torch.full_like(x, -3.0))
        (gradient,) = torch.autograd.grad(game._generator_loss(who, made, noise)[0], made.x0)
        assert bool((gradient < 0).all()), "descent raises x0, towards 3"

    def test_the_student_is_drawn_to_what_the_discriminator_takes_for_real(self) -> None:
        game = self.matching()
        who = game.begin(0)
        made = game.strategy(who)
        noise = Noise.draw(made.x0, (0,), 0.5)
        game.players.fake.load_state_dict(game.players.teacher.network.state_dict())
        game.players.teacher = replace(game.players.teacher, guidance=0.0)
        (gradient,) = torch.autograd.grad(game._generator_loss(who, made, noise)[0], made.x0)

        def logits(x0: Tensor) -> float:
            with torch.no_grad():
                return float(game.players.judge(noise.on(x0), noise.sigma, *conditions).mean())

        conditions = (who.state["condition"], who.state["text"])
        step = 0.05 * gradient / gradient.abs().max()
        assert logits(made.x0 - step) > logits(made.x0) > logits(made.x0 + step)

    def test_the_fake_score_learns_the_students_clips(self) -> None:
        game = self.matching(adversarial=0.0)
        who = game.begin(0)
        made = game.strategy(who)
        made = made._replace(x0=made.x0.detach())
        noise = Noise.draw(made.x0, (0,), 5.0)
        x = noise.on(made.x0)
        with torch.no_grad():
            v = velocity(game.players.fake, x, noise.sigma, who.state["condition"], who.state["text"])
        found = game._critic_loss(who, made, noise, noise.eps)[1]["flow_matching"]
        assert found == pytest.approx(float((v - (noise.eps - made.x0)).square().mean()), rel=1e-4)

    def test_what_the_window_leaves_out_is_not_moved(self) -> None:
        game = self.matching()
        game.strategy = strategies.Windowed(frames=2)
        who = game.begin(0)
        made = game.strategy(who)
        (gradient,) = torch.autograd.grad(game._generator_loss(who, made, Noise.draw(made.x0, (0,), 5.0))[0], made.x0)
        assert torch.equal(gradient.abs().amax((2, 3, 4)) > 0, made.mask)

    def test_critics_take_several_steps_for_one_of_the_generator(self) -> None:
        game = self.matching(generator_every=3)
        calls: list[tuple[str, int]] = []
        game.generator_step = lambda draw: calls.append(("generator", draw)) or {}  # type: ignore[method-assign, func-returns-value]
        game.critic_step = lambda draw: calls.append(("critic", draw)) or {}  # type: ignore[method-assign, func-returns-value]
        game.train(2, silent)
        assert [name for name, _ in calls] == (["generator"] + ["critic"] * 3) * 2
        assert len({draw for _, draw in calls}) == len(calls), "nobody sees another's clips"

    def test_a_gradient_that_is_not_finite_stops_before_the_weights(self) -> None:
        game = self.matching()
        before = [p.detach().clone() for p in game.weights]
        with torch.no_grad():
            game.players.judge.heads[0][1].weight[0, 0] = float("nan")
        with pytest.raises(FloatingPointError, match="not finite"):
            game.generator_step(0)
        assert all(torch.equal(a, b) for a, b in zip(before, game.weights, strict=True))

    def test_weights_of_the_terms(self) -> None:
        game = self.matching()
        who = game.begin(0)
        made = game.strategy(who)
        noise = Noise.draw(made.x0, (0,), 5.0)
        whole, parts = game._generator_loss(who, made, noise)
        assert float(whole.detach()) == pytest.approx(parts["dmd"] + 0.1 * parts["adversarial"], rel=1e-5)
        other = Noise.draw(made.x0, (1,), 5.0).eps
        whole, parts = game._critic_loss(who, made._replace(x0=made.x0.detach()), noise, other)
        assert float(whole.detach()) == pytest.approx(parts["flow_matching"] + 0.05 * parts["discriminator"], rel=1e-5)
        game.settings = replace(game.settings, r1=2.0)
        dearer, more = game._critic_loss(who, made._replace(x0=made.x0.detach()), noise, other)
        assert float(dearer.detach()) == pytest.approx(
            float(whole.detach()) + 0.05 * 2.0 * more["gradient_penalty"], rel=1e-4
        )

    def test_a_run_that_was_interrupted_ends_as_one_that_was_not(self, tmp_path: Path) -> None:
        whole = self.matching().train(4, silent)
        self.matching().train(2, silent, tmp_path / "state.pt", every=3)
        assert (tmp_path / "state.pt").is_file()
        second = self.matching().train(4, silent, tmp_path / "state.pt", every=3)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))

    def test_the_discriminator_tells_shifted_clips_from_true_ones(self) -> None:
        game = self.matching(discriminator=1.0, critic_lr=1e-2, shift=0.2)

        def shifted(who: Student) -> Generated:
            ones = torch.ones(who.truth.shape[:2])
            return Generated(who.truth + 1.5, who.truth, ones.long(), ones.bool())

        game.strategy = shifted
        rows = [game.critic_step(draw) for draw in range(60)]
        who = game.begin(0)
        noise = Noise.draw(who.truth, (9,), 0.2)
        conditions = (who.state["condition"], who.state["text"])
        with torch.no_grad():
            true, false = (
                game.players.judge(noise.on(x), noise.sigma, *conditions) for x in (who.truth, who.truth + 1.5)
            )
        assert float(true.mean()) > 0 > float(false.mean())
        assert sum(row["discriminator_accuracy"] for row in rows[-10:]) / 10 > 0.8


class TestWarmup:
    def test_a_finer_table_goes_through_the_levels_of_the_student(self) -> None:
        table = warmup.finer(TABLE, 4)
        assert len(table) == 13 and torch.equal(table[::4], TABLE) and bool((table.diff() < 0).all())

    def test_the_teachers_path_ends_where_its_own_sampler_does(self) -> None:
        """A student that is the teacher, with one chunk for the clip, already predicts it at the last fine step."""
        model = network()
        who = student(model, rule=bidirectional(6))
        teacher = Teacher(model, torch.zeros(1, 5, 6), 0.0)
        last = fixed(who, STEPS - 1)
        loss, _ = warmup.ode_initialisation(who, teacher, last, substeps=1)
        assert float(loss.detach()) == pytest.approx(0, abs=1e-10)
        loss, _ = warmup.ode_initialisation(who, teacher, last, substeps=4)
        assert float(loss.detach()) > 1e-6

    def test_consistency_is_zero_on_straight_paths(self) -> None:
        """A model with velocity 0 predicts x everywhere, and its ODE never moves."""
        model = network()
        torch.nn.init.zeros_(model.proj_out.weight)
        torch.nn.init.zeros_(model.proj_out.bias)
        who, teacher = student(model), Teacher(model, torch.zeros(1, 5, 6), 1.0)
        loss, _ = warmup.consistency(who, EMA(model, 0.9), teacher, (5,), substeps=4, huber=0.0)
        assert float(loss.detach()) == 0
        other = Teacher(network(3), torch.zeros(1, 5, 6), 1.0)
        assert float(warmup.consistency(who, EMA(model, 0.9), other, (5,), substeps=4, huber=0.0)[0].detach()) > 0

    def test_consistency_asks_at_two_neighbouring_levels_of_the_finer_table(self) -> None:
        model, asked = network(), []
        who = student(model)
        real = Student.predict

        class Spy(Student):
            def predict(self, history: Tensor, x: Tensor, sigma: Tensor, history_sigma: Tensor | None = None) -> Tensor:
                asked.append(sigma)
                return real(self, history, x, sigma, history_sigma)

        spy = Spy(who.network, who.kernel, who.causality, who.state, who.truth)
        warmup.consistency(spy, EMA(model, 0.9), Teacher(model, torch.zeros(1, 5, 6), 1.0), (5,), substeps=4, huber=0.0)
        table = warmup.finer(TABLE, 4)
        later, now = ((table[:, None] == sigma[:, 0]).int().argmax(0) for sigma in asked)
        assert torch.equal(later, now + 1)

    def test_teacher_forcing_gives_each_chunk_a_level_of_its_own(self) -> None:
        seen: list[Tensor] = []
        model = network()
        who = student(model, rule=Causality(chunk=3, window=3))
        parallel = model.parallel

        def spy(clean: Tensor, noisy: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
            seen.append(sigma)
            return parallel(clean, noisy, sigma, *rest, **more)

        model.parallel = spy  # type: ignore[method-assign]
        loss, _ = warmup.teacher_forcing(who, (5,), shift=3.0)
        assert float(loss.detach()) > 0
        (sigma,) = seen
        assert torch.equal(sigma[:, 0], sigma[:, 2]) and torch.equal(sigma[:, 3], sigma[:, 5])
        assert not torch.equal(sigma[:, 0], sigma[:, 3])
