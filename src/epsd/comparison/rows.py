"""From runs to rows: one for each configuration, told apart by what they differ in."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from epsd.comparison.configuration import (
    as_number,
    configuration,
    differing_keys,
    identity,
    is_dense,
    is_narrow,
    timed_with,
)
from epsd.comparison.types import Cell, ComparisonError, Entry, Row, Table

OF_THE_METHOD = ("prune.", "procedure.", "objective.")

DENSE = "dense"


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
        mark = repr((method, sorted((key, as_number(value)) for key, value in keys.items())))
        row = rows.setdefault(mark, Row(method, keys.get("objective.name", "?"), keys=keys, named=bool(group.variant)))
        row.cells[float(group.config["prune.sparsity"])] = Cell(group.values, group.data)
    found = list(rows.values())
    _tell_apart(found)
    columns = sorted({sparsity for row in found for sparsity in row.cells})
    timed, differing = timed_with(found[0], metric), differing_keys(found)
    if shared := [f"{key} {value}" for key, value in timed.items() if key not in differing]:
        notes.append(f"Timed with {', '.join(shared)}.")
    return Table(metric, found, columns, notes=notes)


def _with_metric(entries: list[Entry], metric: str) -> tuple[list[Entry], list[str]]:
    """Those that have the metric, a seed and a sparsity. Raises ComparisonError where none has, with the valid ones."""
    numbers = ("seed", "prune.sparsity")
    trained = [e for e in entries if all(isinstance(as_number(e.params.get(key, "")), float) for key in numbers)]
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
        found.setdefault(identity(configuration(entry, metric)), []).append(entry)
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
    if is_dense(config):
        return DENSE
    control, narrow = config.get("prune.control", "none"), is_narrow(config)
    cut = f" channels {config.get('prune.allocation', 'uniform')}" if narrow else ""
    return config.get("prune.score.name", "?") + cut + ("" if control == "none" else f" {control}")


def _tell_apart(rows: list[Row]) -> None:
    """Give each row the parameters in which it differs from others: those of the method within rows of its name,
    all other ones over the whole table.
    """
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike.setdefault((row.method, row.objective), []).append(row)
    telling = [key for key in differing_keys(rows) if not key.startswith(OF_THE_METHOD)]
    everywhere = [key for key in telling if not _implied(key, rows) and not _named(key, rows)]
    for same in alike.values():
        for key in dict.fromkeys([*differing_keys(same), *everywhere]):
            for row in same:
                if row.method != DENSE or not key.startswith("prune."):
                    row.context[key] = row.keys.get(key, "not set")


def _implied(key: str, rows: list[Row]) -> bool:
    """Settings of a choice whose name differs already: the name says it."""
    section, _, last = key.rpartition(".")
    return last != "name" and any(section + ".name" in row.keys for row in rows) and not all(
        row.keys.get(f"{section}.name") == rows[0].keys.get(f"{section}.name") for row in rows
    )  # fmt: skip


def _named(key: str, rows: list[Row]) -> bool:
    """Whether the names of variants say it: rows without such a name are alike in it, and so are rows of one name."""
    values: dict[str, set[str]] = {}
    for row in rows:
        values.setdefault(row.method if row.named else "", set()).add(row.keys.get(key, ""))
    return all(len(found) == 1 for found in values.values())
