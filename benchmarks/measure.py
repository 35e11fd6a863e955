"""Timing that a busy machine disturbs least, and the conditions without which a number means nothing."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import versions
from runtime.hardware import cores, processor
from runtime.session import Session

ROOT = Path(__file__).resolve().parents[1]


def race(
    contestants: Mapping[str, Callable[[], object]], repeats: int, synchronize: Callable[[], None]
) -> dict[str, float]:
    """Median seconds of each contestant, after a warm-up; they run in turns, so that noise hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, action in contestants.items():
            synchronize()
            began = time.perf_counter()
            action()
            synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def conditions(session: Session) -> dict[str, Any]:
    """What the numbers depend on."""
    settings, transformer = session.settings, session.episodes.networks.transformer
    rollout, cuda = settings.rollout, session.device.startswith("cuda")
    return {
        **machine(),
        "device": torch.cuda.get_device_name(session.device) if cuda else session.device,
        "seed": settings.seed,
        "samples of an iteration": rollout.prompts * rollout.group_size,
        "latent frames": rollout.frames,
        "steps per frame": len(rollout.sigmas) - 1,
        "frame sizes": [f"{height}x{width}" for height, width in settings.world.buckets],
        "window": rollout.window,
        "parameters": sum(p.numel() for p in transformer.parameters()),
        "schedule": type(settings.schedule).__name__,
        "transition": settings.transition.name,
    }


def machine() -> dict[str, Any]:
    """Where and when a number was measured."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit(),
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }


def commit() -> str:
    """Commit of this checkout, `+` where files differ from it; `unknown` outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
