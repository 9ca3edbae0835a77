"""Magnitude at initialisation: the larger weight stays. A baseline; it collapses to chance past 90 % on ResNet-18."""

from collections.abc import Iterable
from typing import ClassVar

from torch import nn

from epsd.masks import prunable
from epsd.registry import variant
from epsd.types import Batch, Objective, Scores


@variant
class Magnitude:
    """|w|, without data."""

    follows_objective: ClassVar[bool] = False
    follows_data: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws nothing."""
        return {name: weight.detach().abs() for name, weight in prunable(model).items()}
