"""Speed of the policy: re-scoring, acting, generating. Every comparison checks that both sides agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from benchmarks.measure import race
from data.clip import ClipBatch
from envs.ar_video import step
from envs.rollout import assemble_rollout
from envs.transitions import log_prob
from policies.actor import Actor
from runtime.session import Session

RESCORING_GOAL, CACHE_GOAL = 4.0, 3.0
AGREE = 1e-4
Rows = list[dict[str, Any]]


def clip(session: Session) -> ClipBatch:
    """The clip that all of these measurements work on."""
    world = session.settings.world
    return world.batch("train", [0], world.buckets[0])


def beginning(session: Session, batch: int) -> TensorDict:
    """Start of `batch` samples of one clip; they share their stochastic steps, as a group does."""
    return session.episodes.begin(clip(session), batch, session.settings.seed, 0)[0]


@torch.no_grad()
def act(actor: Actor, start: TensorDictBase, forget: bool = False) -> TensorDict:
    """Act a whole episode; `forget` rebuilds the history from the snapshot, frame by frame, at every step."""
    actor.reset()
    state, steps = start.copy(), []
    for _ in range(start["stochastic"][0].numel()):
        if forget:
            actor.reset()
        actor(state)
        after = step(state, state["action"])[0]
        reward = {"reward": state["log_prob"].new_zeros(len(start), 1)}
        steps.append(state.select("action", "log_prob").set("next", TensorDict(reward, [len(start)])))
        state = after
    return assemble_rollout(start, torch.stack(steps, 1))


def replay(actor: Actor, rollout: TensorDictBase, steps: Iterable[tuple[int, int]], learn: bool) -> Tensor:
    """Log-probs `[B,M,N]` of the given (frame, step) pairs, one call after the other, through the cache.

    With `learn` every step's graph is freed by its own backward, unless the history carries gradient.
    """
    player = Actor(actor.transformer, actor.transition, actor.causality)
    state = rollout.select("condition", "text", "sigma", "key", "image", strict=False)
    latents, sigma = rollout["latents"], rollout["sigma"][..., None, None, None]
    scores, total = torch.zeros_like(rollout["log_prob"]), latents.new_zeros(())
    for m, n in steps:
        x = latents[:, :, -1].clone()
        x[:, m] = latents[:, m, n]
        v = player.velocity(state.set("latents", x), m, n)
        moments = actor.transition.moments(x[:, m], v, sigma[:, m, n], sigma[:, m, n + 1])
        score = torch.where(rollout["stochastic"][:, m, n], log_prob(latents[:, m, n + 1], *moments), 0.0)
        scores[:, m, n] = score.detach()
        if learn and actor.causality.history_gradient:
            total = total + score.sum()
        elif learn:
            score.sum().backward()
    if total.requires_grad:
        total.backward()
    return scores


def parallel(actor: Actor, rollout: TensorDictBase, learn: bool) -> Tensor:
    """Log-probs `[B,M,N]` through `Actor.evaluate`."""
    scores = actor.evaluate(rollout)["log_prob"]
    if learn:
        scores.sum().backward()
    return scores.detach()


def passes(actor: Actor, batch: int, action: Callable[[], object]) -> str:
    """Count what goes through the network's blocks in `action`, such as `27 calls, 35 frames`."""
    groups: list[int] = []

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        groups.append(len(args[0]) // batch)

    blocks: Any = actor.transformer.blocks
    handle = blocks[0].register_forward_pre_hook(count)
    try:
        action()
    finally:
        handle.remove()
    return f"{len(groups)} calls, {sum(groups)} frames"


def rescoring(session: Session, batches: list[int], repeats: int) -> Rows:
    """One parallel pass against replay, with and without gradient."""
    rows = []
    for batch in batches:
        rollout = act(session.actor, beginning(session, batch))
        for learn in (False, True):
            with torch.set_grad_enabled(learn):
                rows.append(_rescore(session, rollout, learn, repeats))
    return rows


def _rescore(session: Session, rollout: TensorDictBase, learn: bool, repeats: int) -> dict[str, Any]:
    actor, (frames, steps) = session.actor, rollout["stochastic"].shape[1:]
    every = [(m, n) for m in range(frames) for n in range(steps)]
    scored = [pair for pair in every if bool(rollout["stochastic"][(slice(None), *pair)].any())]
    ways: dict[str, Callable[[], Tensor]] = {
        "parallel": partial(parallel, actor, rollout, learn),
        "same steps": partial(replay, actor, rollout, scored, learn),
        "every step": partial(replay, actor, rollout, every, learn),
    }
    for name, way in ways.items():
        _agree(f"re-scoring, {name}", way(), rollout["log_prob"])
    counts = {name: passes(actor, len(rollout), way) for name, way in ways.items()}
    seconds = race(ways, repeats, session.synchronize)
    session.actor.zero_grad(set_to_none=True)
    gain = seconds["same steps"] / seconds["parallel"]
    return {
        "batch": len(rollout),
        "gradient": learn,
        **{f"{name}, s": value for name, value in seconds.items()},
        "faster than same steps": gain,
        "faster than every step": seconds["every step"] / seconds["parallel"],
        "goal": RESCORING_GOAL,
        "met": gain >= RESCORING_GOAL,
        "passes": counts,
    }


def caching(session: Session, batches: list[int], repeats: int) -> Rows:
    """A rollout with the cache against one that rebuilds the whole history at every step."""
    rows, actor = [], session.actor
    for batch in batches:
        start = beginning(session, batch)
        ways: dict[str, Callable[[], TensorDict]] = {
            "cached": partial(act, actor, start),
            "recomputed": partial(act, actor, start, forget=True),
        }
        _agree("cached rollout", ways["cached"]()["latents"], ways["recomputed"]()["latents"])
        counts = {name: passes(actor, batch, way) for name, way in ways.items()}
        seconds = race(ways, repeats, session.synchronize)
        gain = seconds["recomputed"] / seconds["cached"]
        rows.append(
            {
                "batch": batch,
                **{f"{name}, s": value for name, value in seconds.items()},
                "faster": gain,
                "goal": CACHE_GOAL,
                "met": gain >= CACHE_GOAL,
                "passes": counts,
            }
        )
    return rows


def generating(session: Session, batches: list[int], repeats: int) -> Rows:
    """Frames per second from an episode's start: latent frames without decoding, pixel frames with it."""
    rows, decode = [], session.episodes.networks.video.decode
    for batch in batches:
        start = beginning(session, batch)
        latents = act(session.actor, start)["latents"][:, :, -1]
        ways: dict[str, Callable[[], object]] = {
            "acting": partial(act, session.actor, start),
            "decoding": partial(decode, latents),
        }
        seconds = race(ways, repeats, session.synchronize)
        pixels = batch * decode(latents[:1]).shape[2]
        rows.append(
            {
                "batch": batch,
                **{f"{name}, s": value for name, value in seconds.items()},
                "latent frames per s": latents.shape[:2].numel() / seconds["acting"],
                "pixel frames per s": pixels / sum(seconds.values()),
            }
        )
    return rows


def _agree(name: str, one: Tensor, other: Tensor) -> None:
    gap = float((one - other).abs().max())
    if not gap <= AGREE:
        raise RuntimeError(f"{name}: the two sides differ by {gap:.1e}, so their speeds cannot be compared")
