"""`epsd tune`: begins or goes on with a study, starts its workers, shows how it goes, and says what came of it."""

import contextlib
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from epsd.engine.crew import Board, Crew, oversee, shares
from epsd.engine.ledger import DONE, Ledger, Trials, failures, known_run, slot
from epsd.engine.storage import shown, storage_errors, unreachable
from epsd.pipeline.prepared import opened
from epsd.pipeline.stage import check
from epsd.pipeline.weights import content_of
from epsd.project.params import DEFAULT_PATH, Params, flatten, load, read_yaml
from epsd.project.processes import Stopped
from epsd.project.runtime import no_telemetry, note
from epsd.tracking import Tracker, track
from epsd.tuning import TuningError, report
from epsd.tuning.space import Space
from epsd.tuning.study import begin, open_storage, where
from epsd.tuning.worker import Job, given_up, shown_value, worker_seed


def search(params: Params, trials: int | None, workers: int | None, resume: bool) -> tuple[Ledger, int]:
    """Run the study that `params.tune` describes until `trials` trials in all are complete or pruned.

    Returns the study's ledger and the status of a stop before all trials were done, 0 where there was none.

    Raises
    ------
    ParamsError, TuningError : see `Space`, `open_storage` and `begin`; every trial fails; workers cannot be kept alive.
    ArtifactError : see `opened`.
    """
    no_telemetry()
    params = check(params)
    space = Space(params)
    data = opened(params)
    started = "" if params.start.weights is None else f" {content_of(params.start.weights)}"
    try:
        made_from, wanted = data.digest + started, trials or params.tune.trials
        ledger, made = begin(open_storage(params.tune), space, made_from, wanted, resume)
    except storage_errors() as error:
        raise unreachable(where(params.tune), error) from None
    return _Search(params, ledger, made, workers or params.tune.workers).run()


class _Search:
    """One `epsd tune` at work on one study."""

    def __init__(self, params: Params, ledger: Ledger, made: bool, workers: int) -> None:
        base = dict(ledger.facts["epsd"]["base"])
        tree = {**params.model_dump(), **base, "tracking": params.tracking.model_dump(), "threads": params.threads}
        self.tree = {**tree, "tune": params.tune.model_dump(by_alias=True)}
        self.params, self.ledger, self.made = params, ledger, made
        self.objectives = list(params.tune.objectives)
        trials = ledger.trials()
        self.before = [trial.number for trial in failures(trials)]
        self.count, self.threads, self.words = shares(workers, len(ledger.open_slots(trials)), params.threads)
        self.existing = sum(trial.state != TrialState.WAITING for trial in trials)

    def run(self) -> tuple[Ledger, int]:
        name, where_, stopped = self.params.tune.study, shown(where(self.params.tune)), 0
        with self._tracked() as tracker:
            if self.made or "run_id" not in self.ledger.facts:
                self.ledger.write("run_id", tracker.run_id)
            print(f"tune: study '{name}' in {where_}: {self._plan()}", flush=True)
            if fixed := self._fixed():
                print(f"tune: held fixed: {fixed}", flush=True)
            try:
                self._oversee(tracker)
            except Stopped as stop:
                note(f"tune: {stop}; the running trials are put back.")
                stopped = stop.status
            self._conclude(tracker, stopped)
        trials = self.ledger.trials()
        if given_up(trials, self.before) and self.ledger.open_slots(trials):
            failed = failures(trials, self.before)
            raise TuningError(
                f"{len(failed)} trials failed, so the search was given up. "
                f"The first error, of trial {failed[0].number}: {failed[0].user_attrs['error']}"
            )
        return self.ledger, stopped

    def _plan(self) -> str:
        trials = self.ledger.trials()
        done = sum(trial.state in DONE for trial in trials)
        todo = len(self.ledger.open_slots(trials))
        return f"{todo} trials to run" + (f" after {done}" if done else "") + f", {self.words}"

    def _fixed(self) -> str:
        """What all trials have in common by `tune.fixed`, beside what the file says where that is something else."""
        signature, present = self.ledger.facts["epsd"]["signature"], dict(flatten(self.params.model_dump()))
        return ", ".join(
            f"{key} {shown_value(value)}"
            + (f" (params.yaml: {present[key]})" if present.get(key, value) != value else "")
            for key, value in signature["fixed"].items()
        )

    # --- while it runs ---

    def _oversee(self, tracker: Tracker) -> None:
        def job(number: int) -> dict[str, Any]:
            seed = worker_seed(self.params, self.existing, number, "" if self.made else platform.node())
            return asdict(Job(self.tree, seed, self.threads, tracker.run_id, self.before))

        def told(trial: FrozenTrial) -> str:
            if trial.state in DONE and len(self.objectives) == 1 and (ranked := report.best(self.ledger.study)):
                tracker.metrics({f"study/best {self.objectives[0]}": ranked[0].values[0]}, step=board.done)
            return _told(trial, self.objectives)

        board = Board("tune", self.ledger, told, self._beside)

        def wanted(trials: Trials) -> int:
            return 0 if given_up(trials, self.before) else len(self.ledger.open_slots(trials))

        crew = Crew("epsd.tuning.worker", self.count, job)
        oversee(self.ledger, crew, board, wanted, lambda trials: not wanted(trials))

    def _beside(self, trials: Trials) -> list[str]:
        counts = tally(trials)
        return [self._best(), *(f"{counts[name]} {name}" for name in ("running", "pruned", "failed") if counts[name])]

    def _best(self) -> str:
        ranked = report.best(self.ledger.study)
        if not ranked:
            return "no best yet"
        if len(self.objectives) > 1:
            return f"front of {len(ranked)}"
        return f"best {ranked[0].values[0]:.4f} (trial {ranked[0].number})"

    # --- when it is over ---

    def _conclude(self, tracker: Tracker, stopped: int) -> None:
        trials = self.ledger.trials()
        tracker.metrics({f"study/{name}": count for name, count in tally(trials).items()})
        tracker.tags({"study.state": "complete" if not self.ledger.open_slots(trials) else "unfinished"})
        ranked = report.best(self.ledger.study)
        if ranked and len(self.objectives) == 1:
            tracker.tags({"study.best": ranked[0].number})
            tracker.metrics(ranked[0].user_attrs["figures"])
        if stopped or not ranked:
            return
        with tempfile.TemporaryDirectory() as folder:
            for path in report.figures(self.ledger.study, self.objectives, Path(folder)):
                tracker.artifact(path)
            table = Path(folder) / "trials.csv"
            report.export(self.ledger.study, table)
            tracker.artifact(table)
            tracker.artifact(DEFAULT_PATH)

    def _tracked(self) -> contextlib.AbstractContextManager[Tracker]:
        tune, signature = self.params.tune, self.ledger.facts["epsd"]["signature"]
        parts = ("objectives", "fixed", "space")
        return track(
            "tune",
            experiment=self.params.tracking.experiment,
            name=f"tune-{tune.study}",
            run_id=known_run(self.ledger, self.made),
            params={f"tune.{part}.{key}": value for part in parts for key, value in signature[part].items()},
            tags={
                "kind": "search",
                "study": tune.study,
                "sampler": tune.sampler,
                "pruner": tune.pruner,
                "storage": shown(where(tune)),
                "trials": len(self.ledger.slots),
                "dataset": self.params.data_title,
                "seed": self.params.seed,
            },
            description=f"Search over {', '.join(signature['space'])}. The trials are the runs below this one.",
        )


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
    mine = [trial for trial in trials if slot(trial) != -1]
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


