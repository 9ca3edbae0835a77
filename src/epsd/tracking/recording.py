"""Writing: one run per trained model, opened by train, reopened by later stages.

Nothing here raises into the caller. A store that cannot be reached is said once; from then on every event goes to a
spool on disk and is replayed at the next start of any tracker (or as soon as the store is back), each point once.
"""

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from epsd.project.processes import signals_wait
from epsd.project.runtime import brief, project_root, say_once, state_folder
from epsd.tracking.addresses import shown, tracking_uri
from epsd.tracking.identity import identity
from epsd.tracking.replay import reject, replay, send_kept
from epsd.tracking.spool import LOCAL, UNOPENED, Event, Spool, resolve
from epsd.tracking.store import Store, refused
from epsd.tracking.texts import as_key, as_number, as_text

_SHARE = 0.01
"""Of the time, at most, that goes into trying to reach a store that is away."""


def _milliseconds() -> int:
    return time.time_ns() // 1_000_000


def new_id(opened_here: bool = False) -> str:
    """An id for a run that is to be opened: written down before, the run is found whenever its opening is cut off.

    opened_here : by this process before any other, which so need not look for the run.
    """
    made = f"{LOCAL}{uuid.uuid4().hex}"
    if opened_here:
        UNOPENED.add(made)
    return made


class Tracker:
    """One session of one stage in one run. Made by `track`. No method raises an `Exception`."""

    def __init__(self, stage: str, opening: Event) -> None:
        self.stage = stage
        self._opening = opening
        self._store = Store(tracking_uri())
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

    def epoch(self, record: Mapping[str, float], prefix: str = "") -> None:
        """Log the figures of one epoch at that epoch, which is `record["epoch"]`; `prefix` begins their names."""
        figures = {f"{prefix}{name}": value for name, value in record.items() if name != "epoch"}
        self.metrics(figures, step=int(record["epoch"]))

    def curves(self, records: Iterable[Mapping[str, float | None]], prefix: str = "") -> None:
        """Log the figures of those epochs that the run lacks, as `epoch` does: those before it had to be made anew."""
        epochs = []
        for record in records:
            figures = {as_key(f"{prefix}{key}"): as_number(value) for key, value in record.items() if key != "epoch"}
            finite = {key: value for key, value in figures.items() if value is not None and math.isfinite(value)}
            epochs.append((int(record["epoch"] or 0), finite))
        self._do("curves", epochs=epochs)

    def params(self, values: Mapping[str, Any]) -> None:
        """Further parameters, flat, with the dotted names of params.yaml."""
        self._do("params", params={as_key(key): as_text(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags."""
        self._do("tags", tags={as_key(key): as_text(value) for key, value in values.items()})

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
        numbers = {as_key(key): number for key, value in values.items() if (number := as_number(value)) is not None}
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
            if not refused(event, error):
                self._lost(error)
                return False
            reject(self._run, event, error)
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
                self._run = send_kept(self._store, self._spool.events())
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

    def finish(self, status: str, error: BaseException | None = None, begun: bool = True) -> None:
        """End the session: `status` is MLflow's word (FINISHED, FAILED). Of one that has not begun no new run stays."""
        if error is not None:
            self.tags({"error": f"{type(error).__name__}: {brief(error)}"})
        elif f"time/{self.stage}" not in self._logged:
            self.metrics({f"time/{self.stage}": time.monotonic() - self._started})
        self._do("end" if begun else "withdraw", status=status, stage=self.stage)
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
    lost_run_id: str | None = None,
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
    run_id : the run to go on in, as a former session gave it (`Tracker.run_id`); None makes a new run. One of `new_id`
        that no run has yet becomes that of the new run. A run that is not there any more is replaced by a new one,
        with a warning. If `params` contradict those of the run, the session gets a sibling run (tag `derived_from`)
        that starts with the metrics that still hold.
    parent_run_id : the run that this one is shown under (the study of a trial); for a new run only.
    lost_run_id : the run of a session whose process is gone, on whatever machine: it is marked KILLED.
    params : flat, dotted names as in params.yaml; numbers are logged as numbers.
    tags : kind, method, dataset, seed ...; who, where, which code and which DVC experiment are added.
    description : shown on the run's page (Markdown).

    Raises AddressError, as `tracking_uri`, and whatever the block raises.
    """
    texts = {as_key(key): as_text(value) for key, value in (params or {}).items()}
    opening: Event = {
        "op": "open",
        "time": _milliseconds(),
        "local": new_id(),
        "run": run_id,
        "parent": parent_run_id,
        "lost": lost_run_id,
        "experiment": experiment,
        "name": name,
        "params": texts,
        "tags": {as_key(key): as_text(value) for key, value in (tags or {}).items()},
        "identity": identity(stage, texts),
        "description": description,
    }
    tracker, begun = Tracker(stage, opening), False
    try:
        tracker.start()
        begun = True
        yield tracker
    except BaseException as error:
        tracker.finish("FAILED", error, begun)
        raise
    tracker.finish("FINISHED")
