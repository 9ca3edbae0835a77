"""What is to be done, who is at it and what is done: exactly what was asked for, whatever is killed.

Every training that is asked for is a *slot*: it waits in the storage (a trial in state WAITING) until one worker takes
it, which the storage lets happen once. A slot whose trial was killed or interrupted is put back as a new waiting trial;
a slot is done when a trial of it is COMPLETE or PRUNED. So none is lost and none counts twice, with any number of
workers on any number of machines, and no worker needs to talk to another.
"""

import contextlib
import functools
import platform
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from epsd.engine import storage as storages
from epsd.engine.grid import Values
from epsd.project.processes import gone, identity, signals_wait

T = TypeVar("T")
Slot = int | str
Taken: TypeAlias = Trial
"""A trial that this process is at."""
Entry: TypeAlias = FrozenTrial
"""A trial as it stands in the storage."""
Trials: TypeAlias = list[Entry]

RUNNING = TrialState.RUNNING
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
RETRIES = 3
"""Times that a killed trial is tried again with the same values; then its slot gets new ones, where it can."""
UNCLAIMED, MISSING = 120.0, 5.0
"""Seconds after which a running trial that names no owner, and a slot that no trial is left of, was killed in between
two changes to the storage: by this process's clock, as those of other machines may differ."""
POLL = 0.4
"""Seconds between two looks at the trials."""

Lost = UpdateFinishedTrialError
"""The trial was declared lost meanwhile (a machine that slept): its slot is another worker's now."""


