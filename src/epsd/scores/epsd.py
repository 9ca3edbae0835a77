"""EPSD: keep what matters to the self-distillation loss a few steps ahead (Chen et al., AAAI 2024)."""

from collections.abc import Iterable

from torch import nn

from epsd.pruning.look_ahead import LookAhead, look_ahead_scores
from epsd.pruning.scoring import Following
from epsd.registry import variant
from epsd.types import Batch, Objective, Scores


@variant
class Epsd(LookAhead):
    """|∂L_SD(θ_i)/∂m| / Σ: the effect of each weight on the run's own objective after `steps` SGD steps on that
    objective.

    The paper gives the criterion and "a small number" of steps; where it is silent (steps, learning rate, whether
    the label loss belongs to L_SD) the defaults are ProsPr's, on whose procedure EPSD builds, and L_SD is the whole
    training loss.
    """

    def __call__(self, model: nn.Module, batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws `steps` + 1 batches with what the objective needs."""
        return look_ahead_scores(model, Following(objective), batches, self, "epsd")
