"""Dynamic sparse training: as sparse as any other from the start, but with a mask that moves (RigL)."""

from epsd.data.prepared import Prepared
from epsd.pipeline.prune import pruned
from epsd.project.params import Params
from epsd.registry import variant
from epsd.studies.procedures.types import Desk, Procedure, Trained, finished
from epsd.training import moving


@variant
class RigL(moving.RigL, Procedure):
    """RigL from the mask of `prune`, under the run's objective. Theirs starts from random weights of ERK densities:
    `prune.score: {name: random, distribution: erk}`.
    """

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        """As the pipeline trains, but under a mask that moves."""
        return finished(params, data, pruned(params, data), desk, self)

    def story(self, params: Params, data: Prepared) -> str:
        """In plain words."""
        told = super().story(params, data)
        return f"{told} The mask moved every {self.every} steps of the first {self.end:.0%} (RigL)."
