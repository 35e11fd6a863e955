"""Imports everything that a run imports, also inside functions; a fork server preloads it."""

import contextlib
import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

NAMES = [
    "experiments.train",
    "experiments.replay",
    "runtime.curves",
    "runtime.networks",
    "runtime.outcome",
    "runtime.report",
    "runtime.session",
    "runtime.state",
    "runtime.trainer",
    "runtime.replay",
    "algorithms.policy_loss",
    "algorithms.nft_loss",
    "algorithms.ppo_loss",
    "tests.faulty",
    "tests.models",
    "tests.trials",
]

for name in NAMES:
    importlib.import_module(name)

with contextlib.suppress(ImportError):
    importlib.import_module("deepspeed")
    importlib.import_module("runtime.deepspeed")
