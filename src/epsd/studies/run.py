"""`epsd study FILE`: checks everything, trains what is missing in one or more processes, ends with table and figure."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from epsd.project import artifacts
from epsd.project.processes import Stopped, end, start
from epsd.project.progress import Progress
from epsd.project.runtime import no_telemetry, note, quiet
from epsd.studies import StudyError, outcome, plan
from epsd.studies.plan import Cell, Plan
from epsd.studies.work import Place, Result, Session, mark, work
from epsd.tracking import Tracker, track

POLL = 0.3
"""Seconds between two looks at the results of other processes."""
LEAVE_WITHIN = 20.0
"""Seconds that a worker may take to end before it is ended."""


class Request(NamedTuple):
    """What the command line asked for. `minutes`: begin no cell after this long; `show`: only list the cells."""

    file: str
    workers: int = 1
    minutes: float | None = None
    show: bool = False


def command(request: Request) -> int:
    """`epsd study`: the exit status is 0 when all cells are done, 1 when some are left or failed, 130 after Ctrl-C.

    Raises ParamsError for a file or a cell that is not right, before any work; StudyError where nothing is finished.
    """
    path = plan.find(request.file)
    study = plan.load(path)
    place = Place(study.study.name)
    if request.show:
        _show(study, place)
        return 0
    no_telemetry()
    return _Study(path, study, place, request).run()


def _show(study: Plan, place: Place) -> None:
    for cell in study.cells:
        done = False
        if place.prepared(cell.params, study.split_seed):
            done = place.result(mark(cell, place.data(cell.params, study.split_seed))) is not None
        print(f"{'done' if done else 'to do'}  {cell}")


class _Study:
    """One `epsd study` at work."""

    def __init__(self, path: Path, study: Plan, place: Place, request: Request) -> None:
        self.path, self.study, self.place, self.request = path, study, place, request
        now = time.time()
        self.session = Session(now, None if request.minutes is None else now + 60 * request.minutes)
        self.marks = {mark(cell, place.data(cell.params, study.split_seed)): cell for cell in study.cells}
        self.failed: dict[str, str] = {}
        self.seen = {own for own in self.marks if place.result(own)}
        self.workers = max(1, min(request.workers, len(self.marks) - len(self.seen)))
        cores = study.cells[0].params.threads or torch.get_num_threads()
        self.threads = max(1, cores // self.workers)
        self.lines = not quiet() and not sys.stderr.isatty()

    def run(self) -> int:
        name, left = self.study.study.name, len(self.marks) - len(self.seen)
        with self._tracked() as tracker:
            artifacts.write_json(self.place.folder / "run.json", {"run_id": tracker.run_id})
            if not quiet():
                print(f"study: '{name}': {self._plan(left)}", flush=True)
            stopped = self._work() if left else 0
            left = len(self.marks) - len(self.seen)
            tracker.tags({"study.state": "unfinished" if left else "complete"})
            tracker.metrics({"study/cells": len(self.marks), "study/done": len(self.seen)})
            if self.seen and not stopped:
                self._conclude(tracker)
        if self.failed:
            own, reason = next(iter(self.failed.items()))
            note(f"study: {len(self.failed)} cells failed, the first one {self.marks[own]}: {reason}")
        if left:
            note(f"study: {len(self.seen)} of {len(self.marks)} cells are done. `epsd study {self.path}` goes on.")
        return stopped or int(left > 0)

    def _plan(self, left: int) -> str:
        done = f" ({len(self.seen)} done)" if self.seen else ""
        data = self.place.data(self.study.cells[0].params, self.study.split_seed)
        how = f"{self.workers} worker{'s' * (self.workers > 1)} with {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{left} of {len(self.marks)} models to train{done}, data {data.digest[:8]}, {how}"

    # --- the work ---

    def _work(self) -> int:
        """The exit status of a stop, 0 where there was none."""
        with Progress("study", len(self.marks), len(self.seen), time_left=False) as self.bar:
            try:
                if self.workers == 1:
                    self._alone()
                else:
                    self._together()
            except Stopped as stop:
                note(f"study: {stop}; finished cells are kept, a cell under way goes on from its last epoch.")
                return stop.status
        return 0

    def _alone(self) -> None:
        torch.set_num_threads(self.threads)
        with _quietly():
            work(self.study, self.place, self.session, self._done)

    def _done(self, cell: Cell, came: Result | str) -> None:
        own = next(own for own, other in self.marks.items() if other is cell)
        if isinstance(came, str):
            self.failed[own] = came
            self._say(f"{cell} failed: {came}")
            return
        self.seen.add(own)
        self.bar.step()
        metric = self.study.study.metric
        value = f"{metric} {came.metrics[metric]:.4f}" if metric in came.metrics else f"no {metric}"
        self._say(f"{len(self.seen)}/{len(self.marks)} {cell}: {value} ({came.seconds:.1f} s)")

    def _say(self, text: str) -> None:
        self.bar.say(text)
        if self.lines:
            note(f"study: {text}")

    def _together(self) -> None:
        job = {"file": str(self.path), "threads": self.threads, "session": asdict(self.session)}
        command, environment = [sys.executable, "-m", "epsd.studies.worker"], {**os.environ, "EPSD_QUIET": "1"}
        running = [start(command, environment, job) for _ in range(self.workers)]
        try:
            while any(process.poll() is None for process in running):
                self._collect()
                time.sleep(POLL)
            self._collect()
        finally:
            end(running, LEAVE_WITHIN)
        if all(process.returncode for process in running):
            raise StudyError("every worker ended with an error; their last words are above.")

    def _collect(self) -> None:
        """What the workers have finished since the last look."""
        for own, cell in self.marks.items():
            if own in self.seen or own in self.failed:
                continue
            if came := self.place.result(own) or self.place.failure(own, self.session.since):
                self._done(cell, came)

    # --- its run in MLflow ---

    def _tracked(self) -> contextlib.AbstractContextManager[Tracker]:
        first, study = self.study.cells[0].params, self.study.study
        return track(
            "study",
            experiment=first.tracking.experiment,
            name=f"study-{study.name}",
            run_id=self.place.parent(),
            tags={"kind": "study", "study": study.name, "dataset": first.dataset["name"]},
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
    before = os.environ.get("EPSD_QUIET")
    os.environ["EPSD_QUIET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["EPSD_QUIET"]
        else:
            os.environ["EPSD_QUIET"] = before
