"""The machine: what a number was measured on, and which of its devices a run takes."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from runtime.team import ranks


def processor() -> str:
    """Model of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_of(name: str) -> str:
    """The device by its name.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks() > 1:  # one GPU of this machine for each of its processes
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    kind, _, index = name.partition(":")
    here = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= here:
        raise ValueError(f"device={name}: this machine has {here} {kind} devices; use device=auto")
    return name
