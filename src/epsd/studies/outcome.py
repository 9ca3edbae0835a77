"""What came of a study: table, figure and files under artifacts/studies/NAME."""

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
    files, figures = [folder / "cells.csv"], cells(done)
    write_text(files[0], figures.to_csv(index=False))
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
    files += _drawn("accuracy_against_sparsity", points(found), study.metric, folder)
    files += _drawn("cost_against_accuracy", costs(figures, study.metric), study.metric, folder)
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


def cells(done: list[tuple[Cell, Result]]) -> "pd.DataFrame":
    """Every finished cell with all its figures."""
    import pandas as pd

    about = ["method", "objective", "sparsity", "seed", "run_id", "seconds"]
    rows = []
    for cell, result in done:
        params, own = cell.params, (result.run_id, result.seconds)
        known = cell.method, params.objective["name"], params.prune.sparsity, params.seed, *own
        rows.append(dict(zip(about, known, strict=True)) | result.metrics)
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=about)


def costs(cells: "pd.DataFrame", metric: str) -> "pd.DataFrame":
    """One line per model that has the metric: method (with what varies beside it), seed, accuracy, seconds and image
    passes of all that was done to get it.
    """
    found = cells.reindex(columns=["method", "seed", metric, "cost/seconds", "cost/image_passes"])
    found.columns = ["method", "seed", "accuracy", "seconds", "image_passes"]
    for labels in (cells["objective"], cells["sparsity"].map("s{:g}".format)):
        if labels.nunique() > 1:
            found["method"] += ", " + labels
    return found.dropna()


def _drawn(name: str, data: "pd.DataFrame", metric: str, folder: Path) -> list[Path]:
    """The figure of this name, and the points that it was drawn from; nothing where there are none."""
    from epsd.figures import study, style

    if data.empty:
        return []
    path, csv_path = folder / f"{name}.png", folder / f"{name}.csv"
    style.save(getattr(study, name)(data, metric=metric), path)
    write_text(csv_path, data.to_csv(index=False))
    return [path, csv_path]
