"""What will happen, said before it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from envs.schedules import picture

if TYPE_CHECKING:
    from runtime.session import Session


def describe(session: Session) -> str:
    """A short plan of a run: networks, sizes, schedule picture, what one update is."""
    s, r = session.settings, session.settings.rollout
    networks = session.episodes.networks
    trainable = sum(p.numel() for p in session.parameters)
    total = sum(p.numel() for p in networks.transformer.parameters())
    terms = " + ".join(f"{term.weight:g} {name}" for name, term in s.reward.items())
    lines = [
        f"model      {s.model.label}: {total / 1e6:.2f} M parameters, "
        f"{trainable / 1e6:.2f} M train, on {session.device} ({torch.get_num_threads()} threads)",
        f"world      {type(s.world).__name__.lower()}: sizes {', '.join(f'{h}x{w}' for h, w in s.world.buckets)}, "
        f"{r.frames} latent = {4 * r.frames - 3} pixel frames",
        f"reward     {terms}; motion found by {type(s.tracker).__name__}, "
        f"judged by {type(s.evaluation.tracker).__name__}",
        f"update     {r.prompts} prompts x {r.group_size} samples x {r.frames} frames x {len(r.sigmas) - 1} steps, "
        f"{s.algorithm.epochs * s.algorithm.minibatches} optimizer step(s); {s.updates} updates, seed {s.seed}",
        f"run        {session.run_dir}",
        f"schedule   {type(s.schedule).__name__.lower()}, transition {s.transition.name} (one draw; rows are frames)",
        schedule_picture(session),
    ]
    return "\n".join(lines)


def schedule_picture(session: Session) -> str:
    """The schedule's picture with its warnings; see `envs.schedules.picture`."""
    r = session.settings.rollout
    sigma = torch.tensor(r.sigmas).expand(r.frames, -1)
    return picture(session.settings.schedule, sigma, session.settings.transition, session.settings.seed)
