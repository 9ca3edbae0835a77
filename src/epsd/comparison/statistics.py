"""Numbers over seeds: means, tests of a difference, Holm's correction."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

LEVEL = 0.05
"""Below this corrected p a difference is called significant."""


class Summary(NamedTuple):
    """Of the values of a cell: mean, standard deviation with n - 1 (NaN for one value), how many seeds."""

    mean: float
    deviation: float
    seeds: int


class Difference(NamedTuple):
    """A cell against the baseline (or the column's best).

    by : mean difference, of the pairs where the test is paired.  test : "paired", "welch", or "none" (then `reason`
    says why).  seeds : pairs, or values of the smaller side.  p : two-sided.  corrected : p after Holm's correction.
    """

    by: float
    test: Literal["paired", "welch", "none"]
    seeds: int
    p: float = math.nan
    corrected: float = math.nan
    reason: str = ""

    @property
    def significant(self) -> bool:
        """Whether the corrected p is below LEVEL; no where there is none."""
        return self.corrected < LEVEL


def summarise(values: Sequence[float]) -> Summary:
    """Mean, sample standard deviation, count."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Summary(statistics.fmean(values), deviation, len(values))


def difference(mine: Mapping[Any, float], other: Mapping[Any, float]) -> Difference:
    """`mine` minus `other` (seed, or `Cell.runs`), with a two-sided t-test.

    Paired over the keys that both have, where there are two or more; else Welch's test (unequal variances) on all
    values. No p, and the reason, for fewer than two values on a side and where nothing varies.
    """
    pairs = sorted(mine.keys() & other.keys())
    if len(pairs) >= 2:
        return _paired([mine[seed] for seed in pairs], [other[seed] for seed in pairs])
    by = statistics.fmean(mine.values()) - statistics.fmean(other.values())
    count = min(len(mine), len(other))
    if count < 2:
        return Difference(by, "none", count, reason="fewer than two seeds")
    return _welch(list(mine.values()), list(other.values()), by)


def _paired(first: list[float], second: list[float]) -> Difference:
    differences = [a - b for a, b in zip(first, second, strict=True)]
    by, count = statistics.fmean(differences), len(differences)
    if not any(differences):
        return Difference(by, "paired", count, p=1.0)
    if _constant(differences, [*first, *second]):
        return Difference(by, "none", count, reason="the same difference at every seed")
    from scipy import stats

    return Difference(by, "paired", count, p=float(stats.ttest_rel(first, second).pvalue))


def _welch(first: list[float], second: list[float], by: float) -> Difference:
    count = min(len(first), len(second))
    if _constant(first, first) and _constant(second, second):
        return Difference(by, "none", count, reason="no spread over seeds")
    from scipy import stats

    return Difference(by, "welch", count, p=float(stats.ttest_ind(first, second, equal_var=False).pvalue))


def _constant(values: list[float], scale: list[float]) -> bool:
    """Whether the values differ by no more than rounding."""
    return max(values) - min(values) <= 1e-12 * max(map(abs, scale))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979) of p values, in their order: the chance of one false alarm among all stays
    below the level.
    """
    order = sorted(range(len(ps)), key=lambda index: ps[index])
    raised = (min(1.0, (len(ps) - rank) * ps[index]) for rank, index in enumerate(order))
    corrected = dict(zip(order, itertools.accumulate(raised, max), strict=True))
    return [corrected[index] for index in range(len(ps))]


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with their p corrected over all of them that have one."""
    tested = [index for index, found in enumerate(differences) if not math.isnan(found.p)]
    result = list(differences)
    for index, p in zip(tested, holm([differences[index].p for index in tested]), strict=True):
        result[index] = differences[index]._replace(corrected=p)
    return result
