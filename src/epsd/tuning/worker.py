"""One process of the search: takes waiting trials and runs them until none is left. Started by `epsd.tuning.search`.

`python -m epsd.tuning.worker` reads its job (JSON) from stdin.
"""

import contextlib
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from epsd.compute.devices import open_machine
from epsd.compute.seeds import mix
from epsd.data.prepared import Prepared
from epsd.engine.crew import serve
from epsd.engine.grid import Values
from epsd.engine.ledger import DONE, Entry, Ledger, Lost, Taken, Trials, failures
from epsd.engine.storage import StorageError, storage_errors
from epsd.pipeline.describe import method
from epsd.project import artifacts
from epsd.project.params import LimitParams, Params, TuneParams, flatten, parse
from epsd.project.processes import Stopped, signals_wait
from epsd.project.runtime import note
from epsd.tracking import Tracker, track
from epsd.training.record import Record
from epsd.tuning import judge, study
from epsd.tuning.judge import Figures
from epsd.tuning.space import Space

BROKEN = 1e10
"""Worse than every objective that is to be small: bytes, parameters, losses."""
HOPELESS = 3
"""Failed trials, and none that went well, after which a search is given up."""


@dataclass(frozen=True)
class Job:
    """What a worker is told. `params`: params.yaml with `tune`; `seed`: of its sampler; `before`: trials that had
    failed before this search began.
    """

    params: dict[str, Any]
    seed: int
    threads: int
    run_id: str
    before: list[int]


