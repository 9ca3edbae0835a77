"""The registered models: which version, and which run, is meant by a name, an alias, an address; who is champion."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from epsd.project.runtime import brief
from epsd.tracking.addresses import shown, tracking_uri
from epsd.tracking.models import CANDIDATE, DETECTOR, NAME, quietly
from epsd.tracking.runs import is_trained
from epsd.tracking.store import REPLACES, connection
from epsd.types import EpsdError

CHAMPION = "champion"
"""Alias of what `epsd promote` chose."""

STAGES = {NAME: "evaluate", DETECTOR: "detect"}
"""Name of a registered model -> the stage that records it."""

WEIGHTS = {NAME: "model", DETECTOR: "detector"}
"""The same name -> folder of a run's artifacts with the weights that it was made of, and their card."""

_SHORTEST = 4
"""Characters of an id that are taken for its beginning: an unset shell variable names no model."""

_RECENT = 8


class RegistryError(EpsdError):
    """A run or model that is not in the store, or a store that cannot be asked."""


class Unregistered(RegistryError):
    """A run that is there and has no registered model."""


class Version(NamedTuple):
    """A registered version: its model's name, number, run, run name, where its files are and what it was trained on."""

    name: str
    number: str
    run_id: str
    run_name: str
    source: str
    dataset: str = ""


def promote(wanted: str, name: str = NAME) -> Version:
    """Make the model of a run the champion of the registered model `name`. `wanted`: the run's id, the beginning of it,
    its name, `candidate`, or an address (`models:/epsd/3`).

    Raises RegistryError: no such run (listing the recent ones), several, one without a model, a store that is away.
    """
    with _asked() as client:
        version = _find(client, wanted, name)
        client.set_registered_model_alias(version.name, CHAMPION, version.number)
        return version


def fetch(wanted: str, name: str = NAME) -> Path:
    """The folder with a registered model, brought here where it lies elsewhere. `wanted`: as for `promote`, or
    `champion`. Raises RegistryError.
    """
    with _asked() as client:
        version = _find(client, wanted, name)
        import mlflow.artifacts

        place = mlflow.artifacts.download_artifacts(artifact_uri=version.source, tracking_uri=tracking_uri())
    return Path(place)


def fetch_weights(wanted: str, name: str = NAME) -> Path:
    """The folder with the weights, their card and the mask that a run recorded, brought here where it lies elsewhere.

    `wanted`: as for `fetch`; of a run, that it has no registered model does not matter. Raises RegistryError.
    """
    with _asked() as client:
        run_id, name = _run_of(client, wanted, name)
        folder = WEIGHTS[name]
        if not any(file.path.endswith(".safetensors") for file in client.list_artifacts(run_id, folder)):
            raise RegistryError(f"run '{wanted}' recorded no weights of '{name}' (its artifacts, folder {folder}).")
        return Path(client.download_artifacts(run_id, folder))


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


def _find(client: Any, wanted: str, name: str) -> Version:
    if wanted in (CANDIDATE, CHAMPION):
        return _by_alias(client, wanted, name)
    if is_address(wanted):
        return _by_address(client, wanted)
    runs = _matching(client, wanted)
    owned = {run.info.run_id: _newest(client, run, name) for run in runs}
    found = {run_id: version for run_id, version in owned.items() if version is not None}
    if len(found) == 1:
        return next(iter(found.values()))
    if not found:
        stage = STAGES[name]
        raise Unregistered(
            f"run '{wanted}' has no registered model{'' if name == NAME else f' {name}'}: `dvc repro {stage}` records "
            f"one (if it is cached: `dvc repro -f -s {stage}`). {_recent(client)}"
        )
    raise RegistryError(_several(wanted, [run for run in runs if run.info.run_id in found], "runs with a model"))


def _several(wanted: str, runs: list[Any], what: str) -> str:
    return f"'{wanted}' fits several {what}: {', '.join(map(_named, runs))}. Give the beginning of an id."


def _run_of(client: Any, wanted: str, name: str) -> tuple[str, str]:
    """The id of the run that is meant, and the name of the registered model."""
    if wanted in (CANDIDATE, CHAMPION) or is_address(wanted):
        version = _find(client, wanted, name)
        return version.run_id, version.name
    runs = _matching(client, wanted)
    if len(runs) > 1:
        raise RegistryError(_several(wanted, runs, "runs"))
    return runs[0].info.run_id, name


_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<number>\d+))")
_VALID = "Valid: models:/NAME@ALIAS and models:/NAME/VERSION, NAME one of " + ", ".join(STAGES)


def is_address(wanted: str) -> bool:
    """Whether it is an address of MLflow's registry."""
    return wanted.startswith("models:/")


def _by_address(client: Any, address: str) -> Version:
    found = _ADDRESS.fullmatch(address)
    if found is None or found["name"] not in STAGES:
        raise RegistryError(f"{address}: no address of a model of epsd. {_VALID}.")
    if found["alias"]:
        return _by_alias(client, found["alias"], found["name"])
    version = client.get_model_version(found["name"], found["number"])
    return _described(client.get_run(version.run_id), version)


def _by_alias(client: Any, alias: str, name: str) -> Version:
    try:
        version = client.get_model_version_by_alias(name, alias)
    except Exception as error:
        if getattr(error, "error_code", "") not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        how = "`epsd promote RUN` chooses one" if alias == CHAMPION else "`dvc repro` makes one"
        of = "" if name == NAME else f" of {name}"
        raise RegistryError(f"there is no {alias}{of} yet: {how}. {_recent(client)}") from None
    return _described(client.get_run(version.run_id), version)


def _described(run: Any, version: Any) -> Version:
    named = (version.name, version.version, run.info.run_id, run.info.run_name, version.source)
    return Version(*map(str, [*named, version.tags.get("dataset", "")]))


def _matching(client: Any, wanted: str) -> list[Any]:
    """Runs by id, by name, by the beginning of an id: the first of these that finds any. RegistryError: none does."""
    runs = _runs(client)
    tests: tuple[Callable[[Any], bool], ...] = (
        lambda run: wanted in (run.info.run_id, run.data.tags.get(REPLACES)),
        lambda run: run.info.run_name == wanted,
        lambda run: len(wanted) >= _SHORTEST and run.info.run_id.startswith(wanted),
    )
    found: list[Any] = []
    for test in tests:
        found = found or [run for run in runs if test(run)]
    if not found:
        raise RegistryError(f"no run '{wanted}' (its id, the beginning of it, or its name). {_recent(client)}")
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


def _newest(client: Any, run: Any, name: str) -> Version | None:
    versions = client.search_model_versions(f"name = '{name}' and run_id = '{run.info.run_id}'")
    newest = max(versions, key=lambda version: int(version.version), default=None)
    return None if newest is None else _described(run, newest)


def _recent(client: Any) -> str:
    """The newest runs, as text."""
    runs = _runs(client)[:_RECENT]
    return f"Recent runs: {', '.join(map(_named, runs))}." if runs else "There are no runs yet: `make repro` makes one."


def _named(run: Any) -> str:
    return f"{run.info.run_id[:8]} ({run.info.run_name})"
