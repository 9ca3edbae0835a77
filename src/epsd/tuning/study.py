"""The storage of a study and the ledger of its trials: exactly as many as asked, whatever is killed.

Every trial that is asked for is a *slot*: it waits in the storage (state WAITING) until one worker takes it, which the
storage lets happen once. A slot whose trial was killed, interrupted or failed is put back as a new waiting trial; a
slot is done when a trial of it is COMPLETE or PRUNED. So no trial is lost and none counts twice, with any number of
workers on any number of machines, and no worker needs to talk to another.
"""

import contextlib
import functools
import math
import os
import platform
import re
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from epsd.project.params import TuneParams
from epsd.project.processes import gone, identity
from epsd.project.runtime import project_root
from epsd.tuning import TuningError
from epsd.tuning.space import Space, Values

DONE = (TrialState.COMPLETE, TrialState.PRUNED)
RETRIES = 3
"""Times that a killed trial is tried again with the same values; then its slot gets new ones."""
PATIENCE = 15.0
"""Seconds that a storage may take to answer before the search gives up."""
UNCLAIMED = 120.0
"""Seconds after which a running trial that names no owner was killed at its very first moment."""
GRACE = 4
"""Heartbeats that may be missed before a trial of another machine counts as lost."""

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="optuna")


# --- storage --------------------------------------------------------------------------------------------------------


class _KernelLock:
    """A lock that the kernel releases when its holder is killed; Optuna's own would stay until it is broken by force.

    On taking it, a line that a killed writer or a full disk left half written is cut off: it would spoil the journal.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._lock = journal, FileLock(f"{journal}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        if self._journal.stat().st_size:
            with self._journal.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    content = self._journal.read_bytes()
                    file.truncate(content.rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._lock.release()


def default_journal() -> Path:
    """`mlruns/optuna.journal` of the project."""
    return project_root() / "mlruns" / "optuna.journal"


def shown(url: str | None) -> str:
    """The storage as it may be printed: without a password."""
    if url is None:
        return str(default_journal())
    return re.sub(r"//[^/@]*@", "//", url)


def open_storage(tune: TuneParams) -> BaseStorage:
    """The journal file, or the database behind a URL, whose tables are made where need be.

    Raises TuningError, after PATIENCE seconds at most, for a storage that cannot be reached or written.
    """
    if tune.storage is None or "://" not in tune.storage:
        return _journal(Path(tune.storage) if tune.storage else default_journal())
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _database(tune.storage, tune.heartbeat)
        except ImportError as error:  # Optuna hides which
            missing = error.name or getattr(error.__cause__ or error.__context__, "name", None)
            raise TuningError(
                f"tune.storage: {shown(tune.storage)} needs the Python package '{missing}' "
                "(PostgreSQL: pip install 'epsd[postgres]'; MySQL: pip install 'epsd[mysql]')."
            ) from None
        except Exception as error:  # also the race of several processes that make the tables of a fresh database
            if _hopeless(error) or time.monotonic() > deadline:
                raise unreachable(tune.storage, error) from None
            time.sleep(0.5)


def unreachable(url: str | None, error: BaseException) -> TuningError:
    """The one line for a storage that does not answer."""
    reason = " ".join(str(getattr(error, "orig", None) or error.__cause__ or error).split())[:200]
    return TuningError(f"tune.storage: {shown(url)} cannot be used ({reason}).")


def storage_errors() -> tuple[type[Exception], ...]:
    """What a storage raises that does not answer, or not as it should."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError, StorageInternalError, OSError)


def _hopeless(error: Exception) -> bool:
    """An address that no waiting will mend."""
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    return isinstance(error, ArgumentError | NoSuchModuleError | ValueError)


def _journal(path: Path) -> BaseStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_KernelLock(path)))
    except (OSError, ValueError) as error:
        raise TuningError(f"tune.storage: {path} cannot be used ({error}).") from None


def _database(url: str, heartbeat: int) -> BaseStorage:
    from sqlalchemy.engine import make_url

    backend = make_url(url).get_backend_name()
    arguments = {"timeout": 60} if backend == "sqlite" else {"connect_timeout": 5}
    settings: dict[str, Any] = {"connect_args": arguments, "pool_pre_ping": True}
    storage = RDBStorage(
        url,
        engine_kwargs=settings,
        heartbeat_interval=heartbeat,
        grace_period=GRACE * heartbeat,
        heartbeat_stale_trial_callback=_put_back_stale,
    )
    return optuna.storages._CachedStorage(storage)


