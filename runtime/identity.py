"""What makes two runs the same run."""

from __future__ import annotations

from typing import Any

# In the folder of a run of supervised training: what it began with, by which it is recognised.
BEGUN = "training/begun.json"

# Keys that say where and how long a run goes, not what it computes: a resumed run may change them.
VOLATILE = (
    "run_dir",
    "resume",
    "updates",
    "saving",
    "evaluation.every",
    "evaluation.batch",
    "logger",
    "device",
    "alarms",
    "guard",
)

# Keys that older configs do not have, and what runs did then: with these values they make no difference.
ADDED: dict[str, Any] = {
    "engine.accumulation": 1,
    "engine.precision": "fp32",
    "engine.activation_checkpointing": False,
    "scoring.optional": [],
    "evaluation.extractor": None,
    "evaluation.interpolator": None,
    "model.tiny_vae": None,
}


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` flattened to dotted keys, without the volatile ones: two runs with one identity
    compute the same. The number of updates belongs to it where the learning rate falls towards the last of them.
    """
    flat = flatten(config)
    volatile = [v for v in VOLATILE if not (v == "updates" and flat.get("optimizer.decay"))]
    return {
        key: value
        for key, value in flat.items()
        if not any(key == v or key.startswith(f"{v}.") for v in volatile) and not (key in ADDED and value == ADDED[key])
    }


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every key in which two flat mappings differ, sorted by key."""
    absent = "(absent)"
    return [
        f"{k}: {old.get(k, absent)} -> {new.get(k, absent)}"
        for k in sorted(old.keys() | new.keys())
        if old.get(k, absent) != new.get(k, absent)
    ]