class Worker:
    """Runs trials of one study on one loaded data set."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.params: Params = parse(job.params)
        self.tune = self.params.tune
        self.space = Space(self.params)
        self.data = Prepared.load(artifacts.DATA)
        sampler, pruner = study.sampler(self.tune, job.seed), study.pruner(self.tune, self.params.train.epochs)
        self.ledger = Ledger(study.open_storage(self.tune), self.tune.study, sampler=sampler, pruner=pruner)

    def work(self) -> None:
        """Until every slot is done, or the search is given up."""
        with self.ledger.at_work():
            for trials in self.ledger.rounds():
                if not self.ledger.open_slots(trials) or given_up(trials, self.job.before):
                    return
                if trial := self.ledger.claim(trials):
                    self._run(trial)
                else:
                    self.ledger.rest()

    def _run(self, trial: Taken) -> None:
        """One trial from its first suggestion to its last word; what it raises is marked, not passed on."""
        try:
            with self.ledger.pulse(trial.number):
                values = self.ledger.patiently(lambda: self.space.suggest(trial))
                try:
                    self._judge(trial, values)
                except (Lost, StorageError, *storage_errors()):
                    raise
                except Exception as error:
                    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]
                    self.ledger.fail(trial, text, again=True)
        except Lost:
            note(f"tune: trial {trial.number} gave no sign of life for so long that it was given to another worker.")

    def _judge(self, trial: Taken, values: Values) -> None:
        if (twin := self._twin(values)) is not None:
            self._copy(trial, twin)
            return
        params = self.space.params(values)
        data = self.data.on(open_machine(params.device, self.job.threads, params.data.workers))
        with contextlib.ExitStack() as last, self._tracked(params, trial, values) as tracker:
            self.ledger.tell(trial, run_id=tracker.run_id, threads=self.job.threads)
            done, state = list[Figures](), "COMPLETE"
            try:
                for figures in judge.repeats(params, data, self.tune.repeats, self._watch(trial, tracker)):
                    done.append(figures)
                    self._repeated(trial, done, tracker)
            except optuna.TrialPruned as stop:
                done, state = done or [stop.args[0]], "PRUNED"
            except BaseException as error:
                tracker.tags({"trial.state": "INTERRUPTED" if isinstance(error, Stopped) else "FAILED"})
                raise
            tracker.tags({"trial.state": state})
            figures = self.ledger.patiently(lambda: self._record(trial, done, tracker, params.train.epochs))
            last.enter_context(signals_wait())  # a trial that counts has a run that is finished
            self.ledger.finish(trial, None if state == "PRUNED" else [figures[name] for name in self.tune.objectives])

    def _watch(self, trial: Taken, tracker: Tracker) -> Callable[[int, Record, Callable[[], Figures]], None]:
        """Per epoch of the first repeat: curve to MLflow, and (one objective) to the pruner, which may end the trial.

        The curves of all trials are so of one seed, and comparable.
        """
        first = next(iter(self.tune.objectives))
        reports = len(self.tune.objectives) == 1 and self.tune.pruner != "race"

        def watch(number: int, record: Record, figures: Callable[[], Figures]) -> None:
            if number > 0:
                return
            epoch = int(record["epoch"])
            tracker.epoch(record)
            if reports and epoch < self.params.train.epochs:
                known = record if first in record and not self.tune.constraints else figures()
                self._report(trial, known, epoch, figures)

        return watch

    def _repeated(self, trial: Taken, done: list[Figures], tracker: Tracker) -> None:
        """After each repeat: its figures to MLflow, and (in a race) the mean so far to the pruner."""
        if self.tune.repeats == 1:
            return
        tracker.metrics({f"repeat/{name}": value for name, value in done[-1].items()}, step=len(done) - 1)
        if self.tune.pruner == "race" and len(self.tune.objectives) == 1 and len(done) < self.tune.repeats:
            so_far = judge.means(done)
            self._report(trial, so_far, len(done), lambda: so_far)

    def _report(self, trial: Taken, known: Mapping[str, float], step: int, figures: Callable[[], Figures]) -> None:
        """Tell the pruner. Raises TrialPruned with the figures where it ends the trial."""

        def reported() -> bool:
            trial.report(merit(self.tune, known), step)
            return bool(trial.should_prune())

        if self.ledger.patiently(reported):
            raise optuna.TrialPruned(figures())

    def _record(self, trial: Taken, done: list[Figures], tracker: Tracker, epochs: int) -> Figures:
        """Figures (means over the repeats done) and constraints, before the trial is told to be over."""
        figures = judge.means(done)
        trial.set_user_attr("figures", figures)
        trial.set_user_attr("repeats", done)
        trial.set_user_attr("deviations", judge.deviations(done))
        for name, limit in self.tune.constraints.items():
            for key, excess in excesses(name, limit, figures[name]).items():
                trial.set_constraint(key, excess)
        tracker.metrics({f"{name} sd": value for name, value in judge.deviations(done).items()})
        # the curve of repeat 0 ends at step `epochs`: behind it, the mean is what the run shows as its figure
        tracker.metrics(figures, step=None if len(done) == 1 else len(done) * epochs)
        return figures

    def _twin(self, values: Values) -> Entry | None:
        """A finished trial of the very same values: the result would be the same to the bit."""
        return next((t for t in self.ledger.trials() if t.state in DONE and t.params == values), None)

    def _copy(self, trial: Taken, twin: Entry) -> None:
        copied = {key: twin.user_attrs.get(key) for key in ("figures", "repeats", "deviations", "run_id")}
        self.ledger.tell(trial, **copied, threads=self.job.threads, same_as=twin.number)
        for key, value in twin.constraints.items():
            trial.set_constraint(key, value)
        for step, value in twin.intermediate_values.items():
            trial.report(value, step)
        self.ledger.finish(trial, twin.values if twin.state == TrialState.COMPLETE else None)

    def _tracked(self, params: Params, trial: Taken, values: Values) -> contextlib.AbstractContextManager[Tracker]:
        frozen = dict(trial.user_attrs)
        return track(
            "tune",
            experiment=params.tracking.experiment,
            name=f"trial-{trial.number}",
            parent_run_id=self.job.run_id,
            lost_run_id=frozen.get("lost_run"),
            params=dict(flatten(params.model_dump())),
            tags={
                "kind": "trial",
                "method": f"{method(params)}+{params.objective['name']}",
                "dataset": params.data_title,
                "seed": params.seed,
                "study": self.tune.study,
                "trial.number": trial.number,
                "trial.state": "RUNNING",
                "threads": self.job.threads,
                **{f"trial.{key}": frozen[key] for key in ("origin", "retry_of", "reason") if key in frozen},
            },
            description=", ".join(f"{key} = {shown_value(value)}" for key, value in values.items()),
        )


def shown_value(value: Any) -> str:
    """A value in a few characters; thousands in full."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def merit(tune: TuneParams, figures: Mapping[str, float]) -> float:
    """What the pruner goes by: the one objective, of figures that keep to every limit. Others are worse than all of
    these, the more the further they break it: no trial outlives another by breaking a limit. No figure is negative.
    """
    [(name, direction)] = tune.objectives.items()
    found = [excesses(key, limit, figures[key]) for key, limit in tune.constraints.items()]
    broken = sum(max(0.0, excess) for each in found for excess in each.values())
    if not broken:
        return figures[name]
    return -broken if direction == "maximize" else BROKEN + broken


def excesses(name: str, limit: LimitParams, value: float) -> dict[str, float]:
    """By how much a figure breaks its limits; at most 0 where it keeps to them."""
    found = {}
    if limit.at_most is not None:
        found[f"{name} at most {limit.at_most:g}"] = value - limit.at_most
    if limit.at_least is not None:
        found[f"{name} at least {limit.at_least:g}"] = limit.at_least - value
    return found


def given_up(trials: Trials, before: Collection[int]) -> bool:
    """Whether everything fails: the first few did and nothing ever went well, or more failed than went well.

    before : the trials that had failed before the search began.
    """
    failed, done = len(failures(trials, before)), sum(trial.state in DONE for trial in trials)
    return failed >= HOPELESS and failed > 2 * done


def worker_seed(params: Params, existing: int, index: int, joined: str) -> int:
    """Of a worker's sampler: new for each session (`existing` trials before it) and worker, the same when repeated."""
    return mix(params.seed, "sampler", existing, index, joined)


if __name__ == "__main__":
    sys.exit(serve("tune", lambda job: Worker(Job(**job)).work()))
