"""A search as a study of the engine: its sampler and pruner, and how it is begun, gone on with, or refused."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from epsd.engine import ledger as engine
from epsd.engine import storage as storages
from epsd.engine.grid import Values
from epsd.engine.ledger import DONE, Ledger, on_stale, values_of
from epsd.project.params import TuneParams
from epsd.project.runtime import project_root
from epsd.tuning import TuningError
from epsd.tuning.space import Space


def where(tune: TuneParams) -> str | Path:
    """The storage: `mlruns/optuna.journal` of the project where none is named."""
    return tune.storage or project_root() / "mlruns" / "optuna.journal"


def open_storage(tune: TuneParams) -> BaseStorage:
    """See `epsd.engine.storage.open_storage`."""
    return storages.open_storage(where(tune), tune.heartbeat, on_stale)


# --- samplers and pruners -------------------------------------------------------------------------------------------


class Race(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Stops a trial whose mean over the seeds so far is not in the best third of all that came as far.

    Step k of a trial is its mean over the first k seeds, which are the same for every trial: one in three goes on to
    the next seed, so that most of the work is spent on telling the good ones apart (as in racing, Maron and Moore
    1994, and successive halving with its usual reduction factor of 3). Of equals the first is ahead: accuracies on a
    small split are often equal, and would all go on. The first trials, and params.yaml, run to the end: the others
    need a measure.
    """

    START = 3
    REDUCTION = 3

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to stop `trial`, which has just reported."""
        step = trial.last_step
        if step is None or "origin" in trial.user_attrs:
            return False
        others = [
            other.intermediate_values[step]
            for other in study.get_trials(deepcopy=False)
            if step in other.intermediate_values and other.number != trial.number and other.state != TrialState.FAIL
        ]
        if len(others) < self.START:
            return False
        own, sign = trial.intermediate_values[step], 1 if study.direction == StudyDirection.MAXIMIZE else -1
        ahead = sum(sign * other >= sign * own for other in others)
        return bool(ahead >= math.ceil((len(others) + 1) / self.REDUCTION))


def sampler(tune: TuneParams, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of one worker. `seed`: of this worker in this session, or start-up points would come again."""
    seed %= 2**32
    startup = max(4, min(10, tune.trials // 4))
    match tune.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(
                n_startup_trials=startup, multivariate=True, group=True, constant_liar=True, seed=seed
            )
        case "gp":
            return optuna.samplers.GPSampler(n_startup_trials=startup, deterministic_objective=True, seed=seed)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, tune.trials // 4)), seed=seed)
        case _:  # a grid's points are laid down when the study is made
            return optuna.samplers.RandomSampler(seed=seed)


def pruner(tune: TuneParams, epochs: int) -> optuna.pruners.BasePruner:
    """What ends poor trials early: by the objective's curve over `epochs`, in a race by its means over the seeds."""
    if len(tune.objectives) > 1 or tune.pruner == "none":
        return optuna.pruners.NopPruner()
    if tune.pruner == "race":
        return Race()
    if tune.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=epochs // 5)
    return optuna.pruners.HyperbandPruner(min_resource=max(1, epochs // 9), max_resource=epochs, reduction_factor=3)


# --- begin and resume -----------------------------------------------------------------------------------------------


def begin(storage: BaseStorage, space: Space, data: str, trials: int, resume: bool) -> tuple[Ledger, bool]:
    """The ledger of the study that `space.tune` names, and whether this call made it.

    Parameters
    ----------
    data : digest of the prepared data set.
    trials : how many trials there shall be in all.
    resume : go on with a study of this name (or begin it); without, one that exists is an error.

    Raises
    ------
    TuningError : the study exists (without `resume`), or is of another space, other data or other parameters.
    """
    tune = space.tune
    points: list[Values | None] = list(space.grid()) if tune.sampler == "grid" else [None] * trials
    made = engine.open_study(storage, tune.study, list(tune.objectives.values()))
    ledger = Ledger(storage, tune.study)
    if not made:
        _go_on(ledger, space, data, trials, resume)
        return ledger, False
    if tune.current_first:
        points = [space.current(), *[point for point in points if point != space.current()]]
    points = points[:trials]
    for number, values in enumerate(points):
        origin = {"origin": "params.yaml"} if number == 0 and tune.current_first else {}
        ledger.add(number, values, **origin)
    ledger.write("trials", len(points))
    facts = {
        "signature": space.signature(),
        "base": space.base,
        "tune": tune.model_dump(by_alias=True, exclude_defaults=True),
        "data": data,
        "code": space.code(),
        "objectives": list(tune.objectives),
    }
    ledger.write("epsd", facts)
    return ledger, True


def _go_on(ledger: Ledger, space: Space, data: str, trials: int, resume: bool) -> None:
    name, known = space.tune.study, ledger.trials()
    if not resume:
        busy = [trial for trial in known if trial.state == TrialState.RUNNING and not ledger.abandoned(trial)]
        at_work = f" and is being worked on ({busy[0].user_attrs.get('owner', {}).get('host', '?')})" if busy else ""
        raise TuningError(
            f"study '{name}' is already in {storages.shown(where(space.tune))}, with {_count(known)} trials done"
            f"{at_work}. Go on with it, or join in: --resume. For a new one, give tune.study another name."
        )
    _compare(name, _facts(ledger), space, data)
    left: list[Values] = []
    if space.tune.sampler == "grid":
        alive = [trial for trial in known if trial.state != TrialState.FAIL]
        had = [values_of(trial) for trial in (*alive, *(trial for trial in known if "error" in trial.user_attrs))]
        left = [point for point in space.grid() if point not in had]
        trials = min(trials, len(alive) + len(left))
    ledger.write("trials", max(trials, _count(known)))
    points = iter(left)
    for number in ledger.missing(known):
        ledger.add(number, next(points, None))


def _count(trials: list[FrozenTrial]) -> int:
    return sum(trial.state in DONE for trial in trials)


def _facts(ledger: Ledger) -> dict[str, Any]:
    """What the study is of. A process that makes it right now may need a moment to say so."""
    if (found := ledger.awaited("epsd", storages.PATIENCE)) is None:
        name = ledger.study.study_name
        raise TuningError(f"study '{name}' was not made by `epsd tune`, or not to the end. Take another tune.study.")
    return dict(found)


def _compare(name: str, facts: Mapping[str, Any], space: Space, data: str) -> None:
    then, now = facts["signature"], json.loads(json.dumps(space.signature()))
    for part in ("space", "fixed", "objectives", "constraints", "params"):
        for key in sorted({*then[part], *now[part]}):
            if then[part].get(key) != now[part].get(key):
                place = key if part == "params" else f"tune.{part}.{key}"
                raise TuningError(
                    f"study '{name}' is another search: {place} was {then[part].get(key)!r} and is now "
                    f"{now[part].get(key)!r}. Give tune.study another name, or set it back."
                )
    if facts["data"] != data:
        raise TuningError(
            f"study '{name}' was made on other data than artifacts/data holds now. Give tune.study another name."
        )
    code = space.code()
    before = facts.get("code", code)
    if edited := [file for file in sorted({*before, *code}) if before.get(file) != code.get(file)]:
        raise TuningError(
            f"study '{name}' was made by other code: {', '.join(edited[:3])}{', ...' * (len(edited) > 3)} changed "
            "since. Give tune.study another name, or take back the change."
        )
