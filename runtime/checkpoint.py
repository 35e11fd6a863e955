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
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.identity import differences, identity

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
STATE = "state.json"
PACKAGES = ("torch", "torchrl", "tensordict", "diffusers", "transformers", "peft", "numpy")


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


def save(run_dir: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write `run_dir/checkpoints/step_<step>` and drop all but the newest `keep` complete checkpoints.

    Returns:
        The folder.
    """
    from safetensors.torch import save_file

    folder = run_dir / FOLDER / f"step_{snapshot.step:06d}"
    if (folder / MANIFEST).is_file():  # the same step of the same run is the same checkpoint
        return folder
    if folder.exists():
        _remove(folder)
    folder.mkdir(parents=True)
    for name, tensors in snapshot.tensors.items():
        save_file(
            {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()},
            folder / f"{name}.safetensors",
        )
    state = {
        "step": snapshot.step,
        "counters": snapshot.counters,
        "config": snapshot.config,
        "versions": versions(),
    }
    (folder / STATE).write_text(json.dumps(state, indent=1))
    files = sorted(p for p in folder.iterdir())
    for path in files:
        _sync(path)
    replace_text(folder / MANIFEST, json.dumps({p.name: sha256(p) for p in files}, indent=1))
    _sync(folder)
    _sync(folder.parent)
    for old in complete_steps(run_dir)[:-keep]:
        _remove(run_dir / FOLDER / f"step_{old:06d}")
    return folder


def load(folder: Path) -> Snapshot:
    """Read a checkpoint after verifying the hash of every file.

    Raises:
        FileNotFoundError: no complete checkpoint there.
        ValueError: a file does not fit its hash.
    """
    from safetensors.torch import load_file

    state = read_state(folder)
    broken = _broken(folder)
    if broken:
        raise ValueError(
            f"checkpoint {folder}: {', '.join(broken)} missing or changed since written; use another checkpoint"
        )
    names = json.loads((folder / MANIFEST).read_text())
    tensors = {Path(n).stem: load_file(folder / n) for n in names if n.endswith(".safetensors")}
    return Snapshot(state["step"], state["config"], tensors, state["counters"])


def latest(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint, or None. Newer folders that are half-written or damaged are
    removed, loudly.
    """
    for folder in sorted((run_dir / FOLDER).glob("step_*"), reverse=True):
        broken = _broken(folder)
        if not broken:
            return folder
        warnings.warn(f"{folder} is not complete ({', '.join(broken)}); removed")
        _remove(folder)
    return None


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in `run_dir` that have a manifest, ascending. Hashes are not verified."""
    return sorted(
        int(p.parent.name[5:]) for p in (run_dir / FOLDER).glob(f"step_*/{MANIFEST}") if p.parent.name[5:].isdigit()
    )


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
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, ValueError):
        return [MANIFEST]
    return [
        name for name, digest in manifest.items() if not (folder / name).is_file() or sha256(folder / name) != digest
    ]


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
