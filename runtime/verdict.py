"""What became of the motion error, judged clip by clip.

Clips and noise are the same before and after, so most of the spread over clips cancels in the differences; intervals of
the two means would count it twice.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metrics.intervals import t95

METRIC = "motion_error_px"


@dataclass(frozen=True)
class Paired:
    """Mean change per clip.

    Attributes:
        mean: px, after less before.
        half: half-width of its 95 % interval, px; infinite for one clip.
        clips: how many could be measured both times.
    """

    mean: float
    half: float
    clips: int

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval does not hold 0; else empty."""
        if abs(self.mean) <= self.half:
            return ""
        return "better" if self.mean < 0 else "worse"

    @property
    def text(self) -> str:
        """`-0.976 ± 0.150 px (95 % interval, 32 clips): clearly better`."""
        if not math.isfinite(self.half):
            return f"{self.mean:+.3f} px (1 clip has no interval): not told apart from no change"
        words = f"clearly {self.verdict}" if self.verdict else "not told apart from no change"
        return f"{self.mean:+.3f} ± {self.half:.3f} px (95 % interval, {self.clips} clips): {words}"


def paired(before: Sequence[float | None], after: Sequence[float | None]) -> Paired | None:
    """Mean of after - before over the clips that have a finite number in both, or None where no clip has.

    Raises:
        ValueError: the two are not of the same clips.
    """
    ends = zip(before, after, strict=True)
    changes = [b - a for a, b in ends if a is not None and b is not None and math.isfinite(a) and math.isfinite(b)]
    if not changes:
        return None
    count = len(changes)
    half = t95(count - 1) * statistics.stdev(changes) / math.sqrt(count) if count > 1 else math.inf
    return Paired(statistics.fmean(changes), half, count)


def of(evaluation: Mapping[str, Any]) -> Paired | None:
    """The change between the sets `before` and `after` of an `evaluation.json`, where it holds errors per clip."""
    errors = evaluation.get("clip_errors_px") or {}
    ends = [errors.get(str((evaluation.get(name) or {}).get("update"))) for name in ("before", "after")]
    return None if ends[0] is None or ends[1] is None else paired(ends[0], ends[1])


def relative(before: float, after: float) -> str:
    """`25.1 % better`, of errors; empty where a number is not finite or the first is 0."""
    if not (math.isfinite(before) and math.isfinite(after) and before > 0):
        return ""
    change = 100 * (after / before - 1)
    return f"{abs(change):.1f} % {'better' if change < 0 else 'worse'}" if change else "unchanged"
