"""What a run of supervised training tells while it goes on: rows of its log, and its progress."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from runtime import runlog
from runtime.identity import BEGUN
from runtime.progress import Progress

if TYPE_CHECKING:
    from runtime.runlog import RunLog
    from runtime.session import Session

# Its steps are short: without a terminal, a line of progress after so many seconds.
PAUSE = 10.0


class Journal:
    """Log and progress of a run of `steps` steps. Use as a context manager.

    The log opens with the first row, for that says from where an interrupted run goes on: rows of later steps, which it
    takes again, are dropped.

    Attributes:
        folder: for the state of the training.
        before: evaluation of the starting weights, which the log begins with.
        progress: see `Progress`.
    """

    def __init__(self, session: Session, steps: int) -> None:
        self.session, self.steps = session, steps
        self.folder: Path = (session.run_dir / BEGUN).parent
        self.before: Mapping[str, float] = {}
        self.progress = Progress(steps, pause=PAUSE)
        session.notice, session.on_step = self.progress.notice, self.progress.rollout_step
        self._log: RunLog | None = None
        self._shown: dict[str, float] = {}
        self._exits = ExitStack()

    def __enter__(self) -> Journal:
        self._exits.enter_context(self.progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()

    def stop(self) -> bool:
        """Whether a stop has been asked for."""
        return self.session.stop.requested

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Log what training reports of a step (from 1), and show it."""
        opening = self._log is None
        self.log(step - 1).log(step, metrics)
        if opening:  # the pace is that of the steps after it: what was before them is no training
            self.progress.resume(step)
        seconds = {k.removeprefix("seconds/"): v for k, v in metrics.items() if k.startswith("seconds/")}
        told = {key: value for key, value in metrics.items() if not key.startswith("seconds/")}
        # A step of some losses alone stands beside the last of the others of its stage.
        same = {key.rpartition("/")[0] for key in told} == {key.rpartition("/")[0] for key in self._shown}
        self._shown = {**(self._shown if same else {}), **told}
        self.progress.update(step, self._shown, seconds)

    def measured(self, metrics: Mapping[str, float]) -> RunLog:
        """Log the evaluation after the last step, unless an interrupted run has; returns the log."""
        log = self.log(self.steps)
        rows = runlog.read(self.session.run_dir)
        if not any(row["step"] == self.steps and any(key.startswith("eval/") for key in row) for row in rows):
            log.log(self.steps, _named(metrics))
        return log

    def log(self, done: int) -> RunLog:
        """The log; where it is not open yet, that of a run that has done so many steps."""
        if self._log is None:
            s = self.session
            self._log = s.settings.logger.open(s.run_dir, s.config, done)
            self._exits.callback(self._log.close)
            if done == 0 and self.before:
                self._log.log(0, _named(self.before))
        return self._log


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in metrics.items()}