def _put_back_stale(study: optuna.Study, trial: FrozenTrial) -> None:
    _put_back(study, trial, "no sign of life")


# --- samplers and pruners -------------------------------------------------------------------------------------------


class Race(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Stops a trial whose mean over the seeds so far is not in the best third of all that came as far.

    Step k of a trial is its mean over the first k seeds, which are the same for every trial: one in three goes on to
    the next seed, so that most of the work is spent on telling the good ones apart (as in racing, Maron and Moore
    1994, and successive halving with its usual reduction factor of 3). Of equals the first is ahead: accuracies on a
    small split are often equal, and would all go on. The first trials, and params.yaml, run to the end: the others
    need a measure.
    """

    START = 3
    REDUCTION = 3

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to stop `trial`, which has just reported."""
        step = trial.last_step
        if step is None or "origin" in trial.user_attrs:
            return False
        others = [
            other.intermediate_values[step]
            for other in study.get_trials(deepcopy=False)
            if step in other.intermediate_values and other.number != trial.number and other.state != TrialState.FAIL
        ]
        if len(others) < self.START:
            return False
        own, sign = trial.intermediate_values[step], 1 if study.direction == StudyDirection.MAXIMIZE else -1
        ahead = sum(sign * other >= sign * own for other in others)
        return bool(ahead >= math.ceil((len(others) + 1) / self.REDUCTION))


def sampler(tune: TuneParams, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of one worker. `seed`: of this worker in this session, or start-up points would come again."""
    seed %= 2**32
    startup = max(4, min(10, tune.trials // 4))
    match tune.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(
                n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
            )
        case "gp":
            return optuna.samplers.GPSampler(n_startup_trials=startup, deterministic_objective=True, seed=seed)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, tune.trials // 4)), seed=seed)
        case _:  # a grid's points are laid down when the study is made
            return optuna.samplers.RandomSampler(seed=seed)


def pruner(tune: TuneParams, epochs: int) -> optuna.pruners.BasePruner:
    """What ends poor trials early: by the objective's curve over `epochs`, in a race by its means over the seeds."""
    if len(tune.objectives) > 1 or tune.pruner == "none":
        return optuna.pruners.NopPruner()
    if tune.pruner == "race":
        return Race()
    if tune.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=epochs // 5)
    return optuna.pruners.HyperbandPruner(min_resource=max(1, epochs // 9), max_resource=epochs, reduction_factor=3)


# --- the ledger -----------------------------------------------------------------------------------------------------


class Ledger:
    """A study and its slots."""

    def __init__(self, storage: BaseStorage, name: str) -> None:
        self.storage = storage
        self.study = optuna.load_study(study_name=name, storage=storage)
        self._id = storage.get_study_id_from_name(name)

    def load(self, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner) -> optuna.Study:
        """A fresh view of the study (a view remembers the trials it has seen), to take one trial with."""
        return optuna.load_study(study_name=self.study.study_name, storage=self.storage, sampler=sampler, pruner=pruner)

    def trials(self) -> list[FrozenTrial]:
        """All of them, waiting ones too."""
        return list(self.study.get_trials(deepcopy=False))

    @property
    def facts(self) -> dict[str, Any]:
        """What `begin` wrote down."""
        return dict(self.study.user_attrs)

    @property
    def target(self) -> int:
        """How many trials are asked for."""
        return int(self.study.user_attrs["trials"])

    def top_up(self, trials: int, points: Iterable[Values] = ()) -> None:
        """Ask for `trials` in all: every slot gets a waiting trial that has none, or none that can still finish.

        points : values for the new ones, as long as there are any.
        """
        self.study.set_user_attr("trials", trials)
        alive, points = {slot(trial) for trial in self.trials() if trial.state != TrialState.FAIL}, iter(points)
        for number in range(trials):
            if number not in alive:
                self.add(number, next(points, None))

    def add(self, number: int, values: Values | None = None, **attributes: Any) -> None:
        """A waiting trial for slot `number`; with `values`, of just these."""
        _add(self.study, number, values, **attributes)

    def open_slots(self, trials: list[FrozenTrial]) -> set[int]:
        """Slots without a finished trial."""
        return set(range(self.target)) - {slot(trial) for trial in trials if trial.state in DONE}

    def claim(self) -> int | None:
        """Take a waiting trial: its id, now RUNNING and ours. None where none may be taken (now)."""
        trials = self.trials()
        for trial in trials:
            if trial.state == TrialState.WAITING and self._may_run(trial, trials):
                trial_id = self._trial_id(trial)
                with contextlib.suppress(UpdateFinishedTrialError):
                    if self.storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                        for key, value in owner().items():
                            self.storage.set_trial_user_attr(trial_id, key, value)
                        return trial_id
        return None

    def _may_run(self, trial: FrozenTrial, trials: list[FrozenTrial]) -> bool:
        """Its slot is asked for, and no other trial of it runs, is done, or waits before it."""
        others = [other for other in trials if slot(other) == slot(trial) and other.number != trial.number]
        before = {TrialState.RUNNING, *DONE}
        taken = any(
            other.state in before or (other.state == TrialState.WAITING and other.number < trial.number)
            for other in others
        )
        return not taken and slot(trial) in range(self.target)

    def repair(self) -> None:
        """Put back the trials of workers that are gone: at once on this machine, after missed heartbeats elsewhere."""
        for trial in self.trials():
            if trial.state == TrialState.RUNNING and _abandoned(trial):
                self.give_up(trial, "its worker is gone")
        optuna.storages.fail_stale_trials(self.study)

    def give_up(self, trial: FrozenTrial, reason: str) -> None:
        """End a running trial that will not finish and put its slot back with the same values. One process succeeds."""
        trial_id = self._trial_id(trial)
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial_id, "lost", reason)
            if self.storage.set_trial_state_values(trial_id, TrialState.FAIL):
                _put_back(self.study, trial, reason)

    def _trial_id(self, trial: FrozenTrial) -> int:
        return int(self.storage.get_trial_id_from_study_id_trial_number(self._id, trial.number))


def slot(trial: FrozenTrial) -> int:
    """Which of the trials asked for this is a try at; -1 for one that somebody else added."""
    return int(trial.user_attrs.get("slot", -1))


def _add(study: optuna.Study, number: int, values: Values | None = None, **attributes: Any) -> None:
    fixed = {"fixed_params": values} if values else {}
    study.add_trial(
        create_trial(state=TrialState.WAITING, user_attrs={"slot": number, **attributes}, system_attrs=fixed)
    )


def _put_back(study: optuna.Study, trial: FrozenTrial, reason: str) -> None:
    retries = int(trial.user_attrs.get("retries", 0)) + 1
    values = trial.params or trial.system_attrs.get("fixed_params")
    again = values if retries <= RETRIES else None
    origin = {key: value for key, value in trial.user_attrs.items() if key == "origin" and again}
    _add(study, slot(trial), again, retry_of=trial.number, retries=retries, reason=reason, **origin)


@functools.cache
def machine() -> str:
    """This machine since it was last started: a process number means nothing beyond."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()}:{boot.read_text().strip()[:8] if boot.is_file() else ''}"


def owner() -> dict[str, Any]:
    """Who runs a trial."""
    return {"machine": machine(), **identity()}


def _abandoned(trial: FrozenTrial) -> bool:
    who = trial.user_attrs
    if "pid.started" not in who:
        return _age(trial) > UNCLAIMED
    here, boot = machine().split(":")
    there, its_boot = str(who["machine"]).rsplit(":", 1)
    if there != here:
        return False
    return its_boot != boot or gone(int(who["pid"]), float(who["pid.started"]))


def _age(trial: FrozenTrial) -> float:
    """Seconds since the trial began."""
    started = trial.datetime_start
    return 0.0 if started is None else (datetime.now(started.tzinfo) - started).total_seconds()


@contextlib.contextmanager
def pulse(storage: BaseStorage, trial_id: int) -> Iterator[None]:
    """Signs of life of a trial, from a thread, where the storage keeps them."""
    interval = getattr(storage, "get_heartbeat_interval", lambda: None)()
    if interval is None:
        yield
        return
    done = threading.Event()

    def beat() -> None:
        while True:
            with contextlib.suppress(Exception):  # an outage: the next one may arrive
                storage.record_heartbeat(trial_id)
            if done.wait(interval):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


# --- begin and resume -----------------------------------------------------------------------------------------------


def begin(storage: BaseStorage, space: Space, data: str, trials: int, resume: bool) -> tuple[Ledger, bool]:
    """The ledger of the study that `space.tune` names, and whether this call made it.

    Parameters
    ----------
    data : digest of the prepared data set.
    trials : how many trials there shall be in all.
    resume : go on with a study of this name (or begin it); without, one that exists is an error.

    Raises
    ------
    TuningError : the study exists (without `resume`), or is of another space, other data or other parameters.
    """
    tune = space.tune
    points: list[Values | None] = list(space.grid()) if tune.sampler == "grid" else [None] * trials
    try:
        optuna.create_study(
            study_name=tune.study, storage=storage, directions=list(tune.objectives.values()), load_if_exists=False
        )
    except DuplicatedStudyError:
        return _go_on(storage, space, data, trials, resume), False
    ledger = Ledger(storage, tune.study)
    if tune.current_first:
        points = [space.current(), *[point for point in points if point != space.current()]]
    points = points[:trials]
    for number, values in enumerate(points):
        origin = {"origin": "params.yaml"} if number == 0 and tune.current_first else {}
        ledger.add(number, values, **origin)
    ledger.study.set_user_attr("trials", len(points))
    facts = {
        "signature": space.signature(),
        "base": space.base,
        "tune": tune.model_dump(by_alias=True, exclude_defaults=True),
        "data": data,
        "code": space.code(),
        "objectives": list(tune.objectives),
    }
    ledger.study.set_user_attr("epsd", facts)
    return ledger, True


def _go_on(storage: BaseStorage, space: Space, data: str, trials: int, resume: bool) -> Ledger:
    name = space.tune.study
    ledger = Ledger(storage, name)
    if not resume:
        busy = [trial for trial in ledger.trials() if trial.state == TrialState.RUNNING and not _abandoned(trial)]
        at_work = f" and is being worked on ({busy[0].user_attrs.get('machine', '?').split(':')[0]})" if busy else ""
        raise TuningError(
            f"study '{name}' is already in {shown(space.tune.storage)}, with {_count(ledger)} trials done{at_work}. "
            "Go on with it, or join in: --resume. For a new one, give tune.study another name."
        )
    facts = _facts(ledger)
    _compare(name, facts, space, data)
    left: list[Values] = []
    if space.tune.sampler == "grid":
        alive = [trial for trial in ledger.trials() if trial.state != TrialState.FAIL]
        had = [_values(trial) for trial in (*alive, *(t for t in ledger.trials() if "error" in t.user_attrs))]
        left = [point for point in space.grid() if point not in had]
        trials = min(trials, len(alive) + len(left))
    ledger.top_up(max(trials, _count(ledger)), left)
    return ledger


def _values(trial: FrozenTrial) -> Values:
    """Those it was given, else those that it took."""
    return dict(trial.system_attrs.get("fixed_params") or trial.params)


def _count(ledger: Ledger) -> int:
    return sum(trial.state in DONE for trial in ledger.trials())


def _facts(ledger: Ledger) -> dict[str, Any]:
    """What the study is of. A process that makes it right now may need a moment to say so."""
    deadline = time.monotonic() + PATIENCE
    while "epsd" not in ledger.facts:
        if time.monotonic() > deadline:
            name = ledger.study.study_name
            raise TuningError(
                f"study '{name}' was not made by `epsd tune`, or not to the end. Take another tune.study."
            )
        time.sleep(0.2)
    return dict(ledger.facts["epsd"])


def _compare(name: str, facts: Mapping[str, Any], space: Space, data: str) -> None:
    import json

    then, now = facts["signature"], json.loads(json.dumps(space.signature()))
    for part in ("space", "fixed", "objectives", "constraints", "params"):
        for key in sorted({*then[part], *now[part]}):
            if then[part].get(key) != now[part].get(key):
                place = key if part == "params" else f"tune.{part}.{key}"
                raise TuningError(
                    f"study '{name}' is another search: {place} was {then[part].get(key)!r} and is now "
                    f"{now[part].get(key)!r}. Give tune.study another name, or set it back."
                )
    if facts["data"] != data:
        raise TuningError(
            f"study '{name}' was made on other data than artifacts/data holds now. Give tune.study another name."
        )
    code = space.code()
    before = facts.get("code", code)
    if edited := [file for file in sorted({*before, *code}) if before.get(file) != code.get(file)]:
        raise TuningError(
            f"study '{name}' was made by other code: {', '.join(edited[:3])}{', ...' * (len(edited) > 3)} changed "
            "since. Give tune.study another name, or take back the change."
        )
