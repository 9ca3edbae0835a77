"""The stages prune and train in memory: score, select, self-distil. Scores are shared over sparsities and controls."""

import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from epsd.data.prepared import Prepared
from epsd.pipeline.prune import Pruned, Scored, pruned, scored, scoring_key, selection
from epsd.project.params import Params
from epsd.registry import variant
from epsd.studies.procedures.types import Desk, Procedure, Trained, dense, finished
from epsd.training import result


@variant
class Pipeline(Procedure):
    """EPSD's own: prune at initialisation, then train what is left. No settings beside params.yaml's.

    `mask/seconds` and `cost/...` of cells that share a scoring include that one scoring whole, as without sharing.
    """

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        """As the stages do it, without files. At sparsity 0 nothing is scored."""
        begun = time.perf_counter()
        found = self._pruned(params, data, desk)
        seconds = {"time/prune": time.perf_counter() - begun}
        made = finished(params, data, found, desk)
        best = result.chosen(result.kept(made.history, "best")) if params.train.keep == "best" else {}
        return made._replace(figures={**made.figures, **seconds, **best})

    def shares(self, params: Params) -> Mapping[str, Any] | None:
        """One scoring, which gives masks of any sparsity; where later rounds score again, the mask they end in."""
        prune = params.prune
        if prune.structure != "weights" or prune.sparsity == 0:
            return None
        return scoring_key(params) | ({"rounds": prune.rounds, **selection(params)} if prune.rounds > 1 else {})

    def _pruned(self, params: Params, data: Prepared, desk: Desk) -> Pruned:
        if params.prune.sparsity == 0 and params.prune.structure == "weights":
            return dense(params, data)
        if self.shares(params) is None:
            return pruned(params, data)
        return pruned(params, data, desk.shared(lambda: _known(params, data)))


def _known(params: Params, data: Prepared) -> Scored | Pruned:
    if params.prune.rounds == 1:
        return scored(params, data)
    found = pruned(params.pruning(control="none"), data)
    return found._replace(model=nn.Identity(), scores=None)  # training changes it: each gets its own
