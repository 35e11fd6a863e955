"""What a component of each kind must have, so that one of a person's own is refused before anything heavy loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from runtime.settings import Settings, require

# setting: what is asked of it, and where that is said. `tests/test_interfaces.py` holds these against the protocols.
MEMBERS: dict[str, tuple[tuple[str, ...], str]] = {
    "algorithm": (
        (
            *("prepare", "loss_module", "group_relative", "needs_log_prob", "needs_reference", "whole_groups"),
            *("kl_weight", "epochs", "minibatches"),
        ),
        "algorithms.base.Updates",
    ),
    "schedule": (("choose", "draw", "learnable"), "envs.schedules.Schedule"),
    "transition": (("name", "learnable", "moments"), "envs.transitions.Transition"),
    "world": (("buckets", "size", "batch", "frames"), "data.clip.World"),
    "tracker": (("track", "reach"), "tracking.trackers.Tracker"),
    "engine": (("distributed", "threads", "check", "join", "shape", "trainer"), "runtime.engines.Plain"),
    "logger": (("open",), "runtime.runlog.Local"),
    "reward": (("weight", "prepare", "score"), "rewards.base.Reward"),
    "extractor": (("name", "prepare", "frames", "videos"), "metrics.features.FeatureExtractor"),
    "interpolator": (("name", "prepare", "between"), "metrics.interpolators.Interpolator"),
}


def whole(settings: Settings) -> None:
    """Every component has what is asked of its kind.

    Raises:
        ValueError: one lacks something.
    """
    for key, kind, part in _components(settings):
        members, where = MEMBERS[kind]
        found = {*dir(type(part)), *(field.name for field in dataclasses.fields(part))}
        lacking = [name for name in members if name not in found]
        require(
            not lacking,
            f"{key}={type(part).__name__} lacks {', '.join(lacking)}; see {where} and CONTRIBUTING.md",
        )


def _components(settings: Settings) -> Iterator[tuple[str, str, Any]]:
    """Key, kind and object of what a person may write."""
    judges = settings.evaluation
    for kind in ("algorithm", "schedule", "transition", "world", "tracker", "engine", "logger"):
        yield kind, kind, getattr(settings, kind)
    for name, term in settings.reward.items():
        yield f"reward.{name}", "reward", term
    for key in ("tracker", "extractor", "interpolator"):
        if getattr(judges, key) is not None:
            yield f"evaluation.{key}", key, getattr(judges, key)
