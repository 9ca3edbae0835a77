"""Writing: one run per trained model, opened by train, reopened by later stages.

Nothing here raises into the caller. A store that cannot be reached is said once; from then on every event goes to a
spool on disk and is replayed at the next start of any tracker (or as soon as the store is back), each point once.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock, Timeout

from epsd.project.runtime import (
    brief,
    counted,
    located,
    no_telemetry,
    note,
    project_root,
    signals_wait,
    state_folder,
    versions,
)
from epsd.tracking import models, pages
from epsd.tracking.spool import Event, Spool, waiting
from epsd.types import EpsdError

LOCAL = "local-"
"""Prefix of the id of a run that began while the store was away."""

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

_RELOCATED = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
_HTTP = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "PGCONNECT_TIMEOUT": "10",
}
"""A server that dies at work costs seconds instead of MLflow's four minutes, or for ever with PostgreSQL."""

ADDRESSES = ("sqlite:///...", "postgresql://...", "mysql://...", "mssql://...", "http://...", "https://...")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_ANSWER_WITHIN = 2.0
"""Seconds that a server has to answer before anything is asked of it."""

_SHARE = 0.01
"""Of the time, at most, that goes into trying to reach a store that is away."""

_said: set[str] = set()


class AddressError(EpsdError):
    """An address of a tracking store of a kind that is not supported."""


def say_once(text: str, subject: str = "") -> None:
    """A line on stderr, the first time only that this `subject` (or this very text) comes up."""
    if (subject or text) not in _said:
        _said.add(subject or text)
        note(text)


def tracking_uri() -> str:
    """Where runs go: `MLFLOW_TRACKING_URI`, else `mlflow.db` in the project's root (also from a queued experiment).

    Raises AddressError for an address of another kind than those in `ADDRESSES`.
    """
    told = os.environ.get("MLFLOW_TRACKING_URI", "")
    if told and not _is_address(told):
        kept = len(list(state_folder("spool").glob("*.jsonl")))
        also = f" {counted(kept, 'session')} in {state_folder('spool')} wait for their store." if kept else ""
        raise AddressError(
            f"MLFLOW_TRACKING_URI: '{shown(told)}' is no address of a tracking store. Valid: {', '.join(ADDRESSES)}; "
            f"without it runs go to mlflow.db.{also}"
        )
    if re.match(r"sqlite:///[^/]", told):  # a relative file would land in the throw-away copy of a queued experiment
        return f"sqlite:///{project_root() / told.removeprefix('sqlite:///')}"
    return told or f"sqlite:///{project_root() / 'mlflow.db'}"


def _is_address(text: str) -> bool:
    """A driver may be named after a `+`, as in `mysql+pymysql://`; a port is a number."""
    kinds = "|".join(kind.removesuffix("...") for kind in ADDRESSES).replace(":", r"(\+\w+)?:")
    try:
        return bool(re.match(rf"({kinds})\S", text)) and urlsplit(text).port != 0
    except ValueError:
        return False


def shown(uri: str) -> str:
    """`uri` without a password, as it may be printed and written down."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


def as_text(value: Any) -> str:
    """A parameter as MLflow keeps it: as in params.yaml (`null`, `true`, `0.95`, `[1, 2]`), strings without quotes."""
    text = value if isinstance(value, str) else json.dumps(value, default=_plain)
    return text[:6000]


def _plain(value: Any) -> Any:
    """A number of numpy or torch as Python's, anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _number(value: Any) -> float | None:
    """`value` as a float; None for what is no number (a report's text or list), which is no metric."""
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _key(name: str) -> str:
    """`name` with the characters that MLflow refuses replaced."""
    return re.sub(r"[^/\w.\- :]", "_", name).strip("/")[:250]


def _same(first: str, second: str) -> bool:
    """Equal as numbers where both are numbers: MLflow compares text, in which 1 is not 1.0."""
    with contextlib.suppress(ValueError):
        return float(first) == float(second)
    return first == second


