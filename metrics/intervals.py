"""95 % intervals over clips: of means by Student's t, of distances between sets by a jackknife."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Parts of clips that the jackknife leaves out in turn.
PARTS = 20


@dataclass(frozen=True)
class Estimate:
    """A number and how well it is known.

    Attributes:
        value: the estimate.
        half: half-width of its 95 % interval over clips; NaN where there are too few.
        clips: how many could be measured.
        over: `clips`, which all weigh the same, or `positions`, all clips together.
    """

    value: float
    half: float
    clips: int
    over: str = "clips"


def of_mean(values: Sequence[float]) -> Estimate:
    """Mean over clips; those that are not finite (nothing could be measured) are left out."""
    kept = [value for value in values if math.isfinite(value)]
    if len(kept) < 2:
        return Estimate(kept[0] if kept else math.nan, math.nan, len(kept))
    half = t95(len(kept) - 1) * statistics.stdev(kept) / math.sqrt(len(kept))
    return Estimate(statistics.fmean(kept), half, len(kept))


def jackknife(clips: int, distance: Callable[[list[int]], float], parts: int = PARTS) -> Estimate:
    """A number of a whole set, such as a Frechet distance, by the delete-a-group jackknife.

    A bootstrap would repeat clips, which biases Frechet distances upwards. Groups are drawn by lot, the same for every
    set of that size: clips of one kind may stand at even distances (speeds of the benchmark do), and groups of one kind
    each would differ by more than clips do.

    Args:
        clips: size of the set.
        distance: the number for some of the clips, by index.
        parts: groups that are left out in turn.
    """
    value = distance(list(range(clips)))
    parts = min(parts, clips)
    if clips < 3:  # a distance needs two of them
        return Estimate(value, math.nan, clips)
    group = [i % parts for i in range(clips)]
    random.Random(0).shuffle(group)
    without = [distance([i for i in range(clips) if group[i] != part]) for part in range(parts)]
    centre = statistics.fmean(without)
    error = math.sqrt((parts - 1) / parts * sum((x - centre) ** 2 for x in without))
    return Estimate(value, t95(parts - 1) * error, clips)


def t95(freedom: int) -> float:
    """97.5 % quantile of Student's t, within 1 % (Abramowitz and Stegun 26.7.5, which is too small below 3)."""
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
