"""All trials of what a run promises: `make soak`, or `python -m benchmarks.soak --only kills,leaks --minutes 40`.

Prints one JSON line per promise; exit code 1 where one is broken. docs/trust.md says what each line means.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import launches, trials, update_trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names, separated by commas; default: all")
    parser.add_argument("--minutes", type=float, default=40.0, help="length of the soak")
    parser.add_argument("--share", type=float, default=1.0, help="share of the trials")
    options = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as scratch:
        from tests.models import build  # processes of a trial import this module, and need no models

        model = build(Path(scratch) / "model")
        plans = jobs(model, Path(scratch), options.share, options.minutes)
        for name in options.only.split(",") if options.only else list(plans):
            began = time.monotonic()
            try:
                row: dict[str, Any] = {"ok": True, **plans[name]()}
            except Exception as error:
                traceback.print_exc()
                row, broken = {"ok": False, "error": f"{type(error).__name__}: {error}"}, broken + 1
            print(json.dumps({"trial": name, **row, "seconds": round(time.monotonic() - began)}), flush=True)
    sys.exit(1 if broken else 0)


def jobs(model: Path, scratch: Path, share: float, minutes: float) -> dict[str, Callable[[], dict[str, Any]]]:
    """The trials by name."""

    def count(full: int) -> int:
        return max(1, round(share * full))

    return {
        "saving": lambda: trials.kills_while_saving(scratch / "saving", count(200)),
        "corruptions": lambda: trials.corruptions(scratch / "corrupt", count(500)),
        "engines": lambda: update_trials.engines(model, scratch / "engines", count(10)),
        "curves": lambda: launches.curves(scratch / "curves", max(2, count(10))),
        "injections": lambda: {
            f"{engine} {point}": update_trials.injected(model, scratch / "inject" / engine, point, f"engine={engine}")
            for engine in ("plain", "deepspeed_z2", "deepspeed_z3")
            for point in update_trials.POINTS
        },
        "leaks": lambda: update_trials.growth(model, scratch / "leaks", max(20, count(200)), max(5, count(50))),
        "terminations": lambda: trials.terminations(model, scratch / "terms", count(30)),
        "compiled": lambda: trials.terminations(model, scratch / "compiled", count(10), compiled=True),
        "usr1": lambda: trials.terminations(model, scratch / "usr1", count(5), 1, signal.SIGUSR1),
        "two ranks": lambda: trials.terminations(model, scratch / "two", count(10), 2),
        "torchrun": lambda: launches.launched(model, scratch / "torchrun", "torchrun", count(30)),
        "deepspeed": lambda: launches.launched(model, scratch / "deepspeed", "deepspeed", count(30)),
        "disk": lambda: trials.disk(model, scratch / "disk") if os.geteuid() == 0 else {"skipped": "it takes root"},
        "kills": lambda: trials.kills_anywhere(model, scratch / "kills", count(50)),
        "kills of two": lambda: trials.kills_anywhere(
            model, scratch / "kills2", count(10), "engine=deepspeed_z2", ranks=2
        ),
        "soak": lambda: update_trials.soak(
            model, scratch / "soak", 60 * minutes, 30.0, lambda text: print(text, flush=True)
        ),
    }


if __name__ == "__main__":
    main()
