"""Dynamic sparse training: as sparse as any other from the start, but with a mask that moves (RigL)."""

from collections.abc import Mapping
from typing import Any

from epsd.data.prepared import Prepared
from epsd.pipeline import describe
from epsd.pipeline.prune import pruned
from epsd.project.params import Params
from epsd.registry import variant
from epsd.studies.procedures.types import Desk, Trained, trained_under
from epsd.training import moving


@variant
class RigL(moving.RigL):
    """RigL from the mask of `prune`, under the run's objective. Theirs starts from random weights of ERK densities:
    `prune.score: {name: random, distribution: erk}`.
    """

    def check(self, params: Params) -> None:
        """Every checked parameter file works."""

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        """As the pipeline trains, but under a mask that moves."""
        found = pruned(params, data)
        return trained_under(params, data, found.model, found.mask, desk, self, found.report)

    def shares(self, params: Params) -> Mapping[str, Any] | None:
        """Nothing."""
        return None

    def story(self, params: Params, data: Prepared) -> str:
        """In plain words."""
        told = describe.story(params, data)
        return f"{told} The mask moved every {self.every} steps of the first {self.end:.0%} (RigL)."
