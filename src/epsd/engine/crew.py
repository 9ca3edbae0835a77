"""The workers of one machine, and what a person sees of the work of all."""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Self

from epsd.engine import EngineError
from epsd.engine.ledger import DONE, Entry, Ledger, Trials, slot
from epsd.engine.storage import tolerant
from epsd.project.processes import Child, Stopped, end, not_outliving, signals_wait, start, stops
from epsd.project.progress import Progress
from epsd.project.runtime import counted, no_telemetry, note, quiet
from epsd.types import EpsdError

LEAVE_WITHIN = 30.0
"""Seconds that workers may take to put their trials back and end."""
ORPHAN_LEAVES_WITHIN = 10.0
"""Seconds that a worker may take after the end of the process that started it."""


def shares(asked: int, useful: int, threads: int | None) -> tuple[int, int, str]:
    """Workers to start of those asked for, threads of each, and both in words. `threads`: of all; None: every core."""
    import torch

    count = max(1, min(asked, useful))
    each = max(1, (threads or torch.get_num_threads()) // count)
    return count, each, f"{counted(count, 'worker')} with {counted(each, 'thread')} each"


class Crew:
    """So many processes of a module, each with a job; those that die are replaced. Ended with the block.

    job : of the worker of this number; the numbers of replacements go on.
    """

    def __init__(self, module: str, count: int, job: Callable[[int], dict[str, Any]]) -> None:
        self._module, self._count, self._job = module, count, job
        self._running: list[Child] = []
        self._started = self._crashes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end(self._running, LEAVE_WITHIN)

    def busy(self) -> bool:
        """Whether any is at work."""
        return any(child.poll() is None for child in self._running)

    def keep(self, wanted: int) -> None:
        """See that as many as can be used are at work. Raises EngineError where they die one after the other."""
        for child in [child for child in self._running if child.poll() is not None]:
            self._running.remove(child)
            self._crashes += child.returncode != 0
        if self._crashes > 3 * self._count + 3:
            raise EngineError(f"{self._crashes} workers died one after the other; their last words are above.")
        while len(self._running) < min(self._count, wanted):
            command, environment = [sys.executable, "-m", self._module], {**os.environ, "EPSD_QUIET": "1"}
            with signals_wait():  # or one just begun would be forgotten
                self._running.append(start(command, environment, self._job(self._started)))
            self._started += 1


class Board(Progress):
    """How the work goes: a bar on a terminal, a line for each finished trial elsewhere.

    told : one finished trial in a few words. beside : what stands beside the count, of all trials.
    """

    def __init__(
        self, title: str, ledger: Ledger, told: Callable[[Entry], str], beside: Callable[[Trials], list[str]]
    ) -> None:
        self._title, self._ledger, self._told, self._beside = title, ledger, told, beside
        trials = ledger.trials()
        self._seen = {trial.number for trial in trials if trial.state.is_finished()}
        self._total = len(ledger.slots)
        self.done = self._before = self._total - len(ledger.open_slots(trials))
        self._begun, self._lines = time.monotonic(), not quiet() and not sys.stderr.isatty()
        super().__init__(title, self._total, self.done, time_left=False)

    def show(self, trials: Trials) -> None:
        """Count what is new, and say it."""
        mine = [trial for trial in trials if slot(trial) in self._ledger.slots]
        new = [trial for trial in mine if trial.state.is_finished() and trial.number not in self._seen]
        beside = self._beside(trials)
        for trial in sorted(new, key=lambda trial: str(trial.datetime_complete)):
            self._seen.add(trial.number)
            if trial.state in DONE:
                self.done += 1
                self.step()
            if self._lines:
                told = "; ".join([self._told(trial), *beside, *self._left()])
                note(f"{self._title}: {self.done}/{self._total} {told}")
        self.say(", ".join([*beside, *self._left()]))

    def _left(self) -> list[str]:
        """Time that the other trials may take, at the pace so far; nothing before the first is done."""
        done, todo = self.done - self._before, self._total - self.done
        if not done or todo <= 0:
            return []
        minutes, seconds = divmod(round((time.monotonic() - self._begun) / done * todo), 60)
        return [f"{minutes}:{seconds:02d} left"]


def oversee(
    ledger: Ledger, crew: Crew, board: Board, wanted: Callable[[Trials], int], over: Callable[[Trials], bool]
) -> None:
    """Have the crew work until `over`; at most as many workers as `wanted`. What they leave is put back at once."""
    try:
        with board, crew:
            for trials in ledger.rounds():
                board.show(trials)
                if over(trials):
                    return
                crew.keep(wanted(trials))
                ledger.rest()
    finally:
        with signals_wait(), tolerant():
            ledger.repair()


def serve(name: str, work: Callable[[dict[str, Any]], None]) -> int:
    """The life of one worker: its job from stdin, the work, and an exit status that says how it ended."""
    job = json.loads(sys.stdin.read())
    no_telemetry()
    warnings.simplefilter("ignore")  # of a trial's own choices: layers left without weights, and the like
    try:
        with stops(), not_outliving(leave_within=ORPHAN_LEAVES_WITHIN):
            work(job)
    except Stopped as stop:
        return stop.status
    except EpsdError as error:
        note(f"{name}: {error}")
        return 1
    return 0
