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
    trainable = sum(_size(p) for p in session.parameters)
    total = sum(_size(p) for p in networks.transformer.parameters())
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
        *_engine(session),
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


def _size(parameter: torch.nn.Parameter) -> int:
    """Number of values, also where ZeRO-3 has split the parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _engine(session: Session) -> list[str]:
    """A line about the engine, where it is not one process of plain float32."""
    e, team = session.settings.engine, session.team
    parts = [f"DeepSpeed ZeRO-{e.stage}"] if e.distributed else []
    parts += [f"{team.size} processes"] if team.size > 1 else []
    parts += [f"{e.accumulation} parts of a mini-batch each"] if e.accumulation > 1 else []
    parts += [e.precision] if e.precision != "fp32" else []
    parts += ["activations computed twice"] if e.activation_checkpointing else []
    return [f"engine     {', '.join(parts)}"] if parts else []
