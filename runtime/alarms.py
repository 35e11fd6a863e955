"""Alarms: a run says so when its videos change in ways that honest learning does not explain, and where an update has
nothing to learn from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.settings import Alarms

SIGN, ALARM, SKIPPED, FAILED = "signs/", "alarm/", "skipped/", "/failed"
WORDS = {"edges": "edges", "motion": "motion", "diversity": "diversity inside a group"}  # signs in the videos
OTHERS = {"kl": "KL", "pairs": "updates without a pair of samples (lower algorithm.margin, or set margin_in=spread)"}


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
        """`alarm/<name>` for every alarm of this update: the ratio to the first updates, the KL, 0 pairs, or the share
        of samples for which a reward failed (`alarm/<reward>/failed`).
        """
        found = {}
        for name in WORDS:
            value, base = metrics.get(f"{SIGN}{name}"), self._first.get(name, [])
            if value is None or len(base) < self.settings.warmup or not (math.isfinite(value) and sum(base) > 0):
                continue
            ratio = value / (sum(base) / len(base))
            if not 1 / self.settings.factor <= ratio <= self.settings.factor:
                found[f"{ALARM}{name}"] = ratio
        if metrics.get("kl", 0.0) > self.settings.most_kl:
            found[f"{ALARM}kl"] = metrics["kl"]
        if metrics.get("pairs") == 0:
            found[f"{ALARM}pairs"] = 0.0
        found |= {f"{ALARM}{key}": value for key, value in metrics.items() if key.endswith(FAILED) and value > 0}
        self._learn(metrics)
        return found

    def _learn(self, metrics: Mapping[str, Any]) -> None:
        for name in WORDS:
            values, value = self._first.setdefault(name, []), metrics.get(f"{SIGN}{name}")
            if isinstance(value, float) and math.isfinite(value) and len(values) < self.settings.warmup:
                values.append(value)


def sentences(metrics: Mapping[str, Any]) -> list[str]:
    """The alarms of an update in words."""
    found = []
    for key in (key for key in metrics if key.startswith(ALARM)):
        name, value = key.removeprefix(ALARM), float(metrics[key])
        said = {"kl": f"KL {value:.3g}", "pairs": "no pair of samples, nothing learned"}
        if name.endswith(FAILED):
            said[name] = f"{_failed(name)} for {value:.0%} of the samples"
        found.append(said.get(name) or f"{WORDS[name]} x {value:.2f}")
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
    words = WORDS | OTHERS | {name: _failed(name) for name in first if name.endswith(FAILED)}
    parts = [f"{words[name]} (from update {first[name]}, {count[name]} times)" for name in first]
    look = "Look at the videos: alarms" if first.keys() & {*WORDS, "kl"} else "Alarms"
    return f"{look} for {'; '.join(parts)}." if parts else ""


def _failed(name: str) -> str:
    return f"reward {name.removesuffix(FAILED)} failed"
