"""A polite stop: SIGTERM, SIGINT and SIGUSR1 (a scheduler's warning) let a run save and leave; a second one leaves at
once.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from runtime.team import Team

# Launchers pass a signal on more than once within this time: a terminal sends SIGINT to all processes and torchrun adds
# SIGTERM; DeepSpeed's runner sends SIGINT, and SIGTERM 0.1 s later. That is one request.
ONE_REQUEST = 1.0


class Stopped(Exception):
    """A stop was asked for. Raised between two steps of a rollout, an evaluation or a training, never within an update:
    the weights are those of the last update that was done.
    """


class StopFlag:
    """Context manager that takes the signals; whoever works long asks `poll()`.

    Launchers send SIGKILL 30 s after SIGTERM, so two polls should not be further apart than that. Works in the main
    thread only.

    Attributes:
        requested: a signal has come, to this process or, after a `poll`, to any.
        team: processes that stop together.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self.team = Team()
        self._first: float | None = None  # when this process had its first
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> None:
        """Raise `Stopped` where any process of the team has had a signal; all of them must ask, equally often."""
        if self.team.any(self.requested):
            self.requested = True
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is not None and now - self._first > ONE_REQUEST:
            os.write(2, b"leaving at once; what the last checkpoint holds is kept\n")
            os._exit(128 + number)  # an exception would wait for what is being waited for
        if self._first is None:  # `requested` may be another process's: its signal is not this one's first
            self.requested, self._first = True, now
            # os.write: a handler may interrupt a print
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: saving and stopping; once more leaves at once\n".encode())
