"""Comparing configurations over seeds: groups, means, tests against a baseline, Holm's correction, best of a column.

Pure: from results (parameters as text, seed, metrics) to a table of numbers. Who reads results from a store and who
writes a table down is elsewhere.
"""

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from epsd.types import EpsdError

LEVEL = 0.05
"""Below this corrected p a difference is called significant."""

LOWER = {
    "nll", "ece", "brier", "loss", "cross_entropy", "distillation", "seconds", "ms", "image_passes", "images", "gflops",
    "bytes", "parameters", "nonzero", "memory", "dead_layers",
}  # fmt: skip
"""What a metric's name ends with, or has in it between underscores, where a smaller value is the better one. So it is
with whatever begins with `time/`.
"""
HIGHER = {"top1", "top5", "accuracy", "map", "map50", "map75", "compression"}
"""Likewise for a greater value."""

WITHOUT_EFFECT = ("tracking.", "tune.", "dataset.download")
"""Parameters that change no result."""

ONLY_TIMING = (
    "device", "threads", "versions.", "data.workers", "prune.compare", "prune.score.graphs_kept", "evaluate.batch_size",
    "evaluate.latency_", "train.memory_format", "train.update", "train.compile",
)  # fmt: skip
"""Parameters, and facts about the machine, that change nothing but how long it takes (and the last bits)."""

MACHINE = ("threads", "versions.cpu", "versions.gpu")
"""Tags of a run that say what it was timed on."""

TIMED_WITH = (
    "device", "threads", "versions.", "data.workers", "evaluate.batch_size", "evaluate.latency_", "train.memory_format",
    "train.update", "train.compile", "train.precision",
)  # fmt: skip
"""What two timings must have in common to be compared at all."""

ONLY_OF = {
    "evaluate.batch_size": ("time/evaluate",),
    "evaluate.latency_": ("model/latency_", "time/evaluate"),
    "evaluate.ece_bins": ("test/ece",),
    "voc.": ("detect/", "time/detect"),
    "detect.": ("detect/", "time/detect"),
}
"""Parameters that matter to metrics that begin like this, and to no other."""

NEUTRAL = {"prune.channel_cap": "null", "prune.batches": "1", "prune.average": "absolute"}
"""Parameters at the value that does what was done before they were there: runs from then are the same configuration."""

OF_THE_METHOD = ("prune.", "procedure.", "objective.")
DENSE = "dense"


class ComparisonError(EpsdError):
    """Nothing to compare, an unknown metric or baseline."""


@dataclass(frozen=True)
class Entry:
    """One finished run.

    params : dotted name -> value as text, as MLflow has them.  metrics : name -> last value.
    began : when, in any unit; of two runs of one configuration and seed the later one counts.
    digest : of the data it saw.  variant : a name for its method, "" for none.  machine : its tags that MACHINE names.
    """

    params: Mapping[str, str]
    metrics: Mapping[str, float]
    began: float = 0
    digest: str = ""
    variant: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)


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


@dataclass
class Cell:
    """A configuration: one value per seed. `best`: the best mean of its column, or not told apart from it.

    data : seed -> digest of the data of that value.
    """

    values: dict[int, float]
    data: dict[int, str] = field(default_factory=dict)
    against: Difference | None = None
    best: bool = False

    @property
    def summary(self) -> Summary:
        """Mean, deviation, seeds."""
        return summarise(list(self.values.values()))

    @property
    def runs(self) -> dict[tuple[int, str], float]:
        """The values by what makes a pair of two: the seed and the data."""
        return {(seed, self.data.get(seed, "")): value for seed, value in self.values.items()}


@dataclass
class Row:
    """One method under one objective. `context`: what else tells it from other rows, dotted name -> value."""

    method: str
    objective: str
    context: dict[str, str] = field(default_factory=dict)
    cells: dict[float, Cell] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        """`epsd (train.lr=0.1)`."""
        told = ", ".join(f"{key}={value}" for key, value in self.context.items())
        return f"{self.method} ({told})" if told else self.method

    @property
    def name(self) -> str:
        """Label and objective in one."""
        return f"{self.label} + {self.objective}"


@dataclass
class Table:
    """Rows by columns of sparsity. `notes`: what a reader must know, one sentence each."""

    metric: str
    rows: list[Row]
    columns: list[float]
    baseline: str | None = None
    notes: list[str] = field(default_factory=list)


