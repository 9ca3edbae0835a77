"""The search for the best small network: `epsd tune`, the only importer of optuna.

`space`: what may vary, checked before any work. `judge`: one trial, composed as the stages are, judged on validation.
`study`: the storage and the ledger of trials, whole whatever is killed. `worker`: one process that runs trials.
`search`: workers, progress, result. `report`: figures, tables, and the way back into params.yaml.
"""

from epsd.types import EpsdError


class TuningError(EpsdError):
    """A search that cannot be begun, gone on with, or finished."""
