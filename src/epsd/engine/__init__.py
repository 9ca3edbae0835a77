"""Many trainings, handed out through Optuna's storage: the trials of `epsd tune`, the cells of `epsd study`.

`storage`: a journal file, or a database for several machines. `ledger`: what is to be done, who is at it, what is done,
whole whatever is killed. `crew`: the workers of one machine and what is shown of them. `grid`: all points of a grid.

Of Optuna are the storages, their atomic change of a trial's state, heartbeats and the search for stale trials, trials
with fixed parameters (`enqueue_trial`), samplers and pruners. By hand is what it has no means for:

* Taking a trial. `Study.ask` (and `optimize`) makes one up where none waits, and `MaxTrialsCallback` counts only what
  has ended: with n workers up to n - 1 more trials than asked for are run, and a study's cells are these and no others.
  Nor can a worker choose: cells that share a scoring go to the process that has it.
* Signs of life. `Study.optimize` alone sends them, from a thread that the first outage of the database ends.
* Trying again. A journal knows no heartbeats, so on one machine the process number says who is gone, at once.
  `RetryHeartbeatStaleTrialCallback` hands the dead worker's attributes on to the new trial, whose owner then looks
  dead, and gives a slot up after `max_retry` times.
* Laying down a grid. `GridSampler` lets two workers take one point, and each point has all parameters, also those that
  the chosen variant lacks.
"""

from epsd.types import EpsdError


class EngineError(EpsdError):
    """Work that cannot be handed out or goes nowhere."""
