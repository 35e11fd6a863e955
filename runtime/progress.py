"""What a person sees while a run goes on: one bar on a terminal, one line per update elsewhere."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from runtime.alarms import SKIPPED, sentences

TERMS = "reward_terms/"
LOSSES = ("loss", "dmd", "adversarial", "flow_matching", "discriminator")  # of supervised training


class Progress:
    """Progress over `total` updates of which `done` are done already (a resumed run).

    `started` is the `time.monotonic()` from which the first steps are counted; none: now. Where there is no terminal,
    lines of updates other than the last are at least `pause` seconds apart.

    Shows `reward`, its terms (`reward_terms/<name>`), losses of supervised training, pixel errors (`...error_px`),
    `kl`, `clip_fraction`, groups dropped and updates left out where there are any, seconds per phase and the time left.
    Use as a context manager.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        console: Console | None = None,
        started: float | None = None,
        pause: float = 0.0,
    ) -> None:
        # Of several processes one talks.
        self.console = console or Console(stderr=True, quiet=int(os.environ.get("RANK", "0")) > 0)
        self.total, self.done, self._start = total, done, done
        self._began = time.monotonic()
        self._started = self._began if started is None else started
        self._pause, self._told = pause, -math.inf
        self._phase = "rollout"
        self._reported: set[str] = set()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self._task = self._bar.add_task("updates", total=total, completed=done, left="")
        self._text = Text("")
        self._live = (
            Live(Group(self._bar, self._text), console=self.console, refresh_per_second=4)
            if self.console.is_terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def resume(self, done: int) -> None:
        """Begin at `done` updates: a resumed run."""
        self.done = self._start = done
        self._began = time.monotonic()
        self._bar.update(self._task, completed=done)

    def rollout_step(self, frame: int, frames: int) -> None:
        """Report that frame `frame` (from 0) of `frames` is being generated; the first report of a rollout, and of
        an evaluation, is a line of its own.
        """
        if self._phase not in self._reported:
            self._reported.add(self._phase)
            self.note(f"first {self._phase} step after {time.monotonic() - self._started:.1f} s")
        if self._live is not None:
            self._bar.update(self._task, description=f"{self._phase} {frame + 1}/{frames}")

    def phase(self, name: str) -> None:
        """Show what is being done: `rollout` or `evaluation`."""
        self._phase = name
        if self._live is not None:
            self._bar.update(self._task, description=name)

    def update(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Show that update `step` (from 1) is done, with its metrics and seconds per phase."""
        self.done = step
        line, left, now = summary(metrics, seconds), self.left(), time.monotonic()
        if self._live is None:
            if now - self._told < self._pause and step < self.total:
                return
            self._told = now
            self.note(f"update {step}/{self.total}  {line}  left {left}")
        else:
            self._text.plain = line
            self._bar.update(self._task, completed=step, left=f"left {left}")

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def notice(self, text: str) -> None:
        """Print a line about something that went wrong and did not end the run."""
        self.note(f"notice: {text}")

    def left(self) -> str:
        """Time left at the pace so far, as h:mm:ss."""
        made = self.done - self._start
        if made < 1:
            return "?"
        return clock((time.monotonic() - self._began) / made * (self.total - self.done))


def summary(metrics: Mapping[str, float], seconds: Mapping[str, float]) -> str:
    """Return the metrics that a person watches, and seconds per phase, as one line."""
    parts = [f"reward {metrics['reward']:.3f}"] if "reward" in metrics else []
    parts += [f"{name} {value:.4f}" for name, value in metrics.items() if name.rpartition("/")[2] in LOSSES]
    parts += [f"{name.removeprefix(TERMS)} {value:.3f}" for name, value in metrics.items() if name.startswith(TERMS)]
    parts += [f"error {value:.2f} px" for name, value in metrics.items() if name.endswith("error_px")]
    parts += [
        f"{label} {metrics[name]:.2g}"
        for name, label in (("kl", "kl"), ("clip_fraction", "clipped"))
        if name in metrics
    ]
    dropped = metrics.get("groups_dropped", 0)
    parts += [f"dropped {dropped:.0f} group{'' if dropped == 1 else 's'}"] if dropped else []
    parts += [f"LEFT OUT: {name.removeprefix(SKIPPED)} not finite" for name in metrics if name.startswith(SKIPPED)]
    alarms = sentences(metrics)
    parts += [f"ALARM {', '.join(alarms)}"] if alarms else []
    phases = " ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return "  ".join([*parts, f"[{phases} s]"] if phases else parts)


def clock(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
