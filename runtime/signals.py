"""A polite stop: the first SIGTERM or SIGINT lets the update finish and be saved, the second leaves at
once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any


class StopFlag:
    """Context manager; the loop asks `stop.requested` between updates.

    Launchers send SIGKILL 30 s after SIGTERM, so an update should be shorter than that. Works in the main
    thread only.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            sys.exit(128 + number)
        self.requested = True
        # os.write: a handler may interrupt a print
        os.write(
            2,
            f"\n{signal.Signals(number).name}: stopping after this update; once more leaves at once\n".encode(),
        )
