"""Seconds per phase of an iteration of the real loop."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from experiments.train import iterate
from runtime.alarms import Watch
from runtime.progress import Progress
from runtime.session import Session
from runtime.timing import PhaseTimer

REST_GOAL = 0.10


def phases(session: Session, iterations: int) -> list[dict[str, Any]]:
    """Median seconds of each phase over `iterations` updates after a warm-up.

    `rest` is what no phase covers: logging, the progress display and the loop itself. Evaluation and
    checkpoints are not part of an iteration.
    """
    timer, rows = PhaseTimer(session.synchronize), []
    with tempfile.TemporaryDirectory() as folder, Progress(iterations + 1) as progress:
        log = session.settings.logger.open(Path(folder), session.config)
        for _ in range(iterations + 1):
            iterate(session, timer, log, progress, Watch(session.settings.alarms))
            rows.append(timer.seconds())
        log.close()
    median = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    whole = sum(median.values())
    table: list[dict[str, Any]] = [
        {"phase": name, "seconds": value, "share": value / whole} for name, value in median.items()
    ]
    # `PhaseTimer` puts the rest last.
    table[-1] |= {"goal": f"at most {REST_GOAL:.0%}", "met": table[-1]["share"] <= REST_GOAL}
    return table
