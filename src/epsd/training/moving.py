"""Masks that move while a network trains under them: what a static mask from before training is compared with.

`fit` asks after the gradient of every step, by the step's number alone, so that a resumed training moves it
at the same steps. Gradients come dense, also of weights that are removed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field
from torch import Tensor

from epsd.masks import Mask, highest
from epsd.project.settings import Count
from epsd.registry import variant

Shares = Annotated[float, Field(ge=0, le=1)]


class Moving(Protocol):
    """When and how a mask moves.

    `instead_of_step` : a step at which it moves trains no weight.
    """

    instead_of_step: ClassVar[bool]

    def moved(
        self, mask: Mask, step: int, steps: int, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> Mask | None:
        """The mask from `step` (of `steps`, from 0) on, None where it stays. A weight that comes back starts at 0."""


@variant
class Gradual:
    """Gradual magnitude pruning (Zhu & Gupta 2017): sparsity s · (1 − (1 − t)³), t from 0 to 1 between two shares of
    the training; the smallest weights go, what is gone stays gone.

    start, end : shares of the steps. Defaults 0 and 0.75: the last quarter trains the final mask, as RigL's does.
    every : steps between two removals. Default 100 (theirs: 100 to 1,000).
    """

    start: Shares = 0.0
    end: Shares = 0.75
    every: Count = 100

    def share(self, step: int, steps: int) -> float | None:
        """How far the final sparsity is reached at `step`; None where nothing is removed."""
        first = round(self.start * steps)
        last = max(first, min(round(self.end * steps), steps - 1))
        if not first <= step <= last or ((step - first) % self.every and step != last):
            return None
        return 1 - (1 - (step - first) / (last - first)) ** 3 if step < last else 1.0


@dataclass(frozen=True)
class Removing:
    """`Gradual` to `sparsity`; `selection`: scope and the like, of `Mask.from_scores`."""

    schedule: Gradual
    sparsity: float
    selection: Mapping[str, Any] = field(default_factory=dict)

    instead_of_step: ClassVar[bool] = False

    def moved(
        self, mask: Mask, step: int, steps: int, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> Mask | None:
        """By magnitude alone."""
        share = self.schedule.share(step, steps)
        if not share:
            return None
        # on the exponential way of `Mask.from_scores`, the sparsity wanted now lies here
        progress = 1.0 if share == 1 else math.log1p(-share * self.sparsity) / math.log1p(-self.sparsity)
        magnitudes = {name: weight.detach().abs() for name, weight in weights.items()}
        return Mask.from_scores(magnitudes, self.sparsity, **self.selection, within=mask, progress=progress)


@variant
class RigL:
    """RigL (Evci et al., ICML 2020): in every layer the smallest weights go, and as many of the largest gradient come.

    every : ΔT, steps between two moves. Default 100.  share : α, of a layer's kept weights that move at first, then
        α/2 · (1 + cos(π t / T_end)). Default 0.3.  end : T_end as a share of the steps. Default 0.75. All theirs.

    As in the official code a step that moves trains nothing, a weight just removed may come back with its value, and
    others start at 0 without momentum.
    """

    every: Count = 100
    share: Shares = 0.3
    end: Shares = 0.75

    instead_of_step: ClassVar[bool] = True

    def moved(
        self, mask: Mask, step: int, steps: int, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> Mask | None:
        """Every layer keeps as many weights as it has."""
        last = self.end * steps
        if step == 0 or step % self.every or step >= last:
            return None
        share = self.share / 2 * (1 + math.cos(math.pi * step / last))
        return Mask({name: _moved(keep, weights[name], gradients[name], share) for name, keep in mask.keep.items()})


def _moved(keep: Tensor, weight: Tensor, gradient: Tensor, share: float) -> Tensor:
    count = int(keep.sum())
    moving = int(share * count)
    alive = keep.flatten().to(weight.device)
    stay = highest(weight.detach().flatten().abs().masked_fill(~alive, -1), count - moving)
    come = highest(gradient.detach().flatten().abs().masked_fill(stay, -1), moving)
    return (stay | come).view(keep.shape).cpu()
