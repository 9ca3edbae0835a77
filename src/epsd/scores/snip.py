"""SNIP: connection sensitivity (Lee et al., ICLR 2019; official code namhoonlee/snip-public)."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import nn

from epsd.masks import prunable
from epsd.project.settings import Count
from epsd.pruning.metagradients import mask_gradient
from epsd.pruning.scoring import draw, normalised, of_labels, scoring
from epsd.registry import variant
from epsd.types import Batch, Objective, Scores


@variant
class Snip:
    """|w ⊙ Σ_b ∂L_CE/∂w| / Σ over `batches` batches, for the very weights that will be trained.

    The official code also masks biases, re-draws weights after scoring and adds weight decay to the loss; known
    ports re-initialise the scoring copy. None of that is done here.

    batches : [1, ...) batches whose mean losses are added. Default 1 (official).
    mode : "train" (default: BatchNorm by batch statistics, as an untrained net has no others) or "eval"
        (Synaptic-Flow's default).
    """

    batches: Count = 1
    mode: Literal["train", "eval"] = "train"

    follows_objective: ClassVar[bool] = False
    derivative: ClassVar[bool] = True

    def __call__(self, model: nn.Module, batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws `batches` batches; of the objective a plain loss alone counts (`scoring.of_labels`)."""
        names = list(prunable(model))
        if not names:
            return {}
        device = next(model.parameters()).device
        drawn = draw(batches, self.batches, f"score snip with batches={self.batches}", device)
        with scoring(model, self.mode == "train"):
            each = [mask_gradient(model, of_labels(objective), [batch], names).gradient for batch in drawn]
        return normalised({name: torch.stack([g[name] for g in each]).sum(0) for name in names})
