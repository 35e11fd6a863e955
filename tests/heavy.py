"""Everything that a run imports; a fork server preloads it."""

import contextlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import tests.faulty
import tests.models
import tests.trials  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401
