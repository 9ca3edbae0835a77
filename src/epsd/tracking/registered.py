"""The registered model `epsd`: which version is meant by a run, an alias; who is the champion."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from epsd.project.runtime import brief
from epsd.tracking.addresses import shown, tracking_uri
from epsd.tracking.models import CANDIDATE, NAME, quietly
from epsd.tracking.runs import is_trained
from epsd.tracking.store import REPLACES, connection
from epsd.types import EpsdError

CHAMPION = "champion"
"""Alias of what `epsd promote` chose."""

_SHORTEST = 4
"""Characters of an id that are taken for its beginning: an unset shell variable names no model."""

_RECENT = 8


class RegistryError(EpsdError):
    """A run or model that is not in the store, or a store that cannot be asked."""


class Version(NamedTuple):
    """A registered version: its number, run, run name and where its files are."""

    number: str
    run_id: str
    run_name: str
    source: str


def promote(wanted: str) -> Version:
    """Make the model of a run the champion. `wanted`: the run's id, the beginning of it, its name, or `candidate`.

    Raises RegistryError: no such run (listing the recent ones), several, one without a model, a store that is away.
    """
    with _asked() as client:
        version = _find(client, wanted)
        client.set_registered_model_alias(NAME, CHAMPION, version.number)
        return version


def fetch(wanted: str) -> Path:
    """The folder with a registered model, brought here where it lies elsewhere. `wanted`: as for `promote`, or
    `champion`. Raises RegistryError.
    """
    with _asked() as client:
        version = _find(client, wanted)
        import mlflow.artifacts

        place = mlflow.artifacts.download_artifacts(artifact_uri=version.source, tracking_uri=tracking_uri())
    return Path(place)


@contextlib.contextmanager
def _asked() -> Iterator[Any]:
    """The client of the store; whatever goes wrong in the block is one line."""
    try:
        with quietly():
            yield connection()
    except EpsdError:
        raise
    except Exception as error:
        raise RegistryError(f"{shown(tracking_uri())}: {brief(error)}") from None


def _find(client: Any, wanted: str) -> Version:
    if wanted in (CANDIDATE, CHAMPION):
        return _by_alias(client, wanted)
    runs = _matching(client, wanted)
    if not runs:
        raise RegistryError(f"no run '{wanted}' (its id, the beginning of it, or its name). {_recent(client)}")
    owned = {run.info.run_id: _newest(client, run) for run in runs}
    found = {run_id: version for run_id, version in owned.items() if version is not None}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        raise RegistryError(
            f"run '{wanted}' has no registered model: `dvc repro evaluate` records one "
            f"(if it is cached: `dvc repro -f -s evaluate`). {_recent(client)}"
        )
    listed = ", ".join(_named(run) for run in runs if run.info.run_id in found)
    raise RegistryError(f"'{wanted}' fits several runs with a model: {listed}. Give the beginning of an id.")


def _by_alias(client: Any, alias: str) -> Version:
    try:
        version = client.get_model_version_by_alias(NAME, alias)
    except Exception as error:
        if getattr(error, "error_code", "") not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        how = "`epsd promote RUN` chooses one" if alias == CHAMPION else "`dvc repro` makes one"
        raise RegistryError(f"there is no {alias} yet: {how}. {_recent(client)}") from None
    return _described(client.get_run(version.run_id), version)


def _described(run: Any, version: Any) -> Version:
    return Version(str(version.version), str(run.info.run_id), str(run.info.run_name), str(version.source))


def _matching(client: Any, wanted: str) -> list[Any]:
    """Runs by id, by name, by the beginning of an id: the first of these that finds any."""
    runs = _runs(client)
    tests: tuple[Callable[[Any], bool], ...] = (
        lambda run: wanted in (run.info.run_id, run.data.tags.get(REPLACES)),
        lambda run: run.info.run_name == wanted,
        lambda run: len(wanted) >= _SHORTEST and run.info.run_id.startswith(wanted),
    )
    found: list[Any] = []
    for test in tests:
        found = found or [run for run in runs if test(run)]
    return found


def _runs(client: Any) -> list[Any]:
    """Every run of a trained model, newest first."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found, token = [], None
    while True:
        page = client.search_runs(experiments, order_by=["attributes.start_time DESC"], page_token=token)
        found += [run for run in page if is_trained(run.data.tags)]
        token = page.token
        if not token:
            return found


def _newest(client: Any, run: Any) -> Version | None:
    versions = client.search_model_versions(f"name = '{NAME}' and run_id = '{run.info.run_id}'")
    newest = max(versions, key=lambda version: int(version.version), default=None)
    return None if newest is None else _described(run, newest)


def _recent(client: Any) -> str:
    """The newest runs, as text."""
    runs = _runs(client)[:_RECENT]
    return f"Recent runs: {', '.join(map(_named, runs))}." if runs else "There are no runs yet: `make repro` makes one."


def _named(run: Any) -> str:
    return f"{run.info.run_id[:8]} ({run.info.run_name})"
