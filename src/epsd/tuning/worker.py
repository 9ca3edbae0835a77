"""One process of the search: takes waiting trials and runs them until none is left. Started by `epsd.tuning.search`.

`python -m epsd.tuning.worker` reads its job (JSON) from stdin.
"""

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from epsd.compute.devices import open_machine
from epsd.compute.seeds import mix
from epsd.data.prepared import Prepared
from epsd.pipeline.describe import method
from epsd.project import artifacts
from epsd.project.params import LimitParams, Params, TuneParams, flatten, parse
from epsd.project.processes import Stopped, not_outliving, signals_wait, stops
from epsd.project.runtime import no_telemetry, note
from epsd.tracking import Tracker, track
from epsd.training.record import Record
from epsd.tuning import judge
from epsd.tuning.judge import Figures
from epsd.tuning.space import Space, Values
from epsd.types import EpsdError

LEAVE_WITHIN = 10.0
"""Seconds for a clean end after that of the search's main process."""
IDLE = 0.5
"""Seconds between two looks for a slot that another worker may have to give back."""
BROKEN = 1e10
"""Worse than every objective that is to be small: bytes, parameters, losses."""
HOPELESS = 3
"""Failed trials, and none that went well, after which a search is given up."""


@dataclass(frozen=True)
class Job:
    """What a worker is told. `params`: params.yaml with `tune`; `seed`: of its sampler; `since`: the search began."""

    params: dict[str, Any]
    seed: int
    threads: int
    run_id: str
    since: float


