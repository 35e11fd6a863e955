"""Where metrics go: always `metrics.jsonl` in the run's folder, and Weights & Biases where asked for."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FILE = "metrics.jsonl"


class RunLog(Protocol):
    """Takes numbers while a run goes on."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of update `step` (counted from 1)."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """One JSON object per line, flushed at once; append only.

    Args:
        run_dir: folder of the run; the file is `metrics.jsonl` in it.
        step: last update that stays: a resumed run drops what came after its checkpoint, so that its
            history equals that of an uninterrupted run. 0 begins anew.
    """

    def __init__(self, run_dir: Path, step: int = 0) -> None:
        self.path = run_dir / FILE
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = "".join(json.dumps(row) + "\n" for row in read(run_dir) if row["step"] <= step)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(kept)
        os.replace(temporary, self.path)
        self.file = self.path.open("a")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append `{"step": step, ...}`. Numbers that are not finite are written as text: JSON has none."""
        row = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class WandbLog:
    """Metrics to a wandb run. Imports wandb when made."""

    def __init__(self, settings: Wandb, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        self.run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,  # type: ignore[arg-type]
            dir=str(run_dir),
            name=run_dir.name,
            config=config,
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics of one update."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class Composite:
    """Several logs as one."""

    def __init__(self, logs: Sequence[RunLog]) -> None:
        self.logs = list(logs)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record in each."""
        for log in self.logs:
            log.log(step, metrics)

    def close(self) -> None:
        """Close each."""
        for log in self.logs:
            log.close()


@dataclass(frozen=True)
class Local:
    """`metrics.jsonl` in the run's folder, nothing else."""

    def open(self, run_dir: Path, config: dict[str, Any], step: int = 0) -> RunLog:
        """Open the log of a run that has done `step` updates; see `JsonLines`."""
        return JsonLines(run_dir, step)


@dataclass(frozen=True)
class Wandb:
    """`metrics.jsonl`, and the same to Weights & Biases.

    Attributes:
        mode: `offline` (into the run's folder; upload later with `wandb sync`), `online` or `disabled`.
        project: project name.
        entity: user or team; none: your default.
    """

    mode: str = "offline"
    project: str = "ardrag"
    entity: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online", "disabled"):
            raise ValueError(f"logger.mode must be offline, online or disabled, got {self.mode!r}")

    def open(self, run_dir: Path, config: dict[str, Any], step: int = 0) -> RunLog:
        """Open both logs. Where wandb is not installed, say so once and go on with the local one."""
        local = JsonLines(run_dir, step)
        try:
            return Composite([local, WandbLog(self, run_dir, config)])
        except ImportError:
            print(
                "notice: wandb is not installed (pip install -e '.[wandb]'); metrics go to metrics.jsonl only",
                file=sys.stderr,
            )
            return local


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Read the rows of `metrics.jsonl`, oldest first; a last line that a killed run left unfinished is left
    out.
    """
    path = run_dir / FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
