"""Do two criteria choose the same weights? Overlap of masks, beside what chance alone would give."""

from collections.abc import Sequence

import torch
from torch import Tensor

from epsd.masks import Mask


def measured(masks: Sequence[Mask]) -> Tensor:
    """(M, M) float64: Jaccard overlap |A ∩ B| / |A ∪ B| of the surviving weights of each pair."""
    return torch.tensor([[one.jaccard(other) for other in masks] for one in masks], dtype=torch.float64)


def expected(masks: Sequence[Mask]) -> Tensor:
    """(M, M) float64: overlap of independent random masks that have, layer by layer, the densities of each pair.

    With densities a and b of a layer of n weights, a·b·n weights are expected in both and (a + b − a·b)·n in either;
    the ratio of the sums over layers is the limit of the expected overlap for many weights. The diagonal is that of
    two random masks of the same layer densities, not 1: what agreement of the densities alone is worth.
    """
    return torch.tensor([[_by_chance(one, other) for other in masks] for one in masks], dtype=torch.float64)


def _by_chance(one: Mask, other: Mask) -> float:
    layers, others = one.per_layer(), other.per_layer()
    both = sum(kept * others[name][0] / total for name, (kept, total) in layers.items())
    either = sum(kept + others[name][0] for name, (kept, _) in layers.items()) - both
    return both / either if either else 1.0


def uniform(density: float) -> float:
    """Expected overlap of two independent random masks of that density everywhere: d² / (2d − d²) = d / (2 − d)."""
    return density / (2 - density)
