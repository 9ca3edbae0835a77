"""`epsd study FILE`: checks everything, trains what is missing in one or more processes, ends with table and figure."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from epsd.engine.crew import Board, Crew, oversee, serve, shares
from epsd.engine.ledger import Entry, Trials, failures, known_run
from epsd.engine.storage import shown
from epsd.project import artifacts
from epsd.project.processes import Stopped
from epsd.project.runtime import hush, no_telemetry, note, quiet
from epsd.studies import outcome, plan
from epsd.studies.plan import Plan
from epsd.studies.queue import Queue, Session
from epsd.studies.work import Place, Result, mark
from epsd.tracking import Tracker, track


def command(file: str, workers: int, minutes: float | None, show: bool, storage: str | None) -> int:
    """`epsd study`: the exit status is 0 when all cells are done, 1 when some are left or failed, 130 after Ctrl-C.

    minutes : begin no cell after this long.  show : only list the cells.  storage : instead of the study file's.

    Raises ParamsError for a file or a cell that is not right, before any work; StudyError and StorageError.
    """
    path = plan.find(file)
    study = plan.load(path)
    place, storage = Place(study.study.name), storage or study.study.storage
    if show:
        _show(study, place, storage)
        return 0
    no_telemetry()
    return _Study(path, study, place, storage, workers, minutes).run()


def _show(study: Plan, place: Place, storage: str | None) -> None:
    if storage is not None:
        queue = Queue(study, place, storage)
        queue.collect(queue.ledger.trials())
    for cell in study.cells:
        done = False
        if place.prepared(cell.params, study.split_seed):
            done = place.result(mark(cell, place.data(cell.params, study.split_seed))) is not None
        print(f"{'done' if done else 'to do'}  {cell}")


class _Study:
    """One `epsd study` at work."""

    def __init__(
        self, path: Path, study: Plan, place: Place, storage: str | None, workers: int, minutes: float | None
    ) -> None:
        self.path, self.study, self.place, self.storage = path, study, place, storage
        self.deadline = None if minutes is None else time.time() + 60 * minutes
        self.queue = Queue(study, place, storage)
        self.ledger = self.queue.ledger
        self.before = [trial.number for trial in failures(self.ledger.trials())]
        self.queue.lay()
        self.total, done = len(self.queue.cells), len(self.queue.done())
        threads = study.cells[0].params.threads
        self.workers, self.threads, self.words = shares(workers, self.total - done, threads)

    def run(self) -> int:
        name, done, stopped = self.study.study.name, len(self.queue.done()), 0
        with self._tracked() as tracker:
            if "run_id" not in self.ledger.facts:
                self.ledger.write("run_id", tracker.run_id)
            artifacts.write_json(self.place.folder / "run.json", {"run_id": tracker.run_id})
            if not quiet():
                print(f"study: '{name}': {self._plan(done)}", flush=True)
            try:
                if done < self.total:
                    self._work(Session(tracker.run_id, self.before, self.deadline))
            except Stopped as stop:
                note(f"study: {stop}; finished cells are kept, a cell under way goes on from its last epoch.")
                stopped = stop.status
            trials = self.ledger.trials()
            self.queue.collect(trials)
            done = len(self.queue.done())
            tracker.tags({"study.state": "unfinished" if done < self.total else "complete"})
            tracker.metrics({"study/cells": self.total, "study/done": done})
            if done and not stopped:
                self._conclude(tracker)
        self._say_what_is_left(failures(trials, self.before), done)
        return stopped or int(done < self.total)

    def _say_what_is_left(self, failed: Trials, done: int) -> None:
        if failed:
            about = failed[0].user_attrs
            note(f"study: {len(failed)} cells failed, the first one {about['about']['cell']}: {about['error']}")
        if done < self.total:
            note(f"study: {done} of {self.total} cells are done. `epsd study {self.path}` goes on.")

    def _plan(self, done: int) -> str:
        data = self.place.data(self.study.cells[0].params, self.study.split_seed)
        so_far = f" ({done} done)" if done else ""
        by = f", handed out in {shown(self.storage)}" if self.storage else ""
        return f"{self.total - done} of {self.total} models to train{so_far}, data {data.digest[:8]}, {self.words}{by}"

    # --- the work ---

    def _work(self, session: Session) -> None:
        board = Board("study", self.ledger, self._told, lambda trials: [])
        if self.workers == 1:
            torch.set_num_threads(self.threads)
            with board, _quietly():
                self.queue.work(session, board.show)
                board.show(self.ledger.trials())
            return
        about = {"file": str(self.path), "threads": self.threads, "storage": self.storage, "session": asdict(session)}
        crew = Crew("epsd.studies.run", self.workers, lambda number: about)

        def wanted(trials: Trials) -> int:
            return 0 if session.late() else self.queue.left(trials, session)

        def over(trials: Trials) -> bool:
            return not self.queue.left(trials, session) or (session.late() and not crew.busy())

        oversee(self.ledger, crew, board, wanted, over)

    def _told(self, trial: Entry) -> str:
        cell, metric = trial.user_attrs["about"]["cell"], self.study.study.metric
        if "error" in trial.user_attrs:
            return f"{cell} failed: {trial.user_attrs['error']}"
        if "result" not in trial.user_attrs:
            return f"{cell} is put back: {trial.user_attrs.get('lost', 'no sign of life')}"
        result = Result(**trial.user_attrs["result"])
        value = f"{metric} {result.metrics[metric]:.4f}" if metric in result.metrics else f"no {metric}"
        return f"{cell}: {value} ({result.seconds:.1f} s)"

    # --- its run in MLflow ---

    def _tracked(self) -> contextlib.AbstractContextManager[Tracker]:
        first, study = self.study.cells[0].params, self.study.study
        return track(
            "study",
            experiment=first.tracking.experiment,
            name=f"study-{study.name}",
            run_id=known_run(self.ledger, self.queue.made) or self.place.parent(),
            tags={"kind": "study", "study": study.name, "dataset": first.data_title},
            description=_story(self.study),
        )

    def _conclude(self, tracker: Tracker) -> None:
        files = outcome.conclude(self.study, self.place)
        for file in (*files, self.path):
            tracker.artifact(file)


def _story(study: Plan) -> str:
    methods = dict.fromkeys(cell.method for cell in study.cells)
    objectives = dict.fromkeys(str(cell.params.objective["name"]) for cell in study.cells)
    sparsities = sorted({cell.params.prune.sparsity for cell in study.cells})
    seeds = len({cell.params.seed for cell in study.cells})
    return (
        f"Study `{study.study.name}`: {', '.join(methods)} under {', '.join(objectives)} at sparsity "
        f"{', '.join(f'{s:g}' for s in sparsities)}, {seeds} seed{'s' * (seeds > 1)}. Its models are the runs below."
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No bars of single trainings beside the study's own."""
    before = os.environ.get("EPSD_QUIET", "")
    hush()
    try:
        yield
    finally:
        os.environ["EPSD_QUIET"] = before


def _serve(job: dict[str, Any]) -> None:
    """The work of one of several processes: cells until none is left. Their results are in the study's folder."""
    torch.set_num_threads(job["threads"])
    study = plan.load(Path(job["file"]))
    Queue(study, Place(study.study.name), job["storage"]).work(Session(**job["session"]))


if __name__ == "__main__":
    sys.exit(serve("study", _serve))
