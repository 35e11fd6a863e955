"""Everything that a run imports; a fork server preloads it."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import experiments.train
import runtime.curves
import runtime.networks
import runtime.outcome
import runtime.report
import runtime.session
import tests.faulty  # noqa: F401

try:
    import deepspeed  # noqa: F401
except ImportError:
    pass
