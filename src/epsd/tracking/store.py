"""Runs in a store of MLflow: opened, continued, doubled where settings contradict, and all that is logged in them."""

import contextlib
import json
import os
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from epsd.project.runtime import located, no_telemetry, note, project_root, state_folder
from epsd.tracking import models, pages
from epsd.tracking.addresses import shown, tracking_uri
from epsd.tracking.database import complete, locked, watch_connections
from epsd.tracking.identity import is_gone
from epsd.tracking.relocation import relocate
from epsd.tracking.spool import LOCAL, UNOPENED, Event, resolve
from epsd.tracking.texts import conflicts, with_paragraph

_FAILED = "failed_stage"

_LOCAL_ID = "epsd.local_id"

REPLACES = "epsd.replaces"
"""Tag of a run that was made because the one of this id was not in the store any more."""

_REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"}

_REFUSED_FILE = (400, 413)
"""What a server answers to a file that it will never take (413: too large)."""

_STALE_IF = {"detect/": ("detect.", "voc."), "test/": ("evaluate.",), "model/": ("evaluate.",)}
"""Metric prefix -> the parameters whose change makes that metric of the parent run untrue for its sibling."""

PARAGRAPHS = {"Test": "test/", "Detection": "detect/"}
"""Label of a paragraph in a run's description -> the metrics that it tells of."""

_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "PGCONNECT_TIMEOUT": "10",
}
"""A server that dies at work costs seconds instead of MLflow's four minutes, or for ever with PostgreSQL."""

_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}

_ANSWER_WITHIN = 2.0
"""Seconds that a server has to answer before anything is asked of it."""


def _inherited(tags: Mapping[str, str], stale: list[str]) -> dict[str, str]:
    """What a sibling says of itself like its elder: kind, method, data, and the paragraphs that still hold."""
    own = ("mlflow.", "versions.", "git.", "dvc.", "epsd.", "host", "pid", "config_hash", "derived_from")
    same = {key: value for key, value in tags.items() if not key.startswith((*own, "error", _FAILED))}
    gone = tuple(f"**{label}.**" for label, prefix in PARAGRAPHS.items() if prefix in stale)
    parts = tags.get("mlflow.note.content", "").split("\n\n")
    return same | {"mlflow.note.content": "\n\n".join(part for part in parts if not (gone and part.startswith(gone)))}


