"""Seconds per phase of an iteration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up wall-clock seconds by phase; what no phase covers is `rest`.

    On a GPU pass `synchronize=torch.cuda.synchronize`, or a phase ends before its kernels do.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self.reset()

    def reset(self) -> None:
        """Begin a new iteration."""
        self._began = time.perf_counter()
        self._spent: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as `name`. A phase inside another is taken out of the outer one."""
        self._inner.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            if self._synchronize is not None:
                self._synchronize()
            whole = time.perf_counter() - began
            self._spent[name] = self._spent.get(name, 0.0) + whole - self._inner.pop()
            if self._inner:
                self._inner[-1] += whole

    def seconds(self) -> dict[str, float]:
        """Return seconds by phase in the order they first ended, then `rest`; they sum to the time since
        `reset`.
        """
        total = time.perf_counter() - self._began
        return {**self._spent, "rest": total - sum(self._spent.values())}
