"""The embedding of the reference image: it reaches the policy on every way, and which frames look at it."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from envs.ar_video import select, start
from envs.gymnasium_env import ARVideoVectorEnv
from envs.rollout import RolloutCollector
from envs.transitions import CPS
from policies.actor import Actor, evaluate
from policies.causality import Causality
from policies.first_frame import FirstFrameWanTransformer3DModel
from policies.sampler import generate, sample_rollout
from tests.pictured import TINY, filled, pictured

BATCH, FRAMES, LATENT, CONTROL = 2, 4, (3, 4, 6), 3
RULES = [Causality(window=2), Causality(chunk=2, window=2, sink=1)]


def episode(image: bool = True, sign: float = 1.0) -> TensorDict:
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    condition = normal(BATCH, FRAMES, 4 + 3 + CONTROL, *LATENT[1:])
    condition[:, 0, :4], condition[:, 1:, :4] = 1, 0
    return start(
        condition=condition,
        text=normal(BATCH, 5, 12),
        sigma_table=torch.tensor([1.0, 0.755, 0.522, 0.0]),
        stochastic=torch.tensor([True, False, False]),
        key=torch.tensor([[3, 0, b, 0] for b in range(BATCH)]),
        latent_shape=LATENT,
        image=sign * normal(BATCH, 5, 10) if image else None,
    )


@pytest.mark.parametrize("frames", ["first", "all"])
def test_a_collected_rollout_keeps_the_image_and_rescores_to_the_same_log_probs(frames: str) -> None:
    actor = Actor(pictured(frames), CPS(), Causality(window=2))
    rollout = RolloutCollector(actor, episode).collect()
    assert torch.equal(rollout["image"], episode()["image"])
    direct = sample_rollout(actor.transformer, actor.transition, actor.causality, episode())
    assert torch.equal(rollout["latents"], direct["latents"]) and torch.equal(direct["image"], rollout["image"])
    with torch.no_grad():
        torch.testing.assert_close(actor.evaluate(rollout)["log_prob"], rollout["log_prob"], atol=1e-5, rtol=0)
        assert torch.equal(actor.replay(rollout)["log_prob"], rollout["log_prob"])
        blind = evaluate(actor.transformer, actor.transition, actor.causality, rollout.exclude("image"))
    assert (blind["log_prob"] - rollout["log_prob"]).abs().max() > 1e-3


def test_another_image_is_another_episode_for_the_actors_memory() -> None:
    actor, rollout = Actor(pictured("all"), CPS(), Causality(window=2)), {}
    for sign in (1.0, -1.0):
        state = episode(sign=sign)
        state["frame"], state["step"] = state["frame"] + 2, state["step"]
        rollout[sign] = actor(state)["action"]
    fresh = Actor(actor.transformer, CPS(), Causality(window=2))
    state = episode(sign=-1.0)
    state["frame"] = state["frame"] + 2
    assert torch.equal(fresh(state)["action"], rollout[-1.0]) and not torch.equal(rollout[1.0], rollout[-1.0])


def test_environments_pass_the_image_on() -> None:
    vector = ARVideoVectorEnv(episode)
    seen, _ = vector.reset()
    after = vector.step(torch.zeros(BATCH, *LATENT))[0]
    assert torch.equal(seen["image"], after["image"]) and "image" in vector.observation_space.spaces
    assert "image" not in select(episode(image=False))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("frames", ["first", "all", "none"])
def test_parallel_equals_cached_whichever_frames_look_at_the_image(frames: str, rule: Causality) -> None:
    model = pictured(frames)
    rollout = sample_rollout(model, CPS(), rule, episode())
    with torch.no_grad():
        torch.testing.assert_close(
            evaluate(model, CPS(), rule, rollout)["log_prob"], rollout["log_prob"], atol=1e-5, rtol=0
        )


def test_by_default_of_the_first_frame_later_frames_see_the_image_through_it_alone() -> None:
    """With no window the frames are on their own: only the first one changes with the image."""
    alone = Causality(window=1, sink=0)
    made = {
        (frames, sign): generate(pictured(frames), CPS(), alone, episode(sign=sign)).latents[:, :, 1]
        for frames in ("first", "all", "none")
        for sign in (1.0, -1.0)
    }
    model, x = pictured("first"), {sign: episode(sign=sign) for sign in (1.0, -1.0)}
    velocities = {}
    for sign, state in x.items():
        inputs = torch.cat([state["latents"], state["condition"]], 2)
        rule = Causality(window=0)
        with torch.no_grad():
            velocities[sign] = model.parallel(
                inputs, inputs, state["sigma"][..., 0], state["text"], causality=rule, image=state["image"]
            )
    assert (velocities[1.0] - velocities[-1.0])[:, 0].abs().min(-1).values.max() > 1e-3
    assert torch.equal(velocities[1.0][:, 1:], velocities[-1.0][:, 1:])
    assert torch.equal(made["none", 1.0], made["none", -1.0])
    assert not torch.equal(made["all", 1.0][:, 0], made["all", -1.0][:, 0])


# a clean first latent


def text_to_video() -> FirstFrameWanTransformer3DModel:
    return filled(FirstFrameWanTransformer3DModel(**TINY, in_channels=3 + CONTROL))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_given_first_frame_ends_on_the_reference_and_rescoring_agrees(rule: Causality) -> None:
    model, state = text_to_video(), episode(image=False)
    assert model.frame_channels == 3 + 4 + 3 + CONTROL
    rollout = sample_rollout(model, CPS(), rule, state)
    reference = state["condition"][:, 0, 4:7]
    torch.testing.assert_close(rollout["latents"][:, 0, -1], reference, atol=1e-6, rtol=0)
    assert (rollout["latents"][:, 1, -1] - state["condition"][:, 1, 4:7]).abs().max() > 0.1
    with torch.no_grad():
        scores = evaluate(model, CPS(), rule, rollout)
    torch.testing.assert_close(scores["log_prob"], rollout["log_prob"], atol=1e-5, rtol=0)
    # What the network is shown of it is finished: other noise of frame 0 changes nothing after it.
    other = state.clone()
    other["latents"][:, 0] += 1
    again = sample_rollout(model, CPS(), rule, other)
    torch.testing.assert_close(again["latents"][:, 1:, -1], rollout["latents"][:, 1:, -1], atol=1e-5, rtol=0)


def test_a_given_first_frame_is_clean_in_every_history() -> None:
    """Also in diffusion forcing's, where each frame of the history is noised to a level of its own."""
    model, state = text_to_video(), episode(image=False)
    inputs, level = torch.cat([state["latents"], state["condition"]], 2), state["sigma"][..., 1]
    noisier, other = inputs.clone(), level.clone()
    noisier[:, 0, :3] += 1
    other[:, 0] = 0.9
    with torch.no_grad():
        one, two = (
            model.parallel(past, inputs, level, state["text"], causality=Causality(), history_sigma=sigma)
            for past, sigma in ((inputs, level), (noisier, other))
        )
    assert torch.equal(one, two)


def test_text_to_video_never_sees_mask_and_reference_of_later_frames() -> None:
    model, state = text_to_video(), episode(image=False)
    inputs = torch.cat([state["latents"], state["condition"]], 2)
    changed = inputs.clone()
    changed[:, 1:, 3 + 4 : 3 + 4 + 3] += 1
    both = (inputs, changed)
    with torch.no_grad():
        one, two = (model.parallel(x, x, state["sigma"][..., 0], state["text"], causality=Causality()) for x in both)
    assert torch.equal(one, two)


def test_gradient_reaches_no_weight_through_a_given_frame() -> None:
    model, state = text_to_video(), episode(image=False)
    inputs = torch.cat([state["latents"], state["condition"]], 2)
    v = model.parallel(inputs, inputs, state["sigma"][..., 0], state["text"], causality=Causality())
    given = torch.autograd.grad(v[:, 0].sum(), list(model.parameters()), retain_graph=True, allow_unused=True)
    assert all(g is None or not g.any() for g in given)
    (later,) = torch.autograd.grad(v[:, 1].sum(), [model.proj_out.weight])
    assert later.any()
