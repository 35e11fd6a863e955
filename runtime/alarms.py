"""Alarms for reward hacking: a run says so when its videos change in ways that honest learning does not explain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.settings import Alarms

SIGN, ALARM, SKIPPED = "signs/", "alarm/", "skipped/"
WORDS = {"edges": "edges", "motion": "motion", "diversity": "diversity inside a group"}


class Watch:
    """Compares each update with the first ones of the run.

    Args:
        settings: see `Alarms`.
        rows: what was logged before, where the run goes on.
    """

    def __init__(self, settings: Alarms, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        self.settings = settings
        self._first: dict[str, list[float]] = {}
        for row in rows:
            self._learn(row)

    def check(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """`alarm/<name>` for every alarm that this update sets off: the ratio to the first updates, or the KL."""
        found = {}
        for name in WORDS:
            value, base = metrics.get(f"{SIGN}{name}"), self._first.get(name, [])
            if value is None or len(base) < self.settings.warmup or not (math.isfinite(value) and sum(base) > 0):
                continue
            ratio = value / (sum(base) / len(base))
            if not 1 / self.settings.factor <= ratio <= self.settings.factor:
                found[f"{ALARM}{name}"] = ratio
        kl = metrics.get("kl", 0.0)
        if kl > self.settings.kl:
            found[f"{ALARM}kl"] = kl
        self._learn(metrics)
        return found

    def _learn(self, metrics: Mapping[str, Any]) -> None:
        for name in WORDS:
            values, value = self._first.setdefault(name, []), metrics.get(f"{SIGN}{name}")
            if isinstance(value, float) and len(values) < self.settings.warmup:
                values.append(value)


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """The alarms of an update in words."""
    found = []
    for key in (key for key in metrics if key.startswith(ALARM)):
        name, value = key.removeprefix(ALARM), float(metrics[key])
        found.append(f"KL {value:.3g}" if name == "kl" else f"{WORDS[name]} x {value:.2f}")
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Which alarms a run set off, and when first; empty where there was none."""
    first: dict[str, Any] = {}
    count: dict[str, int] = {}
    for row in rows:
        for key in (key for key in row if key.startswith(ALARM)):
            name = key.removeprefix(ALARM)
            first.setdefault(name, row.get("step", row.get("update", "?")))
            count[name] = count.get(name, 0) + 1
    parts = [f"{WORDS.get(name, 'KL')} (from update {first[name]}, {count[name]} times)" for name in first]
    return f"Look at the videos: alarms for {'; '.join(parts)}." if parts else ""