def conflicts(known: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Names of the parameters that both have, with different values."""
    return [name for name, value in wanted.items() if name in known and not _same(known[name], value)]


def with_paragraph(description: str, label: str, text: str) -> str:
    """`description` with the paragraph that begins with `**label.**` replaced, or added at the end."""
    start = f"**{label}.**"
    parts = [part for part in description.split("\n\n") if part and not part.startswith(start)]
    return "\n\n".join([*parts, f"{start} {text}"])


def _inherited(tags: Mapping[str, str], stale: list[str]) -> dict[str, str]:
    """What a sibling says of itself like its elder: kind, method, data, and the paragraphs that still hold."""
    own = ("mlflow.", "versions.", "git.", "dvc.", "epsd.", "host", "pid", "config_hash", "derived_from")
    same = {key: value for key, value in tags.items() if not key.startswith((*own, "error", _FAILED))}
    gone = tuple(f"**{label}.**" for label, prefix in PARAGRAPHS.items() if prefix in stale)
    parts = tags.get("mlflow.note.content", "").split("\n\n")
    return same | {"mlflow.note.content": "\n\n".join(part for part in parts if not (gone and part.startswith(gone)))}


# --- who and where --------------------------------------------------------------------------------------------------


def _process_tags() -> dict[str, str]:
    import psutil

    started = str(int(psutil.Process().create_time()))
    return {"host": platform.node(), "pid": str(os.getpid()), "pid.started": started}


def _gone(tags: Mapping[str, str]) -> bool:
    """True when the process that wrote these tags on this machine has ended (another one may have its number now)."""
    import psutil

    try:
        process = psutil.Process(int(tags["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return bool(abs(process.create_time() - float(tags.get("pid.started", process.create_time()))) > 2)
    except psutil.NoSuchProcess:
        return True
    except (KeyError, ValueError, psutil.Error):
        return False


def identity_tags(stage: str, params: Mapping[str, str]) -> dict[str, str]:
    """Who made the run, from which code, which experiment of DVC and which configuration."""
    found = versions()
    digest = hashlib.sha256(json.dumps(sorted(params.items())).encode()).hexdigest()[:12]
    source = f"epsd {stage}" if stage in ("tune", "study", "analyse") else f"stages/{stage}.py"
    tags = {"config_hash": digest, "mlflow.source.name": source, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(Exception):  # no user name in some containers
        import getpass

        tags["mlflow.user"] = getpass.getuser()
    for tag, variable in {"dvc.exp_name": "DVC_EXP_NAME", "dvc.baseline_rev": "DVC_EXP_BASELINE_REV"}.items():
        if value := os.environ.get(variable):
            tags[tag] = value
    if commit := found.get("git.commit"):
        tags |= {"git.commit": commit, "git.dirty": found["git.dirty"], "mlflow.source.git.commit": commit}
    shown = ("python", "torch", "torchvision", "dvc", "mlflow", "cpu", "gpu")
    return tags | {f"versions.{name}": found[name] for name in shown if name in found}


def _identity(stage: str, params: Mapping[str, str]) -> dict[str, str]:
    try:
        return {**identity_tags(stage, params), **_process_tags()}
    except Exception as error:  # an odd machine is no reason to stop a training
        say_once(f"tracking: this machine cannot be described ({brief(error)}).")
        return {}


# --- the store ------------------------------------------------------------------------------------------------------


def relocate(database: Path, root: Path) -> None:
    """Point the artifact addresses of a store whose project folder was moved, renamed or copied to where it is now.

    MLflow makes them absolute when an experiment is created (mlflow/mlflow#3144). The old place is the tag
    `epsd.root` that `_Store` leaves on every experiment. A store that can only be read stays as it is.
    """
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as link:
        try:
            with link:
                _relocate(link, str(root))
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
                raise


def _relocate(link: sqlite3.Connection, root: str) -> None:
    tables = {name for (name,) in link.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "experiment_tags" not in tables:
        return
    query = "SELECT DISTINCT value FROM experiment_tags WHERE key = 'epsd.root' AND value != ?"
    for (old,) in link.execute(query, (root,)).fetchall():
        _replace_prefix(link, tables, old, root)
        link.execute("UPDATE experiment_tags SET value = ? WHERE key = 'epsd.root' AND value = ?", (root, old))


def _replace_prefix(link: sqlite3.Connection, tables: set[str], old: str, new: str) -> None:
    for table, column in _RELOCATED.items():
        if table in tables and any(row[1] == column for row in link.execute(f"PRAGMA table_info({table})")):
            for scheme in ("", "file://"):
                before = f"{scheme}{old}/"
                link.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (f"{scheme}{new}/", len(before) + 1, len(before), before),
                )


class _Store:
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
        with _locked("store", timeout=120):
            if self.database:
                self.database.parent.mkdir(parents=True, exist_ok=True)
                relocate(self.database, self.home)
            client = MlflowClient(tracking_uri=self.uri)
            client.search_experiments(max_results=1)
        return client

    def experiment(self, name: str) -> str:
        """The id of the experiment, created or brought back from the bin where need be."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with _locked("experiment", timeout=60):
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
        if replayed and (made := self.tagged(_LOCAL_ID, opening["local"])):
            return str(made.info.run_id)
        run = self.find(opening["run"]) if opening["run"] else None
        if run is None:
            if opening["run"]:
                note(f"tracking: run {opening['run']} is no more in {shown(self.uri)}; a new one takes its place.")
            return self.create(experiment, opening, {REPLACES: opening["run"]} if opening["run"] else None)
        if clash := conflicts(run.data.params, opening["params"]):
            return self.sibling(experiment, run, clash, opening)
        self.reopen(run, opening)
        return str(run.info.run_id)

    def find(self, run_id: str) -> Any:
        """The run, or what was made for its local id or in its place; None when it was deleted or never was here."""
        try:
            run = self.client.get_run(resolve(run_id))
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
        described = {"mlflow.note.content": opening["description"]}
        tags = {**described, **(extra or {}), **opening["identity"], **opening["tags"]}
        tags[_LOCAL_ID] = opening["local"]
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
            if _gone(run.data.tags):
                self.client.set_terminated(run.info.run_id, "KILLED")

    def send(self, run_id: str, event: Event) -> None:
        """Apply one event to the run; applying it twice changes nothing more."""
        match event["op"]:
            case "metrics":
                self.metrics(run_id, event)
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


def _refused(event: Event, error: BaseException) -> bool:
    """Whether the store has answered no, and would again. A server of MLflow 2 has no place for a model."""
    if isinstance(error.__cause__ or error, UnicodeError | FileNotFoundError | KeyError):
        return True  # text that no store holds, a copy that is lost, a spool of another version
    if getattr(getattr(error, "response", None), "status_code", 0) in _REFUSED_FILE:
        return True
    return _code(error) in (_REFUSALS | {"ENDPOINT_NOT_FOUND"} if event["op"] == "model" else _REFUSALS)


def connection() -> Any:
    """The MLflow client of the store, for those who read. Raises what MLflow raises."""
    return _Store(tracking_uri()).client


@contextlib.contextmanager
def _locked(name: str, timeout: float) -> Iterator[None]:
    """One process at a time. In a project that can only be read there is nothing to make, and no lock."""
    path = state_folder("locks", f"{name}.lock")
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(path, timeout=timeout))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
        yield


# --- outages --------------------------------------------------------------------------------------------------------


def resolve(run_id: str) -> str:
    """The real id behind a local one, once it is known; any other id as it is."""
    path = state_folder("runs", run_id)
    if run_id.startswith(LOCAL) and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    return run_id


def _remember(local: str, real: str) -> None:
    path = state_folder("runs", local)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(real, encoding="utf-8")
    temporary.replace(path)


def _replay(store: _Store, events: list[Event]) -> str:
    """Send the events of one session; returns the id of its run. Safe to begin again after any interruption."""
    first, *rest = events
    store.forget()
    run_id = store.open(first, replayed=True)
    _remember(first["local"], run_id)
    for event in rest:
        try:
            store.send(run_id, event)
        except Exception as error:
            if not _refused(event, error):
                raise
            _reject(run_id, event, error)
    return run_id


def _reject(run_id: str, event: Event, error: Exception) -> None:
    """An event that the store will never take is put aside, so that it does not block the others."""
    path = state_folder("spool", "rejected.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"run": run_id, "error": str(error), **event}, default=str) + "\n")
    say_once(f"tracking: {shown(tracking_uri())} refused {event['op']} of run {run_id} ({brief(error)}).")


def replay(store: _Store) -> int:
    """Send what earlier sessions could not; the number of events sent. Raises what MLflow raises if it cannot be."""
    folder, sent = state_folder("spool"), 0
    if not any(folder.glob("*.jsonl")):
        return 0
    try:
        with _locked("replay", timeout=0):
            for spool in waiting(folder):
                events = spool.events()
                if events and events[0].get("store") != store.name:
                    continue
                try:
                    if events:
                        _replay(store, events)
                except Exception as error:
                    if not _refused(events[0], error):
                        raise
                    aside = spool.set_aside()
                    note(f"tracking: {shown(store.uri)} refused the run that is kept in {aside} ({brief(error)}).")
                    continue
                spool.discard()
                sent += len(events)
    except Timeout:  # another process is at it
        return sent
    if sent:
        note(f"tracking: sent {sent} events that were kept while {shown(store.uri)} was away.")
    return sent


# --- what the stages see --------------------------------------------------------------------------------------------


class Tracker:
    """One session of one stage in one run. Made by `track`. No method raises an `Exception`."""

    def __init__(self, stage: str, opening: Event) -> None:
        self.stage = stage
        self._opening = opening
        self._store = _Store(tracking_uri())
        self._run: str | None = None
        self._spool: Spool | None = None
        self._online = False
        self._tried = self._next_try = 0.0
        self._logged: set[str] = set()
        self._odd: set[str] = set()
        self._started = time.monotonic()

    @property
    def run_id(self) -> str:
        """The id of the run. While the store is away a stand-in (`local-...`), which `track` takes as well."""
        return self._run or resolve(str(self._opening["run"] or self._opening["local"]))

    def metrics(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers, at `step` (an epoch) or as the run's one figure. NaN and infinity are named in a tag instead."""
        self._safely(lambda: self._metrics(values, step))

    def params(self, values: Mapping[str, Any]) -> None:
        """Further parameters, flat, with the dotted names of params.yaml."""
        self._do("params", params={_key(key): as_text(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self._do("tags", tags={_key(key): as_text(value) for key, value in values.items()})

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload a file or a folder; without `folder` to the root, where the UI can compare it between runs."""
        if not Path(path).exists():
            say_once(f"tracking: {path} is not there, so it was not logged.")
            return
        self._do("artifact", path=str(Path(path).absolute()), folder=folder)

    def describe(self, label: str, text: str) -> None:
        """One paragraph of the run's description, begun by `label`; a later one of the same label takes its place."""
        self._do("describe", label=label, text=text)

    def model(self, folder: str | Path) -> str | None:
        """Record the MLflow model in `folder` (`epsd.tracking.models.write`), register it, make it the candidate.

        Returns the registered version; None where the store is away (the model is kept and sent later) or refused it.
        """
        self._store.version = None
        self._do("model", path=str(Path(folder).absolute()))
        return self._store.version

    def dataset(
        self,
        name: str,
        digest: str,
        source: str = "",
        sizes: Mapping[str, int] | None = None,
        context: str = "training",
    ) -> None:
        """Record the data set: its name, digest of its content, where it came from, images per split."""
        self._do("dataset", name=name, digest=digest, source=source or name, sizes=dict(sizes or {}), context=context)

    def _metrics(self, values: Mapping[str, Any], step: int | None) -> None:
        numbers = {_key(key): number for key, value in values.items() if (number := _number(value)) is not None}
        finite = {key: value for key, value in numbers.items() if math.isfinite(value)}
        self._logged.update(finite)
        if finite:
            self._do("metrics", metrics=finite, step=None if step is None else int(step))
        if odd := sorted(numbers.keys() - finite.keys() - self._odd):
            self._odd.update(odd)
            at = "" if step is None else f" from step {step}"
            self._do("tags", tags={"nonfinite": f"{', '.join(odd)}{at}"})

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            with signals_wait():
                action()
        except Exception as error:
            say_once(f"tracking: not recorded ({type(error).__name__}: {brief(error)}).")

    def _do(self, op: str, **fields: Any) -> None:
        self._safely(lambda: self._record({"op": op, "time": _milliseconds(), **fields}))

    def _record(self, event: Event) -> None:
        self._tried = time.monotonic()
        if not self._online and time.monotonic() >= self._next_try:
            self._try_again()
        if self._online and self._sent(event):
            return
        if event["op"] in ("artifact", "model"):
            kept = self._kept().keep(Path(event["path"]))
            event["path"] = str(kept.relative_to(project_root()))  # the project may be moved before it is sent
        self._kept().append(event)

    def _sent(self, event: Event) -> bool:
        """Whether the store has dealt with it (a refusal is an answer too)."""
        assert self._run is not None
        try:
            self._store.send(self._run, event)
        except Exception as error:
            if not _refused(event, error):
                self._lost(error)
                return False
            _reject(self._run, event, error)
        return True

    def _kept(self) -> Spool:
        """This session's spool, begun with the line that says which run it belongs to."""
        if self._spool is None:
            spool = Spool.new(state_folder("spool"), str(self._opening["local"]))
            spool.append({"store": self._store.name, **self._opening, "run": self._run or self._opening["run"]})
            self._spool = spool
        return self._spool

    def _lost(self, error: Exception) -> None:
        self._online = False
        now = time.monotonic()
        self._next_try = now + max(1.0, (now - self._tried) / _SHARE)
        where = state_folder("spool")
        say_once(
            f"tracking: {shown(self._store.uri)} cannot be used ({brief(error)}). The work goes on; "
            f"its numbers are kept in {where} and sent when it is back.",
            subject=self._store.uri,
        )

    def _try_again(self) -> None:
        """Send what was kept if the store is back. Costs about two seconds at most while it is not."""
        try:
            self._store.probe()
            replay(self._store)
            if self._spool is None:
                self._run = self._store.open(self._opening)
            else:
                self._run = _replay(self._store, self._spool.events())
                self._spool.discard()
                self._spool = None
            self._online = True
        except Exception as error:
            self._lost(error)

    def start(self) -> None:
        """Open the run, after sending what earlier sessions had to keep."""
        self._safely(self._start)

    def _start(self) -> None:
        self._tried = time.monotonic()
        try:
            replay(self._store)
            self._run = self._store.open(self._opening)
            self._online = True
        except Exception as error:
            self._lost(error)
            self._kept()  # the run exists from here on, though only on disk

    def finish(self, status: str, error: BaseException | None = None) -> None:
        """End the session: `status` is MLflow's word (FINISHED, FAILED)."""
        if error is not None:
            self.tags({"error": f"{type(error).__name__}: {brief(error)}"})
        elif f"time/{self.stage}" not in self._logged:
            self.metrics({f"time/{self.stage}": time.monotonic() - self._started})
        self._do("end", status=status, stage=self.stage)
        if not self._online:
            self._safely(self._try_again)
        if self._spool is not None:
            self._spool.close()


@contextlib.contextmanager
def track(
    stage: str,
    *,
    experiment: str,
    name: str,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    description: str = "",
) -> Iterator[Tracker]:
    """A session of `stage` in an MLflow run; the run ends FINISHED, or FAILED when the block raises.

    A run that was FINISHED stays so: a tag `failed_stage` names the later stages that failed, until they succeed.

    Parameters
    ----------
    experiment : MLflow experiment, created where it does not exist.
    name : the run's name, which tells its story in the table of runs (`epsd-cskd-s0.95-seed0`).
    run_id : the run to go on in, as a former session gave it (`Tracker.run_id`); None makes a new run. A run that is
        not there any more is replaced by a new one, with a warning. If `params` contradict those of the run, the
        session gets a sibling run (tag `derived_from`) that starts with the metrics that still hold.
    parent_run_id : the run that this one is shown under (the study of a trial); for a new run only.
    params : flat, dotted names as in params.yaml; numbers are logged as numbers.
    tags : kind, method, dataset, seed ...; who, where, which code and which DVC experiment are added.
    description : shown on the run's page (Markdown).

    Raises AddressError, as `tracking_uri`, and whatever the block raises.
    """
    texts = {_key(key): as_text(value) for key, value in (params or {}).items()}
    opening: Event = {
        "op": "open",
        "time": _milliseconds(),
        "local": f"{LOCAL}{uuid.uuid4().hex}",
        "run": run_id,
        "parent": parent_run_id,
        "experiment": experiment,
        "name": name,
        "params": texts,
        "tags": {_key(key): as_text(value) for key, value in (tags or {}).items()},
        "identity": _identity(stage, texts),
        "description": description,
    }
    tracker = Tracker(stage, opening)
    try:
        tracker.start()
        yield tracker
    except BaseException as error:
        tracker.finish("FAILED", error)
        raise
    tracker.finish("FINISHED")


def ui_address(port: int = 5000) -> str:
    """The address of the runs of the experiment with the newest run, in a `mlflow ui` on this machine; of a server
    that has a UI of its own, its address. The artifacts of a project that was moved are found from here on.

    Raises AddressError, as `tracking_uri`.
    """
    store = _Store(tracking_uri())
    address = f"http://127.0.0.1:{port}/"
    if store.database is None or not store.database.is_file():
        return shown(store.uri) if store.remote else address
    with _locked("store", timeout=120):
        relocate(store.database, store.home)
    with contextlib.closing(sqlite3.connect(store.database)) as link, contextlib.suppress(sqlite3.Error):
        newest = link.execute("SELECT experiment_id FROM runs ORDER BY start_time DESC LIMIT 1").fetchone()
        if newest:
            return f"{address}#/experiments/{newest[0]}/runs?{pages.QUERY}"
    return address
