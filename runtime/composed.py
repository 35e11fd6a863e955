"""What command lines come to, as a short hash: a default that changes in `conf/` changes it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException

from runtime.cli import readable
from runtime.config import CONF, plain
from runtime.explain import known_keys
from runtime.identity import identity

Run = tuple[str, tuple[str, ...]]
"""A script in `experiments/` and its overrides; `{after}` and `{folder}` in them stand for folders."""

# Where a run finds things and how fast it goes.
PLACES = ("checkpoint", "engine.threads")
# What only reinforcement learning reads, and the scripts that do none.
LEARNING = ("algorithm", "optimizer", "reward", "scoring", "tracker")
UNREAD = {"evaluate.py": (*LEARNING, "updates"), "distill.py": LEARNING}
# Hydra composes in one thread at a time.
_ALONE = Lock()


def fingerprint(runs: Sequence[Run]) -> str:
    """Short hash of all settings of some runs that can change a result.

    Without seeds, which command lines name: the cells of an arm have one hash.

    Raises:
        ValueError: an override does not exist; one line.
    """
    found = [_settings(script, tuple(o for o in overrides if not o.startswith("seed="))) for script, overrides in runs]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _settings(script: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    name = script.removesuffix(".py")
    named = [text.replace("{after}", "after").replace("{folder}", "folder") for text in overrides]
    try:
        with _ALONE:
            GlobalHydra.instance().clear()
            with initialize_config_dir(str(CONF), version_base="1.3"):
                config = plain(compose(name, named))
    except (HydraException, ValueError) as error:
        line = " ".join(["python", f"experiments/{script}", *overrides])
        raise ValueError(f"{line}: {readable(error, lambda: known_keys(name))}") from error
    unread = (*PLACES, *UNREAD.get(script, ()))
    flat = identity(config) | {"updates": config["updates"]}
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{u}.") for u in unread)}
