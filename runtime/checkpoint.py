"""Checkpoints that are complete or do not exist.

A checkpoint is a folder `checkpoints/step_000020/` of safetensors (weights, optimizer moments) and JSON
(counters, resolved config, versions). Its `manifest.json` holds the SHA-256 of every file and comes last,
through a temporary file, fsync and `os.replace`: a folder without a manifest that fits is debris of a killed
run. Nothing that is read can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.identity import differences, identity
from runtime.team import Team

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
PACKAGES = ("torch", "torchrl", "tensordict", "diffusers", "transformers", "peft", "deepspeed", "numpy")


@dataclass(frozen=True)
class Snapshot:
    """Everything an iteration follows from.

    Attributes:
        step: updates done.
        config: the resolved config.
        tensors: named sets of tensors, one file each: `weights`, `ema`, `optimizer`, ...
        counters: small JSON values beside `step`.
    """

    step: int
    config: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    counters: dict[str, Any] = field(default_factory=dict)


def folder_of(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` updates."""
    return run_dir / FOLDER / f"step_{step:06d}"


def save(run_dir: Path, snapshot: Snapshot, keep: int, best: int = 0) -> Path:
    """Write `run_dir/checkpoints/step_<step>` and drop all but the newest `keep` complete checkpoints, and `best`.

    Returns:
        The folder.
    """
    folder = write(folder_of(run_dir, snapshot.step), snapshot)
    prune(run_dir, keep, best)
    return folder


