"""Everything that a run imports; a fork server preloads it."""

import contextlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import experiments.train  # noqa: F401
import runtime.curves
import runtime.networks
import runtime.outcome
import runtime.report
import runtime.session  # noqa: F401
import tests.faulty  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401
