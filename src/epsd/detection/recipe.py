"""How a detector is trained: the settings, and the learning rate at each step."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a detector is trained: SGD, linear warm-up by steps, then a cosine to zero.

    `clip_norm`: largest gradient norm, None: no clipping. `flip`: mirror half of the pictures, drawn anew each epoch.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float | None = None
    warmup_steps: int = 0
    flip: bool = False

    @classmethod
    def fields(cls) -> set[str]:
        """The names of its settings, which are those of the section `detect` of params.yaml."""
        return {field.name for field in dataclasses.fields(cls)}

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at `step` of `steps`, from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
