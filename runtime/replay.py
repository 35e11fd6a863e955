"""Replay bundles: an update that was not finite, computed again from what was kept of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict
from torch import Tensor

from runtime import checkpoint, state
from runtime.guard import NonFinite

if TYPE_CHECKING:
    from runtime.session import Session


@dataclass(frozen=True)
class Bundle:
    """What was kept.

    Attributes:
        point: what was found not to be finite first; see `runtime.guard.POINTS`.
        what: more about it.
        rollout: of all processes, as far as the update had come; empty where it had not begun.
        rows: of the mini-batch that was being learned from; None before learning.
    """

    point: str
    what: str
    rollout: TensorDict
    rows: Tensor | None


def opened(session: Session, folder: Path) -> Bundle:
    """Read a bundle and put its weights into a session of its config.

    Raises:
        FileNotFoundError, ValueError: see `checkpoint.load`.
    """
    snapshot = checkpoint.load(folder, 0)
    notes = snapshot.counters
    parts = [checkpoint.load(folder, rank).tensors["rollout"] for rank in range(int(notes["processes"]))]
    whole = {key: torch.cat([part[key] for part in parts if key in part]) for key in parts[0] | parts[-1]}
    size = max((len(value) for value in whole.values()), default=0)
    rollout = TensorDict(whole, batch_size=[size]).unflatten_keys(".").to(session.device)
    state.restore(session, snapshot, optimizer=False)
    rows = None if notes["rows"] is None else torch.tensor(notes["rows"], device=session.device)
    return Bundle(notes["point"], notes["what"], rollout, rows)


def kept(bundle: Bundle) -> list[str]:
    """What is not finite in what was kept of the rollout; a line each."""
    return [f"kept {key}: {text}" for key, value in bundle.rollout.items(True, True) if (text := _odd(value))]


def scored(session: Session, bundle: Bundle) -> list[str]:
    """What is not finite where the kept latents, which are, are decoded and scored again; a line or none.

    `acted` comes before it: it makes the clips that rewards need.
    """
    latents = bundle.rollout.get("latents", None)
    if latents is None or not bool(latents.isfinite().all()):
        return []
    rollout = bundle.rollout.clone()
    try:
        session.score(rollout, session.decode(rollout))
    except NonFinite as found:
        return [f"decoding and scoring again: {found}"]
    return []


def learned(session: Session, bundle: Bundle) -> list[str]:
    """What is not finite in loss and gradient of the mini-batch, computed again; a line each."""
    if bundle.rows is None:
        return []
    found = session.loss_module(bundle.rollout[bundle.rows])
    losses = {name: value for name, value in found.items() if name.startswith("loss_")}
    lines = [f"{name}: {float(value.detach())}" for name, value in losses.items() if not bool(value.isfinite())]
    sum(losses.values()).backward()  # type: ignore[union-attr]
    modules = {"network": session.episodes.networks.transformer, "critic": session.critic}
    named = [(f"{k}.{n}", p) for k, m in modules.items() if m is not None for n, p in m.named_parameters()]
    odd = [name for name, p in named if p.grad is not None and not bool(p.grad.isfinite().all())]
    return lines + ([f"gradient: not finite in {len(odd)} tensors, first {odd[0]}"] if odd else [])


def acted(session: Session, bundle: Bundle) -> tuple[list[str], str]:
    """Act again from the same weights and draws: what is not finite (a line or none), and whether that gives the
    rollout that was kept.
    """
    try:
        again = session.rollout()["latents"]
    except NonFinite as found:
        return [f"acting again: {found}"], ""
    old = bundle.rollout.get("latents", None)
    if old is None:
        return [], "acting again: every latent is finite"
    gap = (old - again).abs().nan_to_num(torch.inf).max()
    same = torch.equal(old, again)
    what = "the same latents" if same else f"finite; differs from what was kept by {float(gap):.2e}"
    return [], f"acting again: {what}"


def _odd(value: Tensor) -> str:
    """Which samples are not finite; empty where all are."""
    rows = (~value.isfinite().flatten(1).all(1)).nonzero().flatten().tolist() if value.is_floating_point() else []
    return f"not finite in samples {', '.join(map(str, rows[:8]))}{' ...' if len(rows) > 8 else ''}" if rows else ""
