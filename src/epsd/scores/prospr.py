"""ProsPr: prospect pruning (Alizadeh et al., ICLR 2022; official code mil-ad/prospr)."""

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from epsd.pruning.look_ahead import LookAhead, look_ahead_scores
from epsd.pruning.scoring import of_labels
from epsd.registry import variant
from epsd.types import Batch, Objective, Scores


@variant
class ProsPr(LookAhead):
    """|∂L_CE(θ_i)/∂m| / Σ: EPSD's procedure under cross entropy, whatever the run trains with ("simple combination").

    Official behaviour: `detach_first_step: true` where momentum is not 0. The mask rule differs by design: the
    official one keeps ceil(N · (1 − s)) evaluated in floating point, one weight too many at some sparsities; here
    exactly N − round(s · N) remain.
    """

    follows_objective: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws `steps` + 1 batches; of the objective a plain loss alone counts (`scoring.of_labels`)."""
        return look_ahead_scores(model, of_labels(objective), batches, self, "prospr")
