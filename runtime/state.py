"""The state of a session as tensors: what a run starts from, what a checkpoint holds, what a resumed run puts back."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runtime import checkpoint
from runtime.hardware import processor
from runtime.identity import differences

if TYPE_CHECKING:
    from runtime.session import Session
    from runtime.settings import Settings


def adapt(settings: Settings, transformer: nn.Module) -> None:
    """Choose what trains, starting from the weights of `settings.checkpoint` where there is one.

    Its averaged weights are taken where it has some, for those are what its run evaluated. Weights of the network
    itself fit any adaptation; adapters fit the one that made them.
    """
    adaptation, seed, path = settings.adaptation, settings.seed, settings.checkpoint
    if path is None:
        adaptation.apply(transformer, seed)
        return
    tensors = checkpoint.load(Path(path)).tensors
    weights = tensors.get("ema", tensors["weights"])
    if weights.keys() <= dict(transformer.named_parameters()).keys():
        copy_weights(weights, transformer)
        adaptation.apply(transformer, seed)
    else:
        adaptation.apply(transformer, seed)
        copy_weights(weights, transformer)


def adopt_critic(settings: Settings, critic: nn.Module | None) -> None:
    """Begin with the critic of `settings.checkpoint` where both have one of a kind; say so where they differ."""
    if settings.checkpoint is None or critic is None:
        return
    found = checkpoint.load(Path(settings.checkpoint)).tensors.get("critic")
    if found is None:
        return
    own = critic.state_dict()
    if {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in own.items()}:
        critic.load_state_dict(found)
    else:
        warnings.warn(f"checkpoint={settings.checkpoint} has a critic of another kind; this run begins with a new one")


def tensors_of(session: Session, ema: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """What a checkpoint holds: tensors that are the same in all processes, and those of this process alone."""
    trainer = session.trainer
    with trainer.gathered():
        named = session.episodes.networks.transformer.named_parameters()
        weights = {k: v.detach().cpu().clone() for k, v in named if v.requires_grad}
    common = {"weights": weights}
    if ema and session.ema is not None:
        common["ema"] = session.ema.state_dict()
    if session.critic is not None:
        common["critic"] = session.critic.state_dict()
    own: dict[str, dict[str, Tensor]] = {}
    (own if trainer.sharded else common)["optimizer"] = trainer.tensors()
    return common, own


def resume(session: Session) -> None:
    """Go on from the newest complete checkpoint of the run's folder, where there is one.

    Raises:
        ValueError: it is of another config or number of processes; the line lists the differences.
    """
    team = session.team
    newest = team.share(checkpoint.latest(session.run_dir) if team.main else None)
    if newest is None:
        return
    snapshot = checkpoint.load(newest, team.rank)
    checkpoint.refuse_mismatch(
        {**snapshot.config, "processes": snapshot.counters.get("processes", 1)},
        {**session.config, "processes": team.size},
    )
    base = snapshot.counters.get("base", session.base)
    if base != session.base:
        raise ValueError(
            f"resume=true: the weights that do not train are not those that {newest} was made with; put the model's "
            f"files back, or start a new run from what was learned: checkpoint={newest}"
        )
    now = clips(session)
    if found := differences(snapshot.counters.get("clips", now), now):
        raise ValueError(
            f"resume=true: the clips are not those that {newest} was made with ({'; '.join(found)}), so their numbers "
            f"mean others; put the world's files back, or start a new run from what was learned: checkpoint={newest}"
        )
    if team.main:
        _mention_differences(session, newest, snapshot.counters)
    restore(session, snapshot)


def restore(session: Session, snapshot: checkpoint.Snapshot, optimizer: bool = True) -> None:
    """Put a snapshot's state in place. The network must not be wrapped yet; `finish` does the rest after that."""
    copy_weights(snapshot.tensors["weights"], session.episodes.networks.transformer)
    if session.ema is not None and "ema" in snapshot.tensors:
        session.ema.load_state_dict(snapshot.tensors["ema"])
    if session.critic is not None:
        session.critic.load_state_dict(snapshot.tensors["critic"])
    session.iteration = snapshot.step
    session.watchdog.in_a_row = int(snapshot.counters.get("in_a_row", 0))
    session.moments = snapshot.tensors["optimizer"] if optimizer else None


def _mention_differences(session: Session, folder: Path, counters: Mapping[str, Any]) -> None:
    old = {**checkpoint.read_state(folder).get("versions", {}), **counters.get("machine", {})}
    found = differences(old, {k: v for k, v in {**checkpoint.versions(), **machine(session)}.items() if k in old})
    if found:
        warnings.warn(f"{folder} was written elsewhere ({'; '.join(found)}): the run goes on, not bit for bit")


def machine(session: Session) -> dict[str, Any]:
    """What of the hardware decides the order of sums."""
    here = {"processor": processor(), "threads": torch.get_num_threads()}
    return {**here, "device": session.device.partition(":")[0]}


def clips(session: Session) -> dict[str, int | None]:
    """How many clips there are to draw from and to measure on; None where they are rendered."""
    world, held = session.settings.world, session.settings.evaluation.split
    return {split: world.size(split) for split in ("train", held)}


def notes(session: Session) -> dict[str, Any]:
    """Counters of a checkpoint."""
    return {
        "processes": session.team.size,
        "in_a_row": session.watchdog.in_a_row,
        "base": session.base,
        "clips": clips(session),
        "machine": machine(session),
    }


def fingerprint(*modules: nn.Module) -> str:
    """Hash of the weights that do not train: a checkpoint does not hold them, and a resumed run needs the same.

    Sums of their bits as integers: the same on every device, whatever the order.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, weight in module.named_parameters():
            if not weight.requires_grad:
                bits = weight.detach().contiguous().view({4: torch.int32, 2: torch.int16}[weight.element_size()])
                digest.update(f"{name} {tuple(weight.shape)} {int(bits.sum(dtype=torch.int64))};".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor], network: nn.Module) -> None:
    """Put some of a network's weights in place.

    Raises:
        ValueError: it has no weights of these names.
    """
    own = dict(network.named_parameters())
    odd = sorted(weights.keys() - own.keys())
    if odd:
        raise ValueError(
            f"the checkpoint has weights of adapters ({odd[0]} and {len(odd) - 1} more); use its adaptation"
        )
    for name, value in weights.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)} and not {tuple(own[name].shape)}"
            raise ValueError(f"the checkpoint's {name} is {shapes}; use its model and adaptation")
        own[name].copy_(value)
