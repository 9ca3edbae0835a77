"""A table's cells against a baseline, and the best of each column, with Holm's correction."""

import itertools
import math

from epsd.comparison.configuration import identity, timed_alike, timed_with
from epsd.comparison.metrics import better
from epsd.comparison.rows import DENSE, OF_THE_METHOD
from epsd.comparison.statistics import LEVEL, Difference, corrected, difference
from epsd.comparison.types import Cell, ComparisonError, Row, Table


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
        if base is not None and not timed_alike(base, row, table.metric):
            otherwise += 1
            continue
        for sparsity, cell in row.cells.items():
            if base is None or base is row:
                continue
            if other := base.cells.get(0.0 if base.method == DENSE else sparsity):
                compared.append((cell, difference(cell.runs, other.runs)))
    for (cell, _), found in zip(compared, corrected([found for _, found in compared]), strict=True):
        cell.against = found
    table.baseline = baseline
    if otherwise:
        table.notes.append(f"{otherwise} rows were timed otherwise than {baseline} and are not compared with it.")
    _note_tests(table, [found for _, found in compared])


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
        ways.setdefault(identity(timed_with(row, table.metric)), []).append(row)
    return list(ways.values())


SEEDS = 3
"""By two of them a difference of a fifth is "not significant"."""


def mark_best(table: Table) -> None:
    """Mark in each column the best mean and the cells that are not significantly different from it (Holm within the
    column). With fewer than SEEDS seeds too much would equal it, and no cell is marked. Timings have a best among
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
        first.best = len(first.values) >= SEEDS
        untold += not first.best
        for cell, found in zip(others, corrected([difference(c.runs, first.runs) for c in others]), strict=True):
            told = first.best and len(cell.values) >= SEEDS and not math.isnan(found.p)
            cell.best = told and not found.significant
            untold += not told
    if len(_ways_timed(table)) > 1:
        table.notes.append("Rows that were timed otherwise than each other have a best of their own.")
    extreme = f"{way.removesuffix('er')}est"
    note = f"Bold: the {extreme} mean of a column and what is not significantly different from it (p ≥ {LEVEL:g})"
    rest = f"; {untold} cells have fewer than {SEEDS} seeds or no spread to tell" if untold else ""
    table.notes.append(f"{note}{rest}.")