def command(trials: int | None, workers: int | None, resume: bool, apply: int | None, export: Path | None) -> int:
    """`epsd tune`: search (where asked), table, CSV, params.yaml. The exit status.

    apply : None = no, -1 = the best, else a trial's number. It and `export` alone read a study that is there.
    """
    params, stopped = load(DEFAULT_PATH), 0
    if resume or trials is not None or workers is not None or (apply is None and export is None):
        ledger, stopped = search(params, trials, workers, resume)
        _say_result(ledger, stopped > 0)
    else:
        ledger = _existing(params)
    if export is not None:
        print(f"{report.export(ledger.study, export)} trials written to {export}.")
    if apply is not None and not stopped:
        _apply(ledger, params, None if apply < 0 else apply)
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
            f"tune.study: there is no study '{params.tune.study}' of `epsd tune` in {shown(where(params.tune))} yet. "
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
        print(f"tune: figures and a table of all trials are in the run 'tune-{ledger.study.study_name}' (make ui).")
        number = str(ranked[0].number) if len(objectives) == 1 else "NUMBER"
        print(f"Next: epsd tune --apply {number} && dvc repro")


def _apply(ledger: Ledger, params: Params, number: int | None) -> None:
    trial = report.chosen(ledger.study, number)
    copy = report.apply(ledger.study, trial, params)
    if copy is None:
        print(f"params.yaml already is trial {trial.number}.")
        return
    before, after = (dict(flatten(read_yaml(path))) for path in (copy, DEFAULT_PATH))
    for key in [key for key in {**before, **after} if before.get(key) != after.get(key)]:
        print(f"  {key}: {before.get(key, 'not set')} -> {after.get(key, 'not set')}")
    print(f"params.yaml is now trial {trial.number} ({report.judged(trial)}). What was there: {copy}")
    print("Next: dvc repro")
