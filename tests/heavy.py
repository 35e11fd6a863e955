"""Imports everything that a run imports, also inside functions; a fork server preloads it."""

import contextlib
import importlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

NAMES = {
    "experiments": ("train", "replay"),
    "runtime": ("curves", "networks", "outcome", "report", "session", "state", "trainer", "replay"),
    "algorithms": ("policy_loss", "nft_loss", "ppo_loss"),
    "tests": ("faulty", "models", "trials", "update_trials"),
}

for package, names in NAMES.items():
    for name in names:
        importlib.import_module(f"{package}.{name}")

with contextlib.suppress(ImportError):
    importlib.import_module("deepspeed")
    importlib.import_module("runtime.deepspeed")
