"""Reading: the finished runs of one or more experiments as a table of pandas."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from epsd.project.runtime import brief
from epsd.registry import unknown
from epsd.tracking.addresses import shown, tracking_uri
from epsd.tracking.store import Store
from epsd.tracking.texts import same_value
from epsd.types import EpsdError

if TYPE_CHECKING:
    import pandas as pd

_SIMPLE = re.compile(r"^\s*(?P<key>[\w./\- ]*[\w.])\s*=\s*(?P<value>[^\s=<>!'\"`][^='\"`]*)$")
"""`key=value` without quotes: a filter of our own. Everything else is MLflow's language."""

_PREFIXES = ("params.", "tags.", "metrics.", "attributes.")
_PAGE = 1000


class RunsError(EpsdError):
    """A store, an experiment or a filter that is not there or not understood."""


def read_runs(experiments: Sequence[str] = (), where: Sequence[str] = ()) -> "pd.DataFrame":
    """Every FINISHED run, one row each.

    Parameters
    ----------
    experiments : names; none means all of the store.
    where : filters that all must hold: in MLflow's language (``params.`prune.score.name` = 'epsd'``), or `key=value`
        with a parameter's or a tag's name, numbers compared as numbers (`prune.sparsity=0.9`, `study=digits`).

    Returns
    -------
    run_id, name, experiment, began (Unix milliseconds), and `params.*`, `tags.*` (text, None where a run lacks it)
    and `metrics.*` (float, NaN), as in `mlflow.search_runs`.

    Raises
    ------
    RunsError : no store there; an unknown experiment (lists those there are); a filter that MLflow does not understand
        or whose key no run has (lists the nearest).
    """
    store = Store(tracking_uri())
    if store.database is not None and not store.database.is_file():
        raise RunsError(f"{store.database}: no runs are recorded there yet. `make repro` or `epsd study` records some.")
    simple = [found.groupdict() for text in where if (found := _simple(text))]
    frame = _frame(_search(store, experiments, [text for text in where if not _simple(text)]))
    for condition in simple:
        frame = _holding(frame, condition["key"].strip(), condition["value"].strip())
    return frame


def is_trained(tags: Mapping[str, Any]) -> bool:
    """Whether a run is of a trained model, a result by itself: no trial, and no summary (of a search, a study, an
    analysis).
    """
    return tags.get("kind") in ("pipeline", "cell")


def _simple(text: str) -> "re.Match[str] | None":
    found = _SIMPLE.match(text)
    return None if found is None or found["key"].startswith(_PREFIXES) else found


def _search(store: Store, experiments: Sequence[str], filters: Sequence[str]) -> list[tuple[str, Any]]:
    """(experiment's name, run) of all that MLflow finds."""
    try:
        known = {found.name: found.experiment_id for found in store.client.search_experiments()}
    except Exception as error:
        raise RunsError(f"{shown(store.uri)}: the runs cannot be read ({brief(error)}).") from None
    for name in experiments:
        if name not in known:
            raise RunsError(str(unknown("experiment", name, sorted(known))))
    chosen = {known[name]: name for name in experiments or known}
    query = " and ".join(["attributes.status = 'FINISHED'", *(f"{text.strip()}" for text in filters)])
    found, token = [], None
    try:
        while True:
            page = store.client.search_runs(list(chosen), query, max_results=_PAGE, page_token=token)
            found += [(chosen[run.info.experiment_id], run) for run in page]
            token = page.token
            if not token:
                return found
    except Exception as error:
        told = ", ".join(filters)
        hint = "Example: --where \"params.`prune.score.name` = 'epsd'\" or --where prune.score.name=epsd."
        raise RunsError(f"--where: MLflow does not understand {told} ({brief(error)}). {hint}") from None


def _frame(found: list[tuple[str, Any]]) -> "pd.DataFrame":
    import pandas as pd

    rows = [
        {
            "run_id": run.info.run_id,
            "name": run.info.run_name,
            "experiment": experiment,
            "began": run.info.start_time,
            **{f"params.{key}": value for key, value in run.data.params.items()},
            **{f"tags.{key}": value for key, value in run.data.tags.items()},
            **{f"metrics.{key}": value for key, value in run.data.metrics.items()},
        }
        for experiment, run in found
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run_id", "name", "experiment", "began"])


def _keys(frame: "pd.DataFrame") -> list[str]:
    """Names to filter by: parameters, and the tags that are ours (those of MLflow and of the machine have a dot)."""
    params = {name.removeprefix("params.") for name in frame.columns if name.startswith("params.")}
    tags = {name.removeprefix("tags.") for name in frame.columns if name.startswith("tags.")}
    return sorted(params | {name for name in tags if "." not in name})


def _holding(frame: "pd.DataFrame", key: str, value: str) -> "pd.DataFrame":
    """The rows in which a parameter, or else a tag, named `key` is `value`."""
    column = next((name for name in (f"params.{key}", f"tags.{key}") if name in frame.columns), None)
    if column is None and not frame.empty:
        raise RunsError(f"--where: {unknown('key', key, _keys(frame))}")
    if column is None:
        return frame
    return frame[[isinstance(found, str) and same_value(found, value) for found in frame[column]]]