# --- numbers --------------------------------------------------------------------------------------------------------


def better(metric: str) -> Literal["lower", "higher"] | None:
    """Which values are better, by the metric's name; None where nothing is known of it (`train/lr`)."""
    group, _, last = metric.rpartition("/")
    words = {last, *last.split("_")}
    if group == "time" or words & LOWER:
        return "lower"
    return "higher" if words & HIGHER else None


def is_timing(metric: str) -> bool:
    """By the metric's name."""
    return metric.startswith("time/") or any(part in metric.rpartition("/")[2] for part in ("seconds", "latency"))


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
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = highest
    return corrected


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with their p corrected over all of them that have one."""
    tested = [index for index, found in enumerate(differences) if not math.isnan(found.p)]
    result = list(differences)
    for index, p in zip(tested, holm([differences[index].p for index in tested]), strict=True):
        result[index] = differences[index]._replace(corrected=p)
    return result


# --- from runs to rows ----------------------------------------------------------------------------------------------


def configuration(entry: Entry, metric: str) -> dict[str, str]:
    """Every parameter but the seed that can bear on `metric`."""
    params, dense = {**entry.params, **entry.machine}, _number(entry.params.get("prune.sparsity", "")) == 0
    return {
        key: value
        for key, value in sorted(params.items())
        if key != "seed" and not key.startswith(WITHOUT_EFFECT) and _bears(key, metric) and NEUTRAL.get(key) != value
        and (is_timing(metric) or not key.startswith(ONLY_TIMING))
        and not (dense and key.startswith("prune.") and key != "prune.sparsity" and "procedure.name" not in params)
        and not (key in ("train.milestones", "train.gamma") and params.get("train.schedule", "step") != "step")
    }  # fmt: skip


def _bears(key: str, metric: str) -> bool:
    return all(metric.startswith(only) for prefix, only in ONLY_OF.items() if key.startswith(prefix))


def _number(text: str) -> float | str:
    """A number as a number, so that 0.90 and 0.9 are one value; anything else as it is."""
    try:
        return float(text)
    except ValueError:
        return text


class _Group(NamedTuple):
    """Runs of one configuration."""

    config: dict[str, str]
    variant: str
    values: dict[int, float]
    data: dict[int, str]


def table(entries: Iterable[Entry], metric: str) -> Table:
    """Rows (method and objective) by sparsity, one value per seed. Raises ComparisonError: see `_with_metric`.

    What no result depends on is left out of a configuration. Configurations that differ in more than sparsity are
    different rows, and their labels say in what. A note says what all timings were taken with.
    """
    usable, notes = _with_metric(list(entries), metric)
    groups, superseded = _groups(usable, metric)
    if superseded:
        notes.append(f"{superseded} earlier runs of the same configuration and seed are left out.")
    rows: dict[str, Row] = {}
    for group in groups:
        keys = {key: value for key, value in group.config.items() if key != "prune.sparsity"}
        method = _method(group.config, group.variant)
        mark = repr((method, sorted((key, _number(value)) for key, value in keys.items())))
        row = rows.setdefault(mark, Row(method, keys.get("objective.name", "?"), keys=keys))
        row.cells[float(group.config["prune.sparsity"])] = Cell(group.values, group.data)
    found = list(rows.values())
    _tell_apart(found)
    columns = sorted({sparsity for row in found for sparsity in row.cells})
    timed, differing = _timed_with(found[0], metric), _differing(found)
    if shared := [f"{key} {value}" for key, value in timed.items() if key not in differing]:
        notes.append(f"Timed with {', '.join(shared)}.")
    return Table(metric, found, columns, notes=notes)


def _with_metric(entries: list[Entry], metric: str) -> tuple[list[Entry], list[str]]:
    """Those that have the metric, a seed and a sparsity. Raises ComparisonError where none has, with the valid ones."""
    numbers = ("seed", "prune.sparsity")
    trained = [e for e in entries if all(isinstance(_number(e.params.get(key, "")), float) for key in numbers)]
    if not trained:
        raise ComparisonError(f"no finished run of a trained model among {len(entries)} runs.")
    usable: list[Entry] = []
    without: list[Entry] = []
    for entry in trained:
        (usable if math.isfinite(entry.metrics.get(metric, math.nan)) else without).append(entry)
    if not usable:
        names = sorted({name for entry in trained for name in entry.metrics})
        raise ComparisonError(f"--metric: none of {len(trained)} runs has '{metric}'. There are: {', '.join(names)}.")
    rows = dict.fromkeys(f"{_method(e.params, e.variant)}+{e.params.get('objective.name', '?')}" for e in without)
    return usable, [f"{len(without)} runs have no {metric}: {', '.join(rows)}."] if without else []


def _groups(entries: list[Entry], metric: str) -> tuple[list[_Group], int]:
    """One group for each configuration, and how many runs were superseded by a later one of the same seed."""
    found: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.began):
        found.setdefault(_identity(configuration(entry, metric)), []).append(entry)
    groups, superseded = [], 0
    for runs in found.values():
        for part in _by_data(runs):
            config = configuration(part[-1], metric)
            if len(part) < len(runs):
                config["data.digest"] = part[0].digest[:8]
            values = {int(run.params["seed"]): run.metrics[metric] for run in part}
            superseded += len(part) - len(values)
            variant = next((run.variant for run in reversed(part) if run.variant), "")
            data = {int(run.params["seed"]): run.digest for run in part}
            groups.append(_Group(config, variant, values, data))
    return groups, superseded


def _identity(config: Mapping[str, str]) -> str:
    return repr([(key, _number(value)) for key, value in config.items()])


def _by_data(runs: list[Entry]) -> list[list[Entry]]:
    """Apart by data where one seed has seen several data sets (one split by seed is no other data)."""
    digests: dict[str, set[str]] = {}
    for run in runs:
        digests.setdefault(run.params["seed"], set()).add(run.digest)
    if all(len(seen) == 1 for seen in digests.values()):
        return [runs]
    return [[run for run in runs if run.digest == digest] for digest in dict.fromkeys(run.digest for run in runs)]


def _method(config: Mapping[str, str], variant: str) -> str:
    if variant:
        return variant
    if "procedure.name" in config:
        return config["procedure.name"]
    if _number(config["prune.sparsity"]) == 0:
        return DENSE
    control = config.get("prune.control", "none")
    return config.get("prune.score.name", "?") + ("" if control == "none" else f" {control}")


def _tell_apart(rows: list[Row]) -> None:
    """Give each row the parameters in which it differs from others: those of the method within rows of its name,
    all other ones over the whole table.
    """
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.method, row.objective), []).append(row)
    everywhere = [key for key in _differing(rows) if not key.startswith(OF_THE_METHOD) and not _implied(key, rows)]
    for same in alike.values():
        for key in dict.fromkeys([*_differing(same), *everywhere]):
            for row in same:
                if row.method != DENSE or not key.startswith("prune."):
                    row.context[key] = row.keys.get(key, "not set")


def _implied(key: str, rows: list[Row]) -> bool:
    """Settings of a choice whose name differs already: the name says it."""
    section, _, last = key.rpartition(".")
    return last != "name" and any(section + ".name" in row.keys for row in rows) and not all(
        row.keys.get(f"{section}.name") == rows[0].keys.get(f"{section}.name") for row in rows
    )  # fmt: skip


def _timed_with(row: Row, metric: str) -> dict[str, str]:
    """What its timings were taken with; nothing where the metric is no timing."""
    return {key: value for key, value in row.keys.items() if is_timing(metric) and key.startswith(TIMED_WITH)}


def _timed_alike(row: Row, other: Row, metric: str) -> bool:
    return _identity(_timed_with(row, metric)) == _identity(_timed_with(other, metric))


def _differing(rows: list[Row]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row.keys)
    return [key for key in keys if len({_number(row.keys.get(key, "")) for row in rows}) > 1]


# --- significance ---------------------------------------------------------------------------------------------------


def against(table: Table, baseline: str) -> None:
    """Compare every cell with the baseline's of the same sparsity; Holm over all comparisons of the table.

    baseline : a row's method (`random`: the row of that method with the same objective and the same other
        differences), or method and objective (`random+cskd`: that row for all). The dense network is compared with at
        every sparsity.
    Raises ComparisonError for a baseline that is not there or not one row, listing the rows.
    """
    otherwise = 0
    compared: list[tuple[Cell, Difference]] = []
    for row in table.rows:
        base = _baseline(table, row, baseline)
        if base is not None and not _timed_alike(base, row, table.metric):
            otherwise += 1
            continue
        for sparsity, cell in row.cells.items():
            other = _cell_of(base, sparsity) if base is not None and base is not row else None
            if other is not None:
                compared.append((cell, difference(cell.runs, other.runs)))
    for (cell, _), found in zip(compared, corrected([found for _, found in compared]), strict=True):
        cell.against = found
    table.baseline = baseline
    if otherwise:
        table.notes.append(f"{otherwise} rows were timed otherwise than {baseline} and are not compared with it.")
    _note_tests(table, [found for _, found in compared])


def _cell_of(row: Row, sparsity: float) -> Cell | None:
    return row.cells.get(0.0) if row.method == DENSE else row.cells.get(sparsity)


def _baseline(table: Table, row: Row, wanted: str) -> Row | None:
    """The row that `row` is compared with; None where its objective has none."""
    names = [other for other in table.rows if wanted in (other.method, other.label)]
    exact = [o for o in table.rows if wanted in (f"{o.method}+{o.objective}", f"{o.label}+{o.objective}")]
    if not names and not exact:
        known = ", ".join(dict.fromkeys(f"{other.label}+{other.objective}" for other in table.rows))
        raise ComparisonError(f"--baseline: there is no row '{wanted}'. Rows: {known}.")
    found = exact or [other for other in names if other.objective == row.objective]
    if len(found) > 1:
        shared = {key for other in found for key in other.context if not key.startswith(OF_THE_METHOD)}
        found = [o for o in found if all(o.keys.get(key) == row.keys.get(key) for key in shared)] or found
    if len(found) > 1:
        several = ", ".join(f"{other.label}+{other.objective}" for other in found)
        raise ComparisonError(
            f"--baseline: '{wanted}' is several rows: {several}. Name one of them, or filter the runs."
        )
    return found[0] if found else None


def _note_tests(table: Table, found: list[Difference]) -> None:
    tested = [one for one in found if not math.isnan(one.p)]
    kinds = {"paired": "t-test paired over seeds", "welch": "Welch's t-test (w)"}
    used = " or ".join(text for kind, text in kinds.items() if any(one.test == kind for one in tested))
    same = "" if "+" in (table.baseline or "") else " under the same objective"
    if tested:
        correction = f", Holm-corrected over {len(tested)} comparisons" if len(tested) > 1 else ""
        table.notes.append(f"p: difference from {table.baseline}{same}, two-sided {used}{correction}.")
    for reason in dict.fromkeys(one.reason for one in found if one.reason):
        count = sum(one.reason == reason for one in found)
        table.notes.append(f"No p for {count} comparisons with {table.baseline}: {reason}.")


def _ways_timed(table: Table) -> list[list[Row]]:
    """The rows, those together that were timed alike: all of them where the metric is no timing."""
    ways: dict[str, list[Row]] = {}
    for row in table.rows:
        ways.setdefault(_identity(_timed_with(row, table.metric)), []).append(row)
    return list(ways.values())


def mark_best(table: Table) -> None:
    """Mark in each column the best mean and the cells that are not significantly different from it (Holm within the
    column). With fewer than two seeds nothing can be said of a cell, and it is not marked. Timings have a best among
    those taken alike, a metric of which it is not known which way is better has none.
    """
    way = better(table.metric)
    if way is None:
        table.notes.append(f"No best is marked: it is not known whether a lower or a higher {table.metric} is better.")
        return
    sign, untold = -1 if way == "lower" else 1, 0
    for sparsity, timed in itertools.product(table.columns, _ways_timed(table)):
        column = [row.cells[sparsity] for row in timed if sparsity in row.cells]
        if not column:
            continue
        first = max(column, key=lambda cell: sign * cell.summary.mean)
        others = [cell for cell in column if cell is not first]
        first.best = True
        for cell, found in zip(others, corrected([difference(c.runs, first.runs) for c in others]), strict=True):
            cell.best = not math.isnan(found.p) and not found.significant
            untold += math.isnan(found.p)
    if len(_ways_timed(table)) > 1:
        table.notes.append("Rows that were timed otherwise than each other have a best of their own.")
    extreme = f"{way.removesuffix('er')}est"
    note = f"Bold: the {extreme} mean of a column and what is not significantly different from it (p ≥ {LEVEL:g})"
    table.notes.append(f"{note}; {untold} cells have too few seeds or no spread to tell." if untold else f"{note}.")
