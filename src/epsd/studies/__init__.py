"""Grids of trained models and what came of them: `epsd study FILE`.

`plan`: the study file, checked, and every cell (one model to train) with its parameters. `procedures`: how a cell is
turned into a trained model; `procedures/pipeline.py` is the default, and another one is one file and one line there.
`work`: a cell, its identity, training and result. `queue`: who trains which, on one machine or several, whole whatever
is killed. `run`: workers, progress. `outcome`: table and figures.
"""

from epsd.types import EpsdError


class StudyError(EpsdError):
    """A study that cannot be begun or finished."""
