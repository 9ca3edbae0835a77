"""What came of a study: table, figure and files under artifacts/studies/NAME."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from epsd.comparison import rows, tables
from epsd.comparison.configuration import MACHINE
from epsd.comparison.significance import against, mark_best
from epsd.comparison.types import ComparisonError, Entry, Table
from epsd.project import artifacts
from epsd.project.artifacts import write_text
from epsd.project.runtime import note, quiet
from epsd.studies.plan import Cell, Plan, StudyParams
from epsd.studies.work import Place, Result, results

if TYPE_CHECKING:
    import pandas as pd

FOLDER = artifacts.ROOT / "studies"
"""Tables and figures of each study, in a folder of its name."""


def conclude(plan: Plan, place: Place) -> list[Path]:
    """Print the table (unless quiet), write table, cells and figure; the files. Unfinished cells are not there."""
    done = list(results(plan, place))
    study, folder = plan.study, FOLDER / plan.study.name
    files = [folder / "cells.csv"]
    write_text(files[0], _cells(done))
    try:
        found = table([entry(cell, result) for cell, result in done], study)
    except ComparisonError as error:
        note(f"study: no table: {error}")
        return files
    if not quiet():
        print(tables.written(found, "terminal"))
    for name, style in (("table.md", "markdown"), ("table.csv", "csv"), ("table.tex", "latex")):
        write_text(folder / name, f"{tables.written(found, style)}\n")  # type: ignore[arg-type]
        files.append(folder / name)
    files += figure(found, folder) + cost_figure(done, study.metric, folder)
    if not quiet():
        print(f"study: written to {folder}: {', '.join(path.name for path in files)}")
    return files


def entry(cell: Cell, result: Result) -> Entry:
    """A cell as what `epsd compare` reads of its run. The variant's name is the plan's: a renamed one is no other."""
    machine = {name: value for name, value in result.tags.items() if name in MACHINE}
    return Entry(result.params, result.metrics, result.began, result.tags["data.digest"], cell.variant, machine)


def table(entries: list[Entry], study: StudyParams) -> Table:
    """The table of the study's metric, against its baseline where the study names one. Raises ComparisonError."""
    found = rows.table(entries, study.metric)
    if study.baseline is not None:
        try:
            against(found, study.baseline)
        except ComparisonError as error:
            found.notes.append(f"{error}")
    mark_best(found)
    return found


def points(table: Table) -> "pd.DataFrame":
    """One line per model: method (with its objective, where there are several), sparsity, seed, value."""
    import pandas as pd

    several = len({row.objective for row in table.rows}) > 1
    rows = [
        {"method": row.name if several else row.label, "sparsity": sparsity, "seed": seed, "value": value}
        for row in table.rows
        for sparsity, cell in row.cells.items()
        for seed, value in cell.values.items()
    ]
    return pd.DataFrame(rows)


def figure(table: Table, folder: Path) -> list[Path]:
    """The metric against sparsity with bands over seeds, and the points it was drawn from."""
    return _drawn("accuracy_against_sparsity", points(table), table.metric, folder)


def _drawn(name: str, data: "pd.DataFrame", metric: str, folder: Path) -> list[Path]:
    """The figure of this name, and the points that it was drawn from."""
    from epsd.figures import study, style

    path, csv_path = folder / f"{name}.png", folder / f"{name}.csv"
    style.save(getattr(study, name)(data, metric=metric), path)
    write_text(csv_path, data.to_csv(index=False))
    return [path, csv_path]


def costs(done: list[tuple[Cell, Result]], metric: str) -> "pd.DataFrame":
    """One line per model that has the metric: method (with what varies beside it), seed, accuracy, seconds and image
    passes of all that was done to get it.
    """
    import pandas as pd

    several = [len({name(cell) for cell, _ in done}) > 1 for name in _BESIDE]
    rows = []
    for cell, result in done:
        beside = [name(cell) for name, varies in zip(_BESIDE, several, strict=True) if varies]
        cost = {name: result.metrics.get(f"cost/{name}", float("nan")) for name in ("seconds", "image_passes")}
        label = ", ".join([cell.method, *beside])
        rows.append({"method": label, "seed": cell.params.seed, "accuracy": result.metrics.get(metric), **cost})
    return pd.DataFrame(rows).dropna()


_BESIDE: tuple[Callable[[Cell], str], ...] = (
    lambda cell: str(cell.params.objective["name"]),
    lambda cell: f"s{cell.params.prune.sparsity:g}",
)


def cost_figure(done: list[tuple[Cell, Result]], metric: str, folder: Path) -> list[Path]:
    """The metric against seconds and image passes, and the points it was drawn from; nothing where none has a cost."""
    data = costs(done, metric)
    return [] if data.empty else _drawn("cost_against_accuracy", data, metric, folder)


def _cells(done: list[tuple[Cell, Result]]) -> str:
    """Every finished cell with all its figures, as CSV."""
    import pandas as pd

    about = ["method", "objective", "sparsity", "seed", "run_id", "seconds"]
    rows = []
    for cell, result in done:
        params, own = cell.params, (result.run_id, result.seconds)
        known = cell.method, params.objective["name"], params.prune.sparsity, params.seed, *own
        rows.append(dict(zip(about, known, strict=True)) | result.metrics)
    frame = pd.DataFrame(rows) if rows else pd.DataFrame(columns=about)
    return str(frame.to_csv(index=False))