class Store:
    """Runs at one tracking URI. Every method raises what MLflow raises."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.remote = uri.startswith(("http://", "https://"))
        self.database = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
        self.home = self.database.parent if self.database else project_root()
        self._client: Any = None
        self.version: str | None = None
        self._points: dict[tuple[str, str], list[tuple[int, float, int]]] = {}
        self._fresh: set[str] = set()

    @property
    def name(self) -> str:
        """As written down in a spool: a store in the project's folder keeps its name when that is moved."""
        if self.database and self.database.is_relative_to(project_root()):
            return str(self.database.relative_to(project_root()))
        return shown(self.uri)

    def probe(self) -> None:
        """Find out in about two seconds whether a server is there; any answer counts. Raises OSError where none is."""
        parts = urlsplit(self.uri)
        if self.remote:
            import requests

            with contextlib.suppress(requests.exceptions.SSLError):
                requests.get(shown(self.uri), timeout=_ANSWER_WITHIN, stream=True).close()
        elif parts.hostname not in (None, "localhost") and "socket" not in parts.query:  # those may be sockets of files
            place = (parts.hostname, parts.port or _PORTS[parts.scheme.partition("+")[0]])
            socket.create_connection(place, timeout=_ANSWER_WITHIN).close()

    @property
    def client(self) -> Any:
        """The MLflow client; its database is created (or moved) by one process at a time."""
        if self._client is None:
            no_telemetry()
            for variable, value in (_HTTP | models.PLAIN).items():
                os.environ.setdefault(variable, value)
            self._client = self._connect()
        return self._client

    def _connect(self) -> Any:
        import logging

        self.probe()
        logging.getLogger("alembic").setLevel(logging.ERROR)
        from mlflow import MlflowClient
        from mlflow.store.db import utils

        utils.MAX_RETRY_COUNT = 1  # ten tries would take two minutes, and hold this process up
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        if self.remote:
            return MlflowClient(tracking_uri=self.uri)
        with self.alone():
            if self.database:
                watch_connections()
                complete(self.database, self.home / "mlruns")
                relocate(self.database, self.home)
            client = MlflowClient(tracking_uri=self.uri)
            if not self.database:  # MLflow makes its tables when it is first asked
                client.search_experiments(max_results=1)
        return client

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """One process at a time makes something: of all that use the database, or else of this project."""
        beside = self.database and Path(f"{self.database.resolve()}.lock")
        return locked(beside or state_folder("locks", "store.lock"), timeout=120)

    def experiment(self, name: str) -> str:
        """The id of the experiment, created or brought back from the bin where need be."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with self.alone():
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    return self._new_experiment(name)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        for key, value in pages.tags().items():  # an experiment of an earlier version, or made by hand
            if found.tags.get(key) != value and (key == pages.TAG or key not in found.tags):
                self.client.set_experiment_tag(found.experiment_id, key, value)
        return str(found.experiment_id)

    def _new_experiment(self, name: str) -> str:
        try:
            if self.remote:
                return str(self.client.create_experiment(name, tags=pages.tags()))
            tags = {"epsd.root": str(self.home), **pages.tags()}
            place = {"artifact_location": str(self.home / "mlruns"), "tags": tags}
            return str(self.client.create_experiment(name, **place))
        except Exception as error:
            if _code(error) != "RESOURCE_ALREADY_EXISTS":  # another machine was faster
                raise
            return str(self.client.get_experiment_by_name(name).experiment_id)

    def open(self, opening: Event, replayed: bool = False) -> str:
        """The id of the run that `opening` asks for, RUNNING: found, a sibling of the one found, or a new one."""
        experiment = self.experiment(opening["experiment"])
        self.bury(experiment)
        if (lost := opening.get("lost")) and (run := self.find(lost)) and run.info.status == "RUNNING":
            self.client.set_terminated(run.info.run_id, "KILLED")
        if replayed and (made := self.tagged(_LOCAL_ID, opening["local"])):
            return str(made.info.run_id)
        run = self.find(opening["run"]) if opening["run"] else None
        if run is None:
            return self.create(experiment, opening, self._known_as(opening["run"]))
        if clash := conflicts(run.data.params, opening["params"]):
            return self.sibling(experiment, run, clash, opening)
        self.reopen(run, opening)
        return str(run.info.run_id)

    def _known_as(self, run_id: str | None) -> dict[str, str]:
        """Tags by which a new run is found under the id that was asked for: announced for it, or of a run now gone."""
        if not run_id:
            return {}
        if run_id.startswith(LOCAL):
            return {_LOCAL_ID: run_id}
        note(f"tracking: run {run_id} is no more in {shown(self.uri)}; a new one takes its place.")
        return {REPLACES: run_id}

    def find(self, run_id: str) -> Any:
        """The run, or what was made for its local id or in its place; None when it was deleted or never was here."""
        if run_id in UNOPENED:
            UNOPENED.discard(run_id)  # whatever becomes of the opening: another try has to look
            return None
        if (known := resolve(run_id)).startswith(LOCAL):  # no run has such an id
            return self.tagged(_LOCAL_ID, known)
        try:
            run = self.client.get_run(known)
            if run.info.lifecycle_stage == "active":
                return run
        except Exception as error:
            if _code(error) not in _REFUSALS:
                raise
        return self.tagged(_LOCAL_ID, run_id) or self.tagged(REPLACES, run_id)

    def tagged(self, tag: str, value: str) -> Any:
        """The newest run with this tag, or None."""
        ids = [experiment.experiment_id for experiment in self.client.search_experiments()]
        runs = self.client.search_runs(ids, f"tags.`{tag}` = '{value}'", max_results=1)
        return runs[0] if runs else None

    def create(self, experiment: str, opening: Event, extra: Mapping[str, str] | None = None) -> str:
        """A new run with its identity, tags, description and parameters."""
        described = {"mlflow.note.content": opening["description"], _LOCAL_ID: opening["local"]}
        tags = {**described, **(extra or {}), **opening["identity"], **opening["tags"]}
        if parent := opening.get("parent"):
            found = self.find(parent)
            tags["mlflow.parentRunId"] = found.info.run_id if found else resolve(parent)
        run = self.client.create_run(experiment, opening["time"], tags, opening["name"])
        self._fresh.add(run.info.run_id)
        self.params(run.info.run_id, opening["params"])
        return str(run.info.run_id)

    def reopen(self, run: Any, opening: Event) -> None:
        """Go on in `run`: what it says about its origin stays, who works on it now is updated."""
        origin = {key: value for key, value in opening["identity"].items() if key not in run.data.tags}
        now = {key: value for key, value in opening["identity"].items() if key in ("host", "pid", "pid.started")}
        added = [part for part in run.data.tags.get("mlflow.note.content", "").split("\n\n") if part.startswith("**")]
        parts = [opening["description"], *added]
        described = {"mlflow.note.content": "\n\n".join(parts)} if opening["description"] else {}
        self.tags(run.info.run_id, {**origin, **now, **opening["tags"], **described})
        missing = {key: value for key, value in opening["params"].items() if key not in run.data.params}
        self.params(run.info.run_id, missing)
        if run.info.status != "FINISHED":  # a training that has finished stays so, whatever becomes of later stages
            self.client.update_run(run.info.run_id, status="RUNNING")

    def sibling(self, experiment: str, run: Any, clash: list[str], opening: Event) -> str:
        """The run of the same trained model under other settings of a later stage: found, or new with what still holds.

        Parameters of a run cannot change, and its earlier row must stay true; so the new settings get their own row.
        """
        parent = run.info.run_id
        for other in self.client.search_runs([experiment], f"tags.derived_from = '{parent}'"):
            if not conflicts(other.data.params, opening["params"]):
                self.reopen(other, opening)
                return str(other.info.run_id)
        stale = [prefix for prefix, sections in _STALE_IF.items() if any(key.startswith(sections) for key in clash)]
        made = self.create(experiment, opening, {"derived_from": parent, **_inherited(run.data.tags, stale)})
        if run.inputs and run.inputs.dataset_inputs:
            self.client.log_inputs(made, datasets=run.inputs.dataset_inputs)
        kept = [key for key in run.data.metrics if not key.startswith(tuple(stale))]
        history = [point for key in kept for point in self.client.get_metric_history(parent, key)]
        for start in range(0, len(history), 1000):
            self.client.log_batch(made, metrics=history[start : start + 1000])
        self._fresh.discard(made)
        return made

    def bury(self, experiment: str) -> None:
        """Mark runs as KILLED that say RUNNING though their process on this machine is no more."""
        query = f"attributes.status = 'RUNNING' and tags.host = '{platform.node()}'"
        for run in self.client.search_runs([experiment], query):
            # a process that finished its run after the search is gone, too
            if is_gone(run.data.tags) and self.client.get_run(run.info.run_id).info.status == "RUNNING":
                self.client.set_terminated(run.info.run_id, "KILLED")

    def send(self, run_id: str, event: Event) -> None:
        """Apply one event to the run; applying it twice changes nothing more."""
        match event["op"]:
            case "metrics":
                self.metrics(run_id, event)
            case "curves":
                self.curves(run_id, event)
            case "params":
                self.params(run_id, event["params"])
            case "tags":
                self.tags(run_id, event["tags"])
            case "artifact":
                self.artifact(run_id, located(event["path"]), event["folder"])
            case "dataset":
                self.dataset(run_id, event)
            case "model":
                self.version = models.record(self.client, run_id, located(event["path"]))
            case "describe":
                self.describe(run_id, event["label"], event["text"])
            case "end":
                self.end(run_id, event)
            case "withdraw":
                self.withdraw(run_id, event)

    def curves(self, run_id: str, event: Event) -> None:
        """Log the points of the epochs that the run lacks: all of them where it was made anew."""
        for step, metrics in event["epochs"]:
            if any(not self._has(run_id, key, metrics[key], step, event["time"]) for key in list(metrics)[:1]):
                self.metrics(run_id, {**event, "metrics": metrics, "step": step})

    def withdraw(self, run_id: str, event: Event) -> None:
        """A session that never began leaves no run of its own; one that was there before it, as after any failure."""
        if run_id in self._fresh:
            self.client.delete_run(run_id)
        else:
            self.end(run_id, event)

    def end(self, run_id: str, event: Event) -> None:
        """The run's status. Of a finished training a tag names the later stages that failed, until they succeed."""
        run, succeeded = self.client.get_run(run_id), event["status"] == "FINISHED"
        finished = run.info.status == "FINISHED"
        failed = [name for name in run.data.tags.get(_FAILED, "").split() if name != event["stage"]]
        if finished and not succeeded:
            failed.append(event["stage"])
        if failed:
            self.tags(run_id, {_FAILED: " ".join(failed)})
        elif succeeded:
            for tag in run.data.tags.keys() & {_FAILED, "error"}:
                self.client.delete_tag(run_id, tag)
        self.client.set_terminated(run_id, "FINISHED" if finished else event["status"], event["time"])

    def metrics(self, run_id: str, event: Event) -> None:
        """Log the points that the run has not yet: one per (key, step), or changed values where there is no step."""
        from mlflow.entities import Metric

        step, when = event["step"], event["time"]
        new = {key: value for key, value in event["metrics"].items() if not self._has(run_id, key, value, step, when)}
        points = [Metric(key, value, when, step or 0) for key, value in new.items()]
        for start in range(0, len(points), 1000):
            self.client.log_batch(run_id, metrics=points[start : start + 1000])
        for key, value in new.items():
            self._points[run_id, key].append((when, value, step or 0))

    def _has(self, run_id: str, key: str, value: float, step: int | None, when: int) -> bool:
        if (run_id, key) not in self._points:
            known = [] if run_id in self._fresh else self.client.get_metric_history(run_id, key)
            self._points[run_id, key] = [(point.timestamp, point.value, point.step) for point in known]
        points = self._points[run_id, key]
        if step is not None:
            return any(point[2] == step for point in points)
        return any(point[:2] == (when, value) for point in points) or bool(points and max(points)[1] == value)

    def forget(self) -> None:
        """Ask the store again which points it has: a call that failed may have been carried out."""
        self._points.clear()
        self._fresh.clear()

    def params(self, run_id: str, params: Mapping[str, str]) -> None:
        """At most 100 in one call, as MLflow wants it."""
        from mlflow.entities import Param

        batch = [Param(key, value) for key, value in params.items()]
        for start in range(0, len(batch), 100):
            self.client.log_batch(run_id, params=batch[start : start + 100])

    def tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """At most 100 in one call."""
        from mlflow.entities import RunTag

        batch = [RunTag(key, value[:5000]) for key, value in tags.items()]
        for start in range(0, len(batch), 100):
            self.client.log_batch(run_id, tags=batch[start : start + 100])

    def artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """A file, or a folder with all that is in it."""
        if path.is_dir():
            self.client.log_artifacts(run_id, str(path), "/".join(filter(None, [folder, path.name])))
        else:
            self.client.log_artifact(run_id, str(path), folder)

    def describe(self, run_id: str, label: str, text: str) -> None:
        """Replace the paragraph of the run's description that `label` begins, or add it at the end."""
        before = self.client.get_run(run_id).data.tags.get("mlflow.note.content", "")
        self.tags(run_id, {"mlflow.note.content": with_paragraph(before, label, text)})

    def dataset(self, run_id: str, event: Event) -> None:
        """The data set that the run has seen, as MLflow's UI shows it."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": event["source"]})
        entity = Dataset(event["name"], event["digest"][:36], "local", source, None, json.dumps(event["sizes"]))
        tag = InputTag("mlflow.data.context", event["context"])
        self.client.log_inputs(run_id, datasets=[DatasetInput(entity, [tag])])


def _code(error: BaseException) -> str:
    """MLflow's name for the error, "" for an error that is not MLflow's."""
    return str(getattr(error, "error_code", ""))


def refused(event: Event, error: BaseException) -> bool:
    """Whether the store has answered no, and would again. A server of MLflow 2 has no place for a model."""
    if isinstance(error.__cause__ or error, UnicodeError | FileNotFoundError | KeyError):
        return True  # text that no store holds, a copy that is lost, a spool of another version
    if getattr(getattr(error, "response", None), "status_code", 0) in _REFUSED_FILE:
        return True
    return _code(error) in (_REFUSALS | {"ENDPOINT_NOT_FOUND"} if event["op"] == "model" else _REFUSALS)


def connection() -> Any:
    """The MLflow client of the store, for those who read. Raises what MLflow raises."""
    return Store(tracking_uri()).client
