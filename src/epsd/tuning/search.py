"""`epsd tune`: begins or goes on with a study, starts its workers, shows how it goes, and says what came of it."""

import contextlib
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from epsd.pipeline.prepared import opened
from epsd.pipeline.stage import check
from epsd.project.params import DEFAULT_PATH, Params, load
from epsd.project.processes import Child, Stopped, end, signals_wait, start
from epsd.project.progress import Progress
from epsd.project.runtime import no_telemetry, note, quiet
from epsd.tracking import Tracker, track
from epsd.tuning import TuningError, report
from epsd.tuning.space import Space
from epsd.tuning.study import DONE, PATIENCE, Ledger, begin, open_storage, shown, slot, storage_errors, unreachable
from epsd.tuning.worker import Job, failures, given_up, shown_value, worker_seed

POLL = 0.4
"""Seconds between two looks at the study."""
LEAVE_WITHIN = 30.0
"""Seconds that workers may take to mark their trials and end."""


class Outcome(NamedTuple):
    """`ledger` of the study; `stopped`: the status of a stop before all trials were done, 0 where there was none."""

    ledger: Ledger
    stopped: int


def search(params: Params, *, trials: int | None = None, workers: int | None = None, resume: bool = False) -> Outcome:
    """Run the study that `params.tune` describes until `trials` trials in all are complete or pruned.

    Raises
    ------
    ParamsError, TuningError : see `Space`, `open_storage` and `begin`; every trial fails; workers cannot be kept alive.
    ArtifactError : see `opened`.
    """
    no_telemetry()
    check(params)
    space = Space(params)
    data = opened(params)
    since = time.time()
    try:
        ledger, made = begin(open_storage(params.tune), space, data.digest, trials or params.tune.trials, resume)
    except storage_errors() as error:
        raise unreachable(params.tune.storage, error) from None
    return _Search(params, ledger, made, workers or params.tune.workers, since).run()


