"""`epsd compare`: a table over recorded runs."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from epsd.comparison import rows, significance, tables
from epsd.comparison.configuration import MACHINE, configuration
from epsd.comparison.tables import ENDINGS, Format
from epsd.comparison.types import ComparisonError, Entry, Table
from epsd.project.artifacts import write_text
from epsd.project.params import DEFAULT_PATH, load
from epsd.project.runtime import note
from epsd.registry import unknown
from epsd.tracking.runs import is_trained, read_runs

if TYPE_CHECKING:
    import pandas as pd


class Request(NamedTuple):
    """What the command line asked for. `style` None: by the ending of `out`, else for the terminal."""

    experiments: tuple[str, ...] = ()
    metric: str = "test/top1"
    where: tuple[str, ...] = ()
    baseline: str | None = None
    best: bool = False
    style: Format | None = None
    out: Path | None = None
    figure: Path | None = None


def command(request: Request, draw: Callable[[Sequence[Entry], Path], None] | None = None) -> None:
    """`epsd compare`: print the table, or write it to a file; have the runs drawn where a figure is asked for.

    Raises RunsError, ArtifactError; ComparisonError, for a file of no known kind before the runs are read.
    """
    ending = request.out.suffix if request.out else ".txt"
    if request.style is None and ending not in ENDINGS:
        raise ComparisonError(f"--out: {unknown('ending', ending, ENDINGS)} Or say what it is to be: --format.")
    if request.figure and request.figure.suffix != ".png":
        raise ComparisonError(f"--figure: {unknown('ending', request.figure.suffix, ['.png'])}")
    runs = chosen(request)
    told = text(request, runs, request.style or ENDINGS[ending])
    if request.out is None:
        print(told)
    else:
        write_text(request.out, f"{told}\n")
        print(f"{request.out} is written.")
    if request.figure and draw:
        draw(runs, request.figure)
        print(f"{request.figure} is written.")


def chosen(request: Request) -> list[Entry]:
    """The runs that the filters leave, as what is compared. Raises as `found` does."""
    return entries(found(request))


def found(request: Request) -> "pd.DataFrame":
    """The runs that the filters leave, a row each: see `read_runs`. Trials, and summaries of searches, studies and
    analyses, are no results: they are left out, unless a filter asks for them (`kind=trial`).

    Raises RunsError; ComparisonError where none is left.
    """
    experiments = request.experiments or _own_experiment()
    frame = read_runs(experiments, request.where)
    if frame.empty:
        filters = f" that are {' and '.join(request.where)}" if request.where else ""
        raise ComparisonError(f"no finished runs in {', '.join(experiments) or 'the store'}{filters}.")
    if "tags.kind" in frame.columns and not any("kind" in text for text in request.where):
        every = [_under("tags.", {str(key): tag for key, tag in row.items()}) for row in frame.to_dict("records")]
        frame = frame[[is_trained(tags) or "kind" not in tags for tags in every]]
    return frame


def text(request: Request, runs: Sequence[Entry], style: Format) -> str:
    """The table as it is read: one for each data set. CSV is one: its rows say on what data."""
    if style == "csv":
        return tables.written(compared(request, runs), style)
    return tables.all_written(every(request, runs), style)


def compared(request: Request, runs: Sequence[Entry] | None = None) -> Table:
    """One table of `runs`, or of those that the filters leave."""
    made = rows.table(chosen(request) if runs is None else runs, request.metric)
    if request.baseline is not None:
        significance.against(made, request.baseline)
    if request.best:
        significance.mark_best(made)
    return made


def every(request: Request, runs: Sequence[Entry]) -> dict[str, Table]:
    """A table for each data set: accuracies on two of them have no best in common. The key, "" for the only one, says
    in what the data sets differ.

    Raises ComparisonError where no data set has the baseline, or the metric; a data set without it is told.
    """
    parts, made, without = _by_data(runs, request.metric), dict[str, Table](), dict[str, ComparisonError]()
    for title, some in parts.items():
        try:
            made[title] = compared(request, some)
        except ComparisonError as error:
            without[title] = error
    if not made:
        raise next(iter(without.values()))
    for title, missing in without.items():
        note(f"compare: {title}: {missing}")
    return made


def _by_data(runs: Sequence[Entry], metric: str) -> dict[str, list[Entry]]:
    """By what of `dataset` can bear on the metric: its title cannot."""
    of = [{k: v for k, v in configuration(run, metric).items() if k.startswith("dataset.")} for run in runs]
    differ = [key for key in sorted({*itertools.chain(*of)}) if len({settings.get(key) for settings in of}) > 1]
    found: dict[str, list[Entry]] = {}
    for run, settings in zip(runs, of, strict=True):
        title = ", ".join(f"{key}={settings[key]}" for key in differ if key in settings)
        found.setdefault(title, []).append(run)
    return found


def _own_experiment() -> tuple[str, ...]:
    """The one of params.yaml; all, where there is no such file."""
    return (load(DEFAULT_PATH).tracking.experiment,) if DEFAULT_PATH.is_file() else ()


def entries(frame: "pd.DataFrame") -> list[Entry]:
    """Rows of `epsd.tracking.runs.read_runs` as what is compared."""
    return [_entry({str(key): value for key, value in row.items()}) for row in frame.to_dict("records")]


def _entry(row: Mapping[str, Any]) -> Entry:
    tags = _under("tags.", row)
    return Entry(
        params=_under("params.", row),
        metrics=_under("metrics.", row),
        began=float(row["began"]),
        digest=tags.get("data.digest", ""),
        variant=tags.get("variant", ""),
        machine={name: tags[name] for name in MACHINE if name in tags},
    )


def _under(prefix: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a run has of parameters, tags or metrics: a table has None or NaN for what it lacks."""
    had = {key: value for key, value in row.items() if value is not None and value == value}
    return {key.removeprefix(prefix): value for key, value in had.items() if key.startswith(prefix)}