def write(
    folder: Path, snapshot: Snapshot, team: Team | None = None, own: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Path:
    """Write a checkpoint; where the folder holds it already, nothing.

    Args:
        folder: its name ends with the step.
        snapshot: the same in all processes; the first writes it.
        team: processes that call this together.
        own: tensors of this process alone, written as `<name>_rank<rank>.safetensors`.

    Raises:
        OSError: a process could not write its part. What was written is removed.
    """
    team = team or Team()
    if team.share((folder / MANIFEST).is_file()):  # the same step of the same run is the same checkpoint
        return folder
    phases = (partial(_make, folder, team), partial(_write_part, folder, snapshot, team, own or {}),
              partial(_commit, folder, team))  # fmt: skip
    for phase in phases:
        failed = [error for error in team.collect(phase()) if error]
        if failed:
            if team.main:
                with suppress(OSError):
                    _remove(folder)
            raise OSError(failed[0])
    return folder


def _make(folder: Path, team: Team) -> str:
    """Make an empty folder; returns what went wrong."""
    try:
        if team.main and folder.exists():
            _remove(folder)
        if team.main:
            folder.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return ""


def _write_part(folder: Path, snapshot: Snapshot, team: Team, own: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Write and sync this process's files; returns what went wrong."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    files = {f"{name}_rank{team.rank:04d}": tensors for name, tensors in own.items()}
    if team.main:
        files |= snapshot.tensors
    try:
        for name, tensors in files.items():
            path = folder / f"{name}.safetensors"
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, path)
            _sync(path)
        if team.main:
            state = {
                "step": snapshot.step,
                "counters": snapshot.counters,
                "config": snapshot.config,
                "versions": versions(),
            }
            (folder / STATE).write_text(json.dumps(state, indent=1))
            _sync(folder / STATE)
    except (OSError, SafetensorError) as error:
        return str(error) or type(error).__name__
    return ""


def _commit(folder: Path, team: Team) -> str:
    """Write the manifest, which makes the folder a checkpoint; returns what went wrong."""
    if not team.main:
        return ""
    try:
        files = sorted(p for p in folder.iterdir())
        replace_text(folder / MANIFEST, json.dumps({p.name: sha256(p) for p in files}, indent=1))
        _sync(folder)
        _sync(folder.parent)
    except OSError as error:
        return str(error)
    return ""


def prune(run_dir: Path, keep: int, best: int = 0) -> None:
    """Drop all but the newest `keep` complete checkpoints and that of step `best` (0: none), and debris older than
    the newest.
    """
    steps = complete_steps(run_dir)
    kept = {*steps[-keep:], best}
    newest = steps[-1] if steps else 0
    for folder in _folders(run_dir):
        number = int(folder.name.removeprefix("step_"))
        if number not in kept and number <= newest:
            _remove(folder)


def load(folder: Path, rank: int | None = None) -> Snapshot:
    """Read a checkpoint after verifying the hash of every file.

    Args:
        folder: of the checkpoint.
        rank: put the tensors of this process under their plain name; None: leave out those of single processes.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: a file does not fit its hash, or the folder's name its step.
    """
    from safetensors.torch import load_file

    state = read_state(folder)
    broken = _broken(folder)
    if broken:
        raise ValueError(
            f"checkpoint {folder}: {', '.join(broken)} missing or changed since written; use another checkpoint"
        )
    names = sorted(n for n in json.loads((folder / MANIFEST).read_text()) if n.endswith(".safetensors"))
    tensors = {}
    for name in names:
        stem, own, number = Path(name).stem.partition("_rank")
        if not own or (rank is not None and int(number) == rank):
            tensors[stem] = load_file(folder / name)
    return Snapshot(state["step"], state["config"], tensors, state["counters"])


def latest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Newer folders that are half-written are removed, those that were
    complete and are damaged are set aside as `damaged_step_<step>`, loudly.
    """
    for folder in sorted(_folders(run_dir), reverse=True):
        broken = _broken(folder)
        if not broken:
            return folder
        if (folder / MANIFEST).is_file():
            aside = folder.with_name(f"damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            warnings.warn(f"{folder} is damaged ({', '.join(broken)} missing or changed); set aside as {aside.name}")
        else:
            warnings.warn(f"{folder} is not complete ({', '.join(broken)}); removed")
            _remove(folder)
    return None


def _folders(run_dir: Path) -> list[Path]:
    """Folders of checkpoints, complete or not; others (`step_000040_good`) are somebody's own."""
    return [path for path in (run_dir / FOLDER).glob("step_*") if path.name.removeprefix("step_").isdigit()]


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in `run_dir` that have a manifest, ascending. Hashes are not verified."""
    return sorted(int(p.name.removeprefix("step_")) for p in _folders(run_dir) if (p / MANIFEST).is_file())


def read_state(folder: Path) -> dict[str, Any]:
    """Read step, counters, config and versions of a checkpoint; loads no tensors.

    Raises:
        FileNotFoundError: no such folder, or it is not a complete checkpoint.
        ValueError: its files cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"checkpoint={folder}: no such folder; it looks like outputs/grpo/<run>/checkpoints/step_000060"
        )
    if not (folder / MANIFEST).is_file() or not (folder / STATE).is_file():
        raise FileNotFoundError(
            f"checkpoint={folder}: not a complete checkpoint (no {MANIFEST}); choose a step_* folder that has one"
        )
    try:
        state = json.loads((folder / STATE).read_text())
    except ValueError as error:
        raise ValueError(f"checkpoint={folder}: {STATE} is not readable ({error})") from error
    return dict(state)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as flat tensors `<parameter index>.<name>`, such as `3.exp_avg` and
    `3.step`.
    """
    import torch

    state: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, slots in state.items() for k, v in slots.items()}


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back; learning rates and groups stay those of `optimizer`.

    Raises:
        ValueError: the tensors are of another set of parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
        shape = parameters[int(index)].shape if int(index) < len(parameters) else None
        if shape is None or (tensor.ndim and tensor.shape != shape):
            raise ValueError(
                f"optimizer state {key} {tuple(tensor.shape)} does not fit the parameters of "
                f"this run; resume with the config it was saved with"
            )
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def refuse_mismatch(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to resume with another config.

    Args:
        old: config of the checkpoint.
        new: config of this run; run_dir, updates and other keys that do not change what is computed may
            differ.

    Raises:
        ValueError: with the list of differences.
    """
    found = differences(identity(dict(old)), identity(dict(new)))
    if found:
        raise ValueError(
            f"resume=true: the config differs from the checkpoint's: {'; '.join(found)}; "
            f"undo that, or choose another run_dir"
        )


def sha256(path: Path) -> str:
    """Hash a file in pieces; hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(folder: Path) -> list[str]:
    """Files that are missing or changed, or what else is wrong; empty: a whole checkpoint."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = {str(name): str(digest) for name, digest in manifest.items()}
    except (FileNotFoundError, ValueError, AttributeError):
        return [MANIFEST]
    odd = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    odd = odd or [name for name, digest in names.items() if sha256(folder / name) != digest]
    if odd or STATE not in names:
        return odd or [STATE]
    step = json.loads((folder / STATE).read_text())["step"]
    return [] if folder.name.rpartition("_")[2] == f"{step:06d}" else [f"its name: it holds step {step}, which"]


def _remove(folder: Path) -> None:
    # the manifest goes first: a removal that is interrupted leaves debris, never a checkpoint with holes
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary file, fsync, `os.replace`."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