class _Search:
    """One `epsd tune` at work on one study."""

    def __init__(self, params: Params, ledger: Ledger, made: bool, workers: int, since: float) -> None:
        base = dict(ledger.facts["epsd"]["base"])
        tree = {**params.model_dump(), **base, "tracking": params.tracking.model_dump(), "threads": params.threads}
        self.tree = {**tree, "tune": params.tune.model_dump(by_alias=True)}
        self.params, self.ledger, self.made, self.since = params, ledger, made, since
        self.count = min(workers, max(1, len(ledger.open_slots(ledger.trials()))))
        self.threads = max(1, (params.threads or torch.get_num_threads()) // self.count)
        self.existing = sum(trial.state != TrialState.WAITING for trial in ledger.trials())
        self.started = 0
        self.crashes = 0
        self.stopped = 0
        self.running: list[Child] = []

    def run(self) -> Outcome:
        name = self.params.tune.study
        with self._tracked() as tracker:
            if self.made or "run_id" not in self.ledger.facts:
                self.ledger.study.set_user_attr("run_id", tracker.run_id)
            self.run_id = tracker.run_id
            print(f"tune: study '{name}' in {shown(self.params.tune.storage)}: {self._plan()}", flush=True)
            try:
                self._oversee(tracker)
            except Stopped as stop:
                note(f"tune: {stop}; the running trials are put back. Once more ends them at once.")
                self.stopped = stop.status
            finally:
                self._end_workers()
            self._conclude(tracker)
        trials = self.ledger.trials()
        if given_up(trials, self.since) and self.ledger.open_slots(trials):
            failed = failures(trials, self.since)
            raise TuningError(
                f"{len(failed)} trials failed, so the search was given up. "
                f"The first error, of trial {failed[0].number}: {failed[0].user_attrs['error']}"
            )
        return Outcome(self.ledger, self.stopped)

    def _plan(self) -> str:
        trials = self.ledger.trials()
        done = sum(trial.state in DONE for trial in trials)
        todo = len(self.ledger.open_slots(trials))
        per = f"{self.count} worker{'s' * (self.count > 1)} with {self.threads} thread{'s' * (self.threads > 1)} each"
        return f"{todo} trials to run" + (f" after {done}" if done else "") + f", {per}"

    # --- while it runs ---

    def _oversee(self, tracker: Tracker) -> None:
        board = _Board(self.ledger, list(self.params.tune.objectives), tracker)
        answered = time.monotonic()
        with board:
            while True:
                try:
                    with signals_wait():
                        self.ledger.repair()
                        trials = self.ledger.trials()
                    board.show(trials)
                    open_slots = self.ledger.open_slots(trials)
                    answered = time.monotonic()
                except storage_errors() as error:
                    if time.monotonic() - answered > PATIENCE:
                        raise unreachable(self.params.tune.storage, error) from None
                    time.sleep(POLL)
                    continue
                if not open_slots or given_up(trials, self.since):
                    return
                self._keep_workers(len(open_slots))
                time.sleep(POLL)

    def _keep_workers(self, wanted: int) -> None:
        """Replace the workers that died, while there is work."""
        for process in [process for process in self.running if process.poll() is not None]:
            self.running.remove(process)
            self.crashes += process.returncode != 0
        if self.crashes > 3 * self.count + 3:
            raise TuningError(f"{self.crashes} workers died one after the other; their last words are above.")
        while len(self.running) < min(self.count, wanted):
            self.running.append(self._start_worker())

    def _start_worker(self) -> Child:
        joined = "" if self.made else platform.node()
        job = Job(
            params=self.tree,
            seed=worker_seed(self.params, self.existing, self.started, joined),
            threads=self.threads,
            run_id=self.run_id,
            since=self.since,
        )
        self.started += 1
        command = [sys.executable, "-m", "epsd.tuning.worker"]
        return start(command, {**os.environ, "EPSD_QUIET": "1"}, asdict(job))

    def _end_workers(self) -> None:
        """Have the workers put their trials back and end; what they leave is put back here."""
        try:
            end(self.running, LEAVE_WITHIN)
        finally:
            with signals_wait(), contextlib.suppress(*storage_errors()):
                self.ledger.repair()

    # --- when it is over ---

    def _conclude(self, tracker: Tracker) -> None:
        trials = self.ledger.trials()
        tracker.metrics({f"study/{name}": count for name, count in tally(trials).items()})
        tracker.tags({"study.state": "complete" if not self.ledger.open_slots(trials) else "unfinished"})
        ranked = report.best(self.ledger.study)
        if ranked and len(self.params.tune.objectives) == 1:
            tracker.tags({"study.best": ranked[0].number})
            tracker.metrics(ranked[0].user_attrs["figures"])
        if self.stopped or not ranked:
            return
        objectives = list(self.params.tune.objectives)
        with tempfile.TemporaryDirectory() as folder:
            for path in report.figures(self.ledger.study, objectives, Path(folder)):
                tracker.artifact(path)
            table = Path(folder) / "trials.csv"
            report.export(self.ledger.study, table)
            tracker.artifact(table)
            tracker.artifact(DEFAULT_PATH)

    def _tracked(self) -> contextlib.AbstractContextManager[Tracker]:
        tune, signature = self.params.tune, self.ledger.facts["epsd"]["signature"]
        space = {f"tune.space.{key}": entry for key, entry in signature["space"].items()}
        fixed = {f"tune.fixed.{key}": value for key, value in signature["fixed"].items()}
        judged = {f"tune.objectives.{key}": value for key, value in signature["objectives"].items()}
        return track(
            "tune",
            experiment=self.params.tracking.experiment,
            name=f"study-{tune.study}",
            run_id=self._known_run(),
            params={**judged, **fixed, **space},
            tags={
                "kind": "search",
                "study": tune.study,
                "sampler": tune.sampler,
                "pruner": tune.pruner,
                "storage": shown(tune.storage),
                "trials": self.ledger.target,
                "dataset": self.params.dataset["name"],
                "seed": self.params.seed,
            },
            description=f"Search over {', '.join(signature['space'])}. The trials are the runs below this one.",
        )

    def _known_run(self) -> str | None:
        """The study's run, which whoever made the study may be about to open."""
        deadline = time.monotonic() + (0 if self.made else PATIENCE)
        while "run_id" not in self.ledger.facts:
            if self.made or self.existing or time.monotonic() > deadline:
                return None
            time.sleep(0.2)
        return str(self.ledger.facts["run_id"])


class _Board:
    """How the search goes: a bar on a terminal, a line per trial elsewhere."""

    def __init__(self, ledger: Ledger, objectives: list[str], tracker: Tracker) -> None:
        self._ledger, self._objectives, self._tracker = ledger, objectives, tracker
        trials = ledger.trials()
        self._seen = {trial.number for trial in trials if trial.state.is_finished()}
        self._done = sum(trial.state in DONE for trial in trials)
        self._begun, self._before = time.monotonic(), self._done
        self._bar = Progress("tune", ledger.target, self._done, time_left=False)
        self._lines = not quiet() and not sys.stderr.isatty()

    def __enter__(self) -> "_Board":
        self._bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__(None, None, None)

    def show(self, trials: list[FrozenTrial]) -> None:
        """Count what is new, and say it."""
        for trial in sorted(trials, key=lambda t: (t.datetime_complete is None, str(t.datetime_complete))):
            if trial.number not in self._seen and trial.state.is_finished():
                self._seen.add(trial.number)
                self._finished(trial)
        counts = tally(trials)
        parts = [self._best(), *(f"{counts[name]} {name}" for name in ("running", "pruned", "failed") if counts[name])]
        self._bar.say(", ".join([*parts, *self._left()]))

    def _left(self) -> list[str]:
        """Time that the other trials may take, at the pace so far; nothing before the first is done."""
        done, todo = self._done - self._before, self._ledger.target - self._done
        if not done or todo <= 0:
            return []
        minutes, seconds = divmod(round((time.monotonic() - self._begun) / done * todo), 60)
        return [f"{minutes}:{seconds:02d} left"]

    def _finished(self, trial: FrozenTrial) -> None:
        if trial.state in DONE:
            self._done += 1
            self._bar.step()
            if len(self._objectives) == 1 and (ranked := report.best(self._ledger.study)):
                self._tracker.metrics({f"study/best {self._objectives[0]}": ranked[0].values[0]}, step=self._done)
        if self._lines:
            told = "; ".join([_told(trial, self._objectives), self._best(), *self._left()])
            note(f"tune: {self._done}/{self._ledger.target} {told}")

    def _best(self) -> str:
        ranked = report.best(self._ledger.study)
        if not ranked:
            return "no best yet"
        if len(self._objectives) > 1:
            return f"front of {len(ranked)}"
        return f"best {ranked[0].values[0]:.4f} (trial {ranked[0].number})"


def _told(trial: FrozenTrial, objectives: list[str]) -> str:
    """One finished trial in one line."""
    seconds = f" in {trial.duration.total_seconds():.1f} s" if trial.duration else ""
    head = f"trial {trial.number} {trial.state.name.lower()}{seconds}"
    if trial.state == TrialState.FAIL:
        return f"{head}: {trial.user_attrs.get('error') or trial.user_attrs.get('lost') or 'no sign of life'}"
    figures = trial.user_attrs.get("figures") or {}
    judged = ", ".join(f"{name} {shown_value(figures.get(name))}" for name in objectives)
    return f"{head}: {judged} with " + ", ".join(f"{key}={shown_value(value)}" for key, value in trial.params.items())


def tally(trials: list[FrozenTrial]) -> dict[str, int]:
    """Trials by what became of them; those lost and taken up again are not failed ones."""
    mine = [trial for trial in trials if slot(trial) >= 0]
    count = {state: sum(trial.state == state for trial in mine) for state in TrialState}
    failed = sum("error" in trial.user_attrs for trial in mine)
    return {
        "complete": count[TrialState.COMPLETE],
        "pruned": count[TrialState.PRUNED],
        "failed": failed,
        "retried": count[TrialState.FAIL] - failed,
        "running": count[TrialState.RUNNING],
    }


# --- the command ----------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What the command line asked for. `apply`: None = no, -1 = the best, else a trial's number."""

    trials: int | None = None
    workers: int | None = None
    resume: bool = False
    apply: int | None = None
    export: Path | None = None

    @property
    def runs(self) -> bool:
        """Whether trials are to be run: `--apply` and `--export` alone read a study that is there."""
        reads = self.apply is not None or self.export is not None
        return not reads or self.resume or self.trials is not None or self.workers is not None


def command(request: Request) -> int:
    """`epsd tune`: search (where asked), table, CSV, params.yaml. The exit status."""
    params = load(DEFAULT_PATH)
    stopped = 0
    if request.runs:
        ledger, stopped = search(params, trials=request.trials, workers=request.workers, resume=request.resume)
        _say_result(ledger, stopped > 0)
    else:
        ledger = _existing(params)
    if request.export is not None:
        print(f"{report.export(ledger.study, request.export)} trials written to {request.export}.")
    if request.apply is not None and not stopped:
        _apply(ledger, params, None if request.apply < 0 else request.apply)
    return stopped


def _existing(params: Params) -> Ledger:
    storage = open_storage(params.tune)
    try:
        ledger = Ledger(storage, params.tune.study)
        ledger.facts["epsd"]
        return ledger
    except KeyError:
        known = ", ".join(optuna.get_all_study_names(storage)) or "(none)"
        raise TuningError(
            f"tune.study: there is no study '{params.tune.study}' of `epsd tune` in {shown(params.tune.storage)} yet. "
            f"Studies: {known}."
        ) from None


def _say_result(ledger: Ledger, interrupted: bool) -> None:
    objectives = list(ledger.facts["epsd"]["objectives"])
    counts = tally(ledger.trials())
    print(report.table(ledger.study, objectives))
    shown_counts = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    print(f"tune: {shown_counts or 'no trial finished'}." + " `epsd tune --resume` goes on." * interrupted)
    if ranked := report.best(ledger.study):
        if len(objectives) == 1 and (gain := report.against_current(ledger.study, ranked[0], objectives[0])):
            print(f"tune: {gain}.")
        number = str(ranked[0].number) if len(objectives) == 1 else "NUMBER"
        print(f"Next: epsd tune --apply {number} && dvc repro")


def _apply(ledger: Ledger, params: Params, number: int | None) -> None:
    trial = report.chosen(ledger.study, number)
    copy = report.apply(ledger.study, trial, params)
    if copy is None:
        print(f"params.yaml already is trial {trial.number}.")
        return
    print(f"params.yaml is now trial {trial.number} ({report.judged(trial)}). What was there: {copy}")
    print("Next: dvc repro")
