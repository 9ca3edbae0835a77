"""Grids of trained models and what came of them: `epsd study FILE`.

`plan`: the study file, checked, and every cell (one model to train) with its parameters. `procedures`: how a cell is
turned into a trained model; `procedures/pipeline.py` is the default, and another one is one file and one line there.
`work`: cells that are not done yet, one after the other, whole whatever is killed. `run`: data, workers, progress,
result. `compare`: the table over recorded runs. `report`: how a table is written.
"""

from epsd.types import EpsdError


class StudyError(EpsdError):
    """A study that cannot be begun or finished."""
