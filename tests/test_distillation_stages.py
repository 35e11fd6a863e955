"""Teacher, warm-up and distribution matching: what each asks, whom it moves, and in which direction."""

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
from algorithms.distillation.noise import Noise
from algorithms.distillation.pool import LatentPool
from algorithms.distillation.rollouts import Generated, Student
from algorithms.distillation.scores import Discriminator, guided_x0, predict_x0
from algorithms.distillation.settings import DMD, FineTune
from algorithms.distillation.warmup import Teacher
from policies.causal_dit import CausalWanTransformer3DModel
from policies.causality import Causality
from policies.ema import EMA
from policies.sampler import generate
from tests.students import BATCH, LATENT, STEPS, TABLE, fixed, network, silent, student, timeless, weights_gradient


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
        return LatentPool(x0, draw(8, 3, *LATENT, seed=1), draw(8, 5, 6, seed=2), 8)

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
        found = game._critic_loss(who, made, noise, 0)[1]["flow_matching"]
        assert found == pytest.approx(float((v - (noise.eps - made.x0)).square().mean()), rel=1e-4)

    def test_critics_take_several_steps_for_one_of_the_generator(self) -> None:
        game = self.matching(generator_every=3)
        calls: list[tuple[str, int]] = []
        game.generator_step = lambda draw: calls.append(("generator", draw)) or {}
        game.critic_step = lambda draw: calls.append(("critic", draw)) or {}
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
        whole, parts = game._critic_loss(who, made._replace(x0=made.x0.detach()), noise, 1)
        assert float(whole.detach()) == pytest.approx(parts["flow_matching"] + 0.05 * parts["discriminator"], rel=1e-5)
        game.settings = replace(game.settings, r1=2.0)
        dearer, more = game._critic_loss(who, made._replace(x0=made.x0.detach()), noise, 1)
        assert float(dearer.detach()) == pytest.approx(float(whole.detach()) + 0.05 * 2.0 * more["r1"], rel=1e-4)

    def test_a_run_that_was_interrupted_ends_as_one_that_was_not(self, tmp_path: Path) -> None:
        rows: dict[str, list[tuple[int, dict[str, float]]]] = {"whole": [], "first": [], "second": []}

        def train(name: str, updates: int, state: Path | None = None) -> CausalWanTransformer3DModel:
            def record(step: int, metrics: dict[str, float]) -> None:
                rows[name].append((step, timeless(metrics)))

            return self.matching().train(updates, silent, state, every=3, record=record)

        whole = train("whole", 4)
        train("first", 2, tmp_path / "state.pt")
        assert (tmp_path / "state.pt").is_file()
        second = train("second", 4, tmp_path / "state.pt")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
        assert rows["whole"] == rows["first"][:3] + rows["second"], "every step has its row"
        assert [step for step, _ in rows["whole"]] == list(range(1, 9))

    def test_the_discriminator_tells_shifted_clips_from_true_ones(self) -> None:
        game = self.matching(discriminator=1.0, critic_lr=1e-2, shift=0.2)

        def shifted(who: Student) -> Generated:
            return Generated(who.truth + 1.5, who.truth, fixed(who, 1), slice(0, who.truth.shape[1]))

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

        model.parallel = spy
        loss, _ = warmup.teacher_forcing(who, (5,), shift=3.0)
        assert float(loss.detach()) > 0
        (sigma,) = seen
        assert torch.equal(sigma[:, 0], sigma[:, 2]) and torch.equal(sigma[:, 3], sigma[:, 5])
        assert not torch.equal(sigma[:, 0], sigma[:, 3])

    @pytest.mark.parametrize(("share", "expected"), [(0.0, "truth"), (1.0, "own")])
    def test_own_history_is_what_the_student_itself_makes(self, share: float, expected: str) -> None:
        seen: list[tuple[Tensor, Tensor]] = []
        model = network()
        who = student(model, rule=Causality(chunk=3, window=3))
        parallel = model.parallel

        def spy(clean: Tensor, noisy: Tensor, sigma: Tensor, *rest: Any, **more: Any) -> Tensor:
            seen.append((clean[:, :, : LATENT[0]], sigma))
            return parallel(clean, noisy, sigma, *rest, **more)

        model.parallel = spy
        loss, _ = warmup.own_history(who, (5,), share)
        history, sigma = seen[0]
        own = generate(model, who.kernel, who.causality, who.state).latents[:, :, -1]
        torch.testing.assert_close(history, {"truth": who.truth, "own": own}[expected])
        assert len(seen) == 1 and set(sigma.unique().tolist()) <= set(TABLE[:-1].tolist())
        assert torch.equal(sigma[:, 0], sigma[:, 2]) and torch.equal(sigma[:, 3], sigma[:, 5])
        assert weights_gradient(model, loss), "the loss is of frames that carry gradient"
