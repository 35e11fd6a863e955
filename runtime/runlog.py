"""Where metrics go: always `metrics.jsonl` in the run's folder, and Weights & Biases where asked for."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"
# Seconds that the end of a run waits for wandb: less than launchers wait after SIGTERM.
PATIENCE = 20.0


class RunLog(Protocol):
    """Takes numbers while a run goes on."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of update `step` (counted from 1)."""
        ...

    def results(self, run_dir: Path) -> None:
        """Record what a finished run's folder shows: videos, curves and report."""
        ...

    def close(self) -> None:
        """Flush and release."""
        ...


class JsonLines:
    """One JSON object per line, flushed at once.

    Where the file cannot be written (a full disk, a folder that has gone) the rows wait in memory, with one notice, and
    the whole file is written again as soon as it can be: no row is lost while the run lives.

    Args:
        run_dir: folder of the run; the file is `metrics.jsonl` in it.
        step: last update that stays: a resumed run drops what came after its checkpoint, so that its
            history equals that of an uninterrupted run. 0 begins anew and keeps nothing.
    """

    def __init__(self, run_dir: Path, step: int = 0) -> None:
        self.path = run_dir / FILE
        self.lines = [json.dumps(row) + "\n" for row in read(run_dir) if step > 0 and row["step"] <= step]
        self.whole = self.failed = False
        self._write()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append `{"step": step, ...}`. Numbers that are not finite are written as text: JSON has none."""
        row = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
        self.lines.append(json.dumps({"step": step, **row}) + "\n")
        self._write()

    def results(self, run_dir: Path) -> None:
        """Nothing: they lie beside the file."""

    def close(self) -> None:
        """Try once more to write what could not be written."""
        if not self.whole:
            self._write()

    def _write(self) -> None:
        """Bring the file up to date: the last line where the others are there, else all of them."""
        try:
            if self.whole and self.path.is_file():
                self.whole = False
                with self.path.open("a") as file:
                    file.write(self.lines[-1])
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text("".join(self.lines))
                os.replace(temporary, self.path)
            self.whole = True
        except OSError as error:
            self.whole = False
            if not self.failed:
                _notice(f"{self.path} cannot be written ({error}); metrics are kept in memory until it can be")
            self.failed = True


class Silent:
    """Takes nothing: of several processes one logs."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def results(self, run_dir: Path) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class WandbLog:
    """Metrics and results to a wandb run. Imports wandb when made.

    The run's id stays in `wandb_id` of the folder: a resumed run goes on with it. Once wandb is there, none of its
    failures ends the run.
    """

    def __init__(self, settings: Wandb, run_dir: Path, config: dict[str, Any]) -> None:
        import wandb

        self.failed = False
        note = run_dir / WANDB_ID
        self.run = wandb.init(
            id=note.read_text().strip() if config.get("resume") and note.is_file() else None,
            resume="allow",
            project=settings.project,
            entity=settings.entity,
            mode=settings.mode,  # type: ignore[arg-type]
            dir=str(run_dir),
            name=run_dir.name,
            config=config,
            settings=wandb.Settings(silent=True),
        )
        note.write_text(self.run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send metrics of one update."""
        self._attempt(lambda: self.run.log(dict(metrics), step=step))

    def results(self, run_dir: Path) -> None:
        """Send `videos/*.mp4`, `curves.png` and `report.html`."""
        self._attempt(lambda: self.run.log(_media(run_dir)))

    def close(self) -> None:
        """Finish the run; an upload that does not end within `PATIENCE` seconds is left to `wandb sync`."""
        work = threading.Thread(target=self._attempt, args=(self.run.finish,), daemon=True)
        work.start()
        work.join(PATIENCE)
        if work.is_alive():
            _notice(f"wandb does not answer; {FILE} has every metric, `wandb sync` uploads the rest")

    def _attempt(self, action: Callable[[], object]) -> None:
        """Do it; where wandb fails, say so the first time."""
        try:
            action()
        except Exception as error:
            if not self.failed:
                _notice(f"wandb failed ({type(error).__name__}: {error}); {FILE} has every metric")
            self.failed = True


class Composite:
    """Several logs as one."""

    def __init__(self, logs: Sequence[RunLog]) -> None:
        self.logs = list(logs)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record in each."""
        for log in self.logs:
            log.log(step, metrics)

    def results(self, run_dir: Path) -> None:
        """Record in each."""
        for log in self.logs:
            log.results(run_dir)

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
    """`metrics.jsonl`, and the same to Weights & Biases; at the end also videos, curves and report.

    A run that was resumed offline lies in several folders of one id; `wandb sync` them together.

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
        """Open both logs. Where wandb is not installed or cannot start, say so and go on with the local one."""
        local = JsonLines(run_dir, step)
        try:
            return Composite([local, WandbLog(self, run_dir, config)])
        except ImportError:
            _notice(f"wandb is not installed (pip install -e '.[wandb]'); metrics go to {FILE} only")
        except Exception as error:
            _notice(f"wandb cannot start ({type(error).__name__}: {error}); metrics go to {FILE} only")
        return local


def _media(run_dir: Path) -> dict[str, Any]:
    """The results of a folder as wandb shows them; files that are not there are left out."""
    import wandb

    # By path: wandb copies files as they are; frames would need moviepy.
    found: dict[str, Any] = {
        f"videos/{path.stem}": wandb.Video(str(path)) for path in sorted((run_dir / "videos").glob("*.mp4"))
    }
    if (run_dir / "curves.png").is_file():
        found["curves"] = wandb.Image(str(run_dir / "curves.png"))
    if (run_dir / "report.html").is_file():
        found["report"] = wandb.Html(str(run_dir / "report.html"), inject=False)
    return found


def _notice(text: str) -> None:
    print(f"notice: {text}", file=sys.stderr)


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Read the rows of `metrics.jsonl`, oldest first; a last line that a killed run left unfinished is left
    out.
    """
    path = run_dir / FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]
