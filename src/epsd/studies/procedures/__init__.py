"""How a cell becomes a trained model: one file and one line each. `procedure.name` of a study file picks one.

To add one, write `procedures/NAME.py` with a `@variant` subclass of `Procedure` (its fields are its settings, given in
the study file as `procedure: {name: NAME, setting: ...}` and logged as `procedure.setting`) that has

* `__call__(params, data, desk) -> Trained`: train with `params` (whole and checked) on `data`. Work that outlives a
  kill goes to files under `desk.folder` (`desk.folder / "last.safetensors"` with `mark=desk.mark` as the checkpoint of
  `epsd.training.fit.fit`, other names for further trainings); the same call then goes on from there. Per-epoch figures
  go to `desk.log(record)`. Never read the test split: it is evaluated afterwards, for every procedure alike.
* where need be, `check(params)`: raises for parameters that it cannot work with, before any cell is trained;
  `story(params, data)`: what the run was, in plain words.
* `shares(params)`: what several cells may share, as a plain mapping, None for nothing. Cells with equal mappings run
  one after the other in one process, and `desk.shared(make)` calls `make` for the first of them only.

and add it to PROCEDURES below. Nothing else: the study file, resuming, workers, MLflow, `epsd compare` and the final
table pick it up. A study names it for all cells (`procedure:`) or for one method (`variants: [{procedure: ...}]`).
"""

from epsd.studies.procedures.concurrent import Concurrent
from epsd.studies.procedures.pipeline import Pipeline
from epsd.studies.procedures.prune_then_distill import PruneThenDistill
from epsd.studies.procedures.rigl import RigL
from epsd.studies.procedures.types import Desk, Procedure, Trained

PROCEDURES: dict[str, type[Procedure]] = {
    "pipeline": Pipeline,
    "prune_then_distill": PruneThenDistill,
    "concurrent": Concurrent,
    "rigl": RigL,
}

__all__ = ["PROCEDURES", "Desk", "Procedure", "PruneThenDistill", "Trained"]
