"""The cells of a study as slots of the engine: who trains which, on one machine or on several, and what came of it.

Results are in the storage, and each machine keeps those of all in its own folder: a cell that was finished before the
storage knew of it is finished, and the table needs no storage.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from epsd.comparison.metrics import better
from epsd.engine.ledger import (
    DONE,
    RUNNING,
    Entry,
    Ledger,
    Lost,
    Taken,
    Trials,
    failures,
    on_stale,
    open_study,
    slot,
)
from epsd.engine.storage import open_storage, storage_errors, unreachable
from epsd.project.processes import one_line
from epsd.project.runtime import note
from epsd.studies import StudyError
from epsd.studies.plan import Plan
from epsd.studies.procedures.types import Cache
from epsd.studies.work import Marked, Place, Result, marked, run_cell


@dataclass(frozen=True)
class Session:
    """One `epsd study`. `parent`: its run; `before`: trials that had failed before; `deadline`: begin no cell then."""

    parent: str
    before: list[int]
    deadline: float | None = None

    def late(self) -> bool:
        """Whether no cell may begin any more."""
        return self.deadline is not None and time.time() >= self.deadline


class Queue:
    """The cells of `plan`, handed out in `storage` (default: a journal in the study's folder).

    Raises StorageError.
    """

    def __init__(self, plan: Plan, place: Place, storage: str | None) -> None:
        self.plan, self.place = plan, place
        self.cells: dict[str, Marked] = marked(plan, place)
        self.where: str | Path = storage or place.folder / "trials.journal"
        name, lower = f"cells of {plan.study.name}", better(plan.study.metric) == "lower"
        try:
            opened = open_storage(self.where, on_stale=on_stale)
            self.made = open_study(opened, name, ["minimize" if lower else "maximize"])
            self.ledger = Ledger(opened, name, self.cells)
        except storage_errors() as error:
            raise unreachable(self.where, error) from None

    def done(self) -> set[str]:
        """Marks of the finished cells, each with its result in the study's folder."""
        return {own for own in self.cells if self.place.result(own)}

    def lay(self) -> None:
        """See that the storage knows of every cell: the finished ones with their results, the others waiting.

        Raises StudyError where others are at these cells with other data, code, parameters or another device.
        """
        trials = self.ledger.trials()
        self._refuse_others(trials)
        self.collect(trials)
        for own in self.done():
            self.place.tidy(own)  # a kill may have come between its result and this
        busy = {slot(trial) for trial in trials if trial.state in (RUNNING, *DONE)}
        for own in self.cells:
            if own not in busy and (result := self.place.result(own)):
                value = result.metrics.get(self.plan.study.metric)
                self.ledger.add_done(own, value, result=result._asdict(), about=self._about(own))
        for own in map(str, self.ledger.missing(self.ledger.trials())):
            self.ledger.add(own, self._values(own), about=self._about(own))

    def collect(self, trials: Trials) -> None:
        """Keep the results that others have handed in."""
        for trial in trials:
            own = str(slot(trial))
            if trial.state in DONE and own in self.cells and self.place.result(own) is None:
                self.place.keep(own, Result(**trial.user_attrs["result"]))

    def left(self, trials: Trials, session: Session) -> int:
        """Cells that are neither done nor have failed in this session."""
        return len(self.ledger.open_slots(trials) - {slot(trial) for trial in failures(trials, session.before)})

    def _values(self, own: str) -> dict[str, object]:
        cell = self.cells[own].cell
        params = cell.params
        about = {"method": cell.method, "objective": params.objective["name"]}
        return {**about, "sparsity": params.prune.sparsity, "seed": params.seed}

    def _about(self, own: str) -> dict[str, str]:
        wanted = self.cells[own]
        return {"cell": str(wanted.cell), "group": wanted.key or own, "data": wanted.data}

    def _refuse_others(self, trials: Trials) -> None:
        data = {str(wanted.cell): wanted.data for wanted in self.cells.values()}
        for trial in trials:
            about = trial.user_attrs.get("about", {})
            mine = str(slot(trial)) in self.cells or about.get("cell") not in data
            if trial.state == RUNNING and not mine and not self.ledger.abandoned(trial):
                other = "data" if about["data"] != data[about["cell"]] else "code, parameters, torch or another device"
                raise StudyError(
                    f"{trial.user_attrs.get('owner', {}).get('host', 'another process')} is training the cell "
                    f"'{about['cell']}' of study '{self.plan.study.name}' with other {other}. Give each machine the "
                    "same, or this study another name."
                )

    # --- work ---

    def work(self, session: Session, look: Callable[[Trials], None] = lambda trials: None) -> None:
        """Train cells until none is left, or it is late. `look` is shown all trials before each.

        Of the cells that wait, those come first that share something with the last one, then those that share nothing
        with a cell under way elsewhere. A cell that fails for a reason that the user can mend stops no other.
        """
        cache, held = Cache(), ""
        with self.ledger.at_work():
            for trials in self.ledger.rounds():
                look(trials)
                if not self.left(trials, session) or session.late():
                    return
                if trial := self.ledger.claim(trials, _rank(trials, held)):
                    held = _group(trial)
                    self._train(trial, cache, session)
                else:
                    self.ledger.rest()

    def _train(self, trial: Taken, cache: Cache, session: Session) -> None:
        own, tell = str(slot(trial)), functools.partial(self.ledger.tell, trial)
        runs = session.parent, trial.user_attrs.get("lost_run")
        try:
            with self.ledger.pulse(trial.number):
                result = run_cell(self.plan, self.place, own, self.cells[own], cache, tell, runs)
                self.ledger.finish(trial, result.metrics.get(self.plan.study.metric))
            self.place.keep(own, result)
        except Lost:
            note(f"study: {self.cells[own].cell}: no sign of life for so long that another worker got it.")
        except Exception as error:
            reason = one_line(error)
            self.ledger.fail(trial, reason or f"{type(error).__name__}: {error}", again=False)
            if reason is None:
                raise


def _group(trial: Entry | Taken) -> str:
    return str(trial.user_attrs["about"]["group"])


def _rank(trials: Trials, held: str) -> Callable[[Entry], int]:
    elsewhere = {_group(trial) for trial in trials if trial.state == RUNNING}
    return lambda trial: 0 if _group(trial) == held else 1 + (_group(trial) in elsewhere)