class Worker:
    """Runs trials of one study on one loaded data set."""

    def __init__(self, job: Job) -> None:
        from epsd.tuning import study

        self.job = job
        self.params: Params = parse(job.params)
        self.tune = self.params.tune
        self.space = Space(self.params)
        self.data = Prepared.load(artifacts.DATA)
        self.storage = study.open_storage(self.tune)
        self.ledger = study.Ledger(self.storage, self.tune.study)
        self.sampler = study.sampler(self.tune, job.seed)
        self.pruner = study.pruner(self.tune, self.params.train.epochs)

    def work(self) -> None:
        """Until every slot is done, or the search is given up."""
        while True:
            with signals_wait():
                self.ledger.repair()
                trials = self.ledger.trials()
                if not self.ledger.open_slots(trials) or given_up(trials, self.job.since):
                    return
                trial_id = self.ledger.claim()
            if trial_id is None:
                time.sleep(IDLE)
            else:
                self._run(trial_id)

    def _run(self, trial_id: int) -> None:
        """One trial from its first suggestion to its last word; what it raises is marked, not passed on."""
        import optuna
        from optuna.exceptions import UpdateFinishedTrialError

        from epsd.tuning.study import pulse, storage_errors

        try:
            with pulse(self.storage, trial_id):
                with signals_wait():
                    study = self.ledger.load(self.sampler, self.pruner)
                    trial = optuna.trial.Trial(study, trial_id)
                    values = self.space.suggest(trial)
                    trial.set_user_attr("threads", self.job.threads)
                try:
                    self._judge(study, trial, values)
                except Stopped:
                    self.ledger.give_up(_frozen(study, trial.number), "interrupted")
                    raise
                except (UpdateFinishedTrialError, *storage_errors()):
                    raise
                except Exception as error:
                    self._failed(study, trial, error)
        except UpdateFinishedTrialError:  # declared lost meanwhile (a machine that slept): its slot is another's now
            note(f"tune: trial {trial_id} took so long to give a sign of life that it was given to another worker.")

    def _judge(self, study: Any, trial: Any, values: Values) -> None:
        import optuna

        if (twin := self._twin(study, trial.number, values)) is not None:
            self._copy(study, trial, twin)
            return
        params = self.space.params(values)
        data = self.data.on(open_machine(params.device, self.job.threads, params.data.workers))
        with self._tracked(params, trial, values) as tracker:
            done: list[Figures] = []
            try:
                for figures in judge.repeats(params, data, self.tune.repeats, self._watch(trial, tracker)):
                    done.append(figures)
                    self._repeated(trial, done, tracker)
            except optuna.TrialPruned as stop:
                tracker.tags({"trial.state": "PRUNED"})
                with signals_wait():
                    self._record(trial, done or [stop.args[0]], tracker, params.train.epochs)
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                return
            except Exception:
                tracker.tags({"trial.state": "FAILED"})
                raise
            except Stopped:
                tracker.tags({"trial.state": "INTERRUPTED"})
                raise
            tracker.tags({"trial.state": "COMPLETE"})
            with signals_wait():
                figures = self._record(trial, done, tracker, params.train.epochs)
                study.tell(trial, [figures[name] for name in self.tune.objectives])

    def _watch(self, trial: Any, tracker: Tracker) -> Callable[[int, Record, Callable[[], Figures]], None]:
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

    def _repeated(self, trial: Any, done: list[Figures], tracker: Tracker) -> None:
        """After each repeat: its figures to MLflow, and (in a race) the mean so far to the pruner."""
        if self.tune.repeats == 1:
            return
        tracker.metrics({f"repeat/{name}": value for name, value in done[-1].items()}, step=len(done) - 1)
        if self.tune.pruner == "race" and len(self.tune.objectives) == 1 and len(done) < self.tune.repeats:
            so_far = judge.means(done)
            self._report(trial, so_far, len(done), lambda: so_far)

    def _report(self, trial: Any, known: Mapping[str, float], step: int, figures: Callable[[], Figures]) -> None:
        """Tell the pruner. Raises TrialPruned with the figures where it ends the trial."""
        import optuna

        with signals_wait():
            trial.report(merit(self.tune, known), step)
            stop = trial.should_prune()
        if stop:
            raise optuna.TrialPruned(figures())

    def _record(self, trial: Any, done: list[Figures], tracker: Tracker, epochs: int) -> Figures:
        """Figures (means over the repeats done) and constraints, before the trial is told to be over."""
        figures = judge.means(done)
        trial.set_user_attr("figures", figures)
        trial.set_user_attr("repeats", done)
        trial.set_user_attr("deviations", judge.deviations(done))
        trial.set_user_attr("run_id", tracker.run_id)
        for name, limit in self.tune.constraints.items():
            for key, excess in excesses(name, limit, figures[name]).items():
                trial.set_constraint(key, excess)
        tracker.metrics({f"{name} sd": value for name, value in judge.deviations(done).items()})
        # the curve of repeat 0 ends at step `epochs`: behind it, the mean is what the run shows as its figure
        tracker.metrics(figures, step=None if len(done) == 1 else len(done) * epochs)
        return figures

    def _failed(self, study: Any, trial: Any, error: Exception) -> None:
        """Keep the error; the slot goes back with new values, as the same would fail again."""
        import optuna

        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:1000]
        with signals_wait():
            trial.set_user_attr("error", text)
            number = int(trial.user_attrs["slot"])
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            self.ledger.add(number, retry_of=trial.number)

    def _twin(self, study: Any, number: int, values: Values) -> Any:
        """A finished trial of the very same values: the result would be the same to the bit."""
        from epsd.tuning.study import DONE

        return next((t for t in study.get_trials(deepcopy=False, states=DONE) if t.params == values), None)

    def _copy(self, study: Any, trial: Any, twin: Any) -> None:
        with signals_wait():
            for key in ("figures", "repeats", "deviations", "run_id"):
                trial.set_user_attr(key, twin.user_attrs.get(key))
            trial.set_user_attr("same_as", twin.number)
            for key, value in twin.constraints.items():
                trial.set_constraint(key, value)
            for step, value in twin.intermediate_values.items():
                trial.report(value, step)
            study.tell(trial, twin.values if twin.state.name == "COMPLETE" else None, state=twin.state)

    def _tracked(self, params: Params, trial: Any, values: Values) -> contextlib.AbstractContextManager[Tracker]:
        frozen = dict(trial.user_attrs)
        return track(
            "tune",
            experiment=params.tracking.experiment,
            name=f"trial-{trial.number}",
            parent_run_id=self.job.run_id,
            params=dict(flatten(params.model_dump())),
            tags={
                "kind": "trial",
                "method": f"{method(params)}+{params.objective['name']}",
                "dataset": params.dataset["name"],
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


def failures(trials: list[Any], since: float) -> list[Any]:
    """Trials that raised an error in the present search, the first one first."""
    recent = [t for t in trials if "error" in t.user_attrs and t.datetime_complete is not None]
    return sorted(
        (t for t in recent if t.datetime_complete.timestamp() >= since), key=lambda t: t.datetime_complete.timestamp()
    )


def given_up(trials: list[Any], since: float) -> bool:
    """Whether everything fails: the first few did and nothing ever went well, or more failed than went well."""
    from epsd.tuning.study import DONE

    failed, done = len(failures(trials, since)), sum(trial.state in DONE for trial in trials)
    return failed >= HOPELESS and failed > 2 * done


def _frozen(study: Any, number: int) -> Any:
    return next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)


def worker_seed(params: Params, existing: int, index: int, joined: str) -> int:
    """Of a worker's sampler: new for each session (`existing` trials before it) and worker, the same when repeated."""
    return mix(params.seed, "sampler", existing, index, joined)


def main() -> int:
    """Run the job on stdin; the exit status says how it ended."""
    from epsd.tuning.study import storage_errors, unreachable

    job = Job(**json.loads(sys.stdin.read()))
    no_telemetry()
    warnings.simplefilter("ignore")  # of a trial's own choices: layers left without weights, and the like
    try:
        with stops(), not_outliving(leave_within=LEAVE_WITHIN):
            Worker(job).work()
    except Stopped as stop:
        return stop.status
    except EpsdError as error:
        note(f"tune: {error}")
        return 1
    except storage_errors() as error:
        note(f"tune: {unreachable(job.params['tune']['storage'], error)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