class Ledger:
    """A study in a storage and its slots.

    slots : those that this process knows of; default: 0 ... n - 1, with the study's fact `trials` as n.
    sampler, pruner : of the trials that this process takes.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        slots: Collection[Slot] | None = None,
        sampler: optuna.samplers.BaseSampler | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
    ) -> None:
        self.storage, self._slots = storage, slots
        chosen = sampler or optuna.samplers.RandomSampler()
        self.study = optuna.load_study(study_name=name, storage=storage, sampler=chosen, pruner=pruner)
        self._id = storage.get_study_id_from_name(name)
        self._interval: int | None = getattr(storage, "get_heartbeat_interval", lambda: None)()
        self._noticed: dict[int, float] = {}
        self._took, self._answers_since = 0.0, time.monotonic()

    def trials(self) -> Trials:
        """All of them, waiting ones too."""
        return self.patiently(lambda: list(self.study.get_trials(deepcopy=False)))

    @property
    def facts(self) -> dict[str, Any]:
        """What is written down of the study as a whole."""
        return self.patiently(lambda: dict(self.study.user_attrs))

    def write(self, key: str, value: Any) -> None:
        """Write a fact down."""
        self.patiently(lambda: self.study.set_user_attr(key, value))

    def awaited(self, key: str, seconds: float, until_begun: bool = False) -> Any:
        """A fact that another process may be about to write down; None where it does not, or a trial has begun."""
        deadline = time.monotonic() + seconds
        while key not in (facts := self.facts) and time.monotonic() < deadline:
            if until_begun and any(trial.state != TrialState.WAITING for trial in self.trials()):
                break
            time.sleep(POLL)
        return facts.get(key)

    @property
    def slots(self) -> Collection[Slot]:
        """All that is asked for."""
        return range(int(self.facts["trials"])) if self._slots is None else self._slots

    def missing(self, trials: Trials) -> list[Slot]:
        """Slots that no trial waits for, is at, or has done."""
        alive = {slot(trial) for trial in trials if trial.state != TrialState.FAIL}
        return [each for each in self.slots if each not in alive]

    def add(self, slot: Slot, values: Values | None = None, **attributes: Any) -> None:
        """A waiting trial for a slot; with `values`, of just these."""
        self.patiently(lambda: _add(self.study, slot, values, **attributes))

    def add_done(self, slot: Slot, value: float | None, **attributes: Any) -> None:
        """A finished trial for a slot that was done before the storage knew of it."""
        state = TrialState.PRUNED if value is None else TrialState.COMPLETE
        made = create_trial(state=state, value=value, user_attrs={"slot": slot, **attributes})
        self.patiently(lambda: self.study.add_trial(made))

    def open_slots(self, trials: Trials) -> set[Slot]:
        """Slots without a finished trial."""
        return set(self.slots) - {slot(trial) for trial in trials if trial.state in DONE}

    # --- work ---

    def rounds(self) -> Iterator[Trials]:
        """All trials, again and again, each time after putting back those of workers that are gone."""
        while True:
            begun = time.monotonic()
            self.patiently(self.repair)
            trials = self.trials()
            self._took = time.monotonic() - begun
            yield trials

    def rest(self) -> None:
        """Wait for the next round, POLL seconds or so long that looking takes a tenth of the time."""
        time.sleep(max(POLL, 9 * self._took))

    def patiently(self, action: Callable[[], T]) -> T:
        """What `action` gives, held against signals, and repeated for PATIENCE seconds while the storage is away.

        Raises StorageError after that.
        """
        since = time.monotonic()
        while True:
            try:
                with signals_wait():
                    return action()
            except storages.storage_errors() as error:
                self._answers_since = time.monotonic()
                if time.monotonic() - since > storages.PATIENCE:
                    raise storages.unreachable(getattr(self.storage, "url", "the journal"), error) from None
            time.sleep(POLL)

    def claim(self, trials: Trials, rank: Callable[[Entry], int] = lambda trial: 0) -> Taken | None:
        """Take a waiting trial, of lowest `rank`: from here on RUNNING and ours. None where none may be taken now.

        Of several trials of one slot only the first may be taken, and none while another is at it or has done it.
        """
        taken = {slot(trial) for trial in trials if trial.state in (RUNNING, *DONE)}
        waiting: dict[Slot, Entry] = {}
        for trial in trials:
            if trial.state == TrialState.WAITING and slot(trial) not in taken:
                waiting.setdefault(slot(trial), trial)
        wanted = set(self.slots)
        candidates = sorted((trial for each, trial in waiting.items() if each in wanted), key=rank)
        return self.patiently(lambda: self._first(candidates))

    def _first(self, candidates: Trials) -> Taken | None:
        for trial in candidates:
            trial_id = self._key(trial.number)
            with contextlib.suppress(UpdateFinishedTrialError):
                if self.storage.set_trial_state_values(trial_id, RUNNING):
                    self.storage.set_trial_user_attr(trial_id, "owner", owner())
                    return Trial(self.study, trial_id)
        return None

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """What this process has taken and not finished when the block ends, in whatever way, is put back."""
        try:
            yield
        finally:
            with signals_wait(), storages.tolerant():
                for trial in self.trials():
                    if trial.state == RUNNING and trial.user_attrs.get("owner") == owner():
                        self.give_up(trial, "interrupted")

    @contextlib.contextmanager
    def pulse(self, number: int) -> Iterator[None]:
        """Signs of life of a trial, from a thread, where the storage keeps them."""
        if self._interval is None:
            yield
            return
        trial_id, done = self._key(number), threading.Event()

        def beat() -> None:
            while True:
                try:
                    self.storage.record_heartbeat(trial_id)
                except Exception:  # an outage: the next one may arrive
                    self._answers_since = time.monotonic()
                if done.wait(self._interval):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=10)

    def tell(self, trial: Taken, **attributes: Any) -> None:
        """Write down what is known of a trial. Raises Lost where another worker has its slot by now."""
        for key, value in attributes.items():
            self.patiently(functools.partial(trial.set_user_attr, key, value))

    def finish(self, trial: Taken, values: float | Sequence[float] | None) -> None:
        """The trial is done: COMPLETE, without values PRUNED. Raises Lost as `tell`."""
        state = TrialState.PRUNED if values is None else TrialState.COMPLETE
        told = self.patiently(lambda: self.study.tell(trial, values, state=state, skip_if_finished=True))
        if told.state != state:
            raise Lost

    # --- what goes wrong ---

    def fail(self, trial: Taken, error: str, again: bool) -> None:
        """Keep the error of a trial. `again`: its slot is put back with new values, as the same would fail again."""
        self.tell(trial, error=error, **({} if again else {"final": True}))
        self.patiently(lambda: self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True))
        if again:
            self.add(slot(trial), retry_of=trial.number)

    def repair(self) -> None:
        """Put back the trials of workers that are gone: at once on this machine, after missed heartbeats elsewhere."""
        trials = self.trials()
        running = [trial for trial in trials if trial.state == RUNNING]
        last = {slot(trial): trial for trial in trials}
        lost = [last[each] for each in self.missing(trials) if each in last and "final" not in last[each].user_attrs]
        odd = {trial.number: UNCLAIMED for trial in running if "owner" not in trial.user_attrs}
        odd |= {trial.number: MISSING for trial in lost}
        now = time.monotonic()
        self._noticed = {number: self._noticed.get(number, now) for number in odd}
        due = {number for number, since in self._noticed.items() if now - since > odd[number]}
        for trial in running:
            if self.abandoned(trial) or trial.number in due:
                self.give_up(trial, "its worker is gone")
        for trial in lost:
            if trial.number in due:
                _put_back(self.study, trial, "its worker is gone")
        if now - self._answers_since > storages.GRACE * (
            self._interval or 0
        ):  # else nobody's sign of life could arrive
            optuna.storages.fail_stale_trials(self.study)

    def abandoned(self, trial: Entry) -> bool:
        """Whether the process that took the trial is known to be gone.

        One of this host before it was last started is, unless hosts of the same name may share the storage.
        """
        who: Mapping[str, Any] = trial.user_attrs.get("owner", {})
        if not who or who["host"] != platform.node():
            return False
        if who["boot"] != boot():
            return self._interval is None
        return gone(int(who["pid"]), float(who["pid.started"]))

    def give_up(self, trial: Entry, reason: str) -> None:
        """End a running trial that will not finish and put its slot back with the same values. One process succeeds."""
        trial_id = self._key(trial.number)
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial_id, "lost", reason)
            if self.storage.set_trial_state_values(trial_id, TrialState.FAIL):
                _put_back(self.study, trial, reason)

    def _key(self, number: int) -> int:
        return int(self.storage.get_trial_id_from_study_id_trial_number(self._id, number))


# --- trials ---------------------------------------------------------------------------------------------------------


def slot(trial: Entry | Taken) -> Slot:
    """Which of the trainings asked for this is a try at; -1 for one that somebody else added."""
    found: Slot = trial.user_attrs.get("slot", -1)
    return found


def values_of(trial: Entry) -> Values:
    """Those it was given, else those that it took."""
    return dict(trial.user_attrs.get("values") or trial.params)


def failures(trials: Trials, before: Collection[int] = ()) -> Trials:
    """Trials that raised an error, the first one first; those whose number is in `before` left out."""
    found = [trial for trial in trials if "error" in trial.user_attrs and trial.number not in before]
    return sorted(found, key=lambda trial: str(trial.datetime_complete))


def _add(study: optuna.Study, slot: Slot, values: Values | None = None, **attributes: Any) -> None:
    study.enqueue_trial(values or {}, user_attrs={"slot": slot, "values": values, **attributes})


def _put_back(study: optuna.Study, trial: Entry, reason: str) -> None:
    attributes = trial.user_attrs
    retries = int(attributes.get("retries", 0)) + 1
    again = "error" not in attributes and retries <= RETRIES
    kept = {key: attributes[key] for key in ("about", *(["origin"] if again else [])) if key in attributes}
    ids = {"lost_run": attributes["run_id"]} if "run_id" in attributes else {}
    values = values_of(trial) if again else None
    _add(study, slot(trial), values, retry_of=trial.number, retries=retries, reason=reason, **kept, **ids)


def on_stale(study: optuna.Study, trial: Entry) -> None:
    """What a database is told to do with a trial that has missed its heartbeats."""
    _put_back(study, trial, "no sign of life")


@functools.cache
def boot() -> str:
    """Since when this machine runs: a process number means nothing beyond."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip()[:8] if file.is_file() else ""


def owner() -> dict[str, Any]:
    """Who runs a trial."""
    return {"host": platform.node(), "boot": boot(), **identity()}


# --- a study --------------------------------------------------------------------------------------------------------


def open_study(storage: BaseStorage, name: str, directions: Sequence[str]) -> bool:
    """See that the study is there. Whether this call made it: of several processes one does."""
    try:
        optuna.create_study(study_name=name, storage=storage, directions=list(directions), load_if_exists=False)
    except DuplicatedStudyError:
        return False
    return True


def known_run(ledger: Ledger, made: bool) -> str | None:
    """The id of the study's run in MLflow, which whoever made the study just now may be about to open."""
    found = ledger.awaited("run_id", 0 if made else storages.PATIENCE, until_begun=True)
    return None if found is None else str(found)
