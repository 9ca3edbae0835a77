"""Random pruning with a density per layer: the control that every claim about pruning at initialisation needs."""

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from epsd.masks import erk_factor, prunable
from epsd.registry import variant
from epsd.types import Batch, Objective, Scores


@variant
class Random:
    """Random weights of every layer survive; how many, `distribution` says.

    distribution : "uniform" (default): the same density in every layer. "erk": Erdős-Rényi-Kernel (Mocanu et al.
        2018, Evci et al. 2020), density min(1, ε · (n_in + n_out + k_h + k_w) / (n_in · n_out · k_h · k_w)),
        recommended for random pruning by Liu et al. (ICLR 2022).

    Both come out at any global sparsity: within a layer of n weights and factor f the scores are f / u, u a random
    permutation of (j + ½)/n, so that the share above a threshold τ is min(1, f/τ).
    """

    distribution: Literal["uniform", "erk"] = "uniform"

    follows_objective: ClassVar[bool] = False
    follows_data: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws nothing. The random numbers follow from the global random state, which is left as it was."""
        with torch.random.fork_rng(devices=[]):
            return {name: self._layer(weight) for name, weight in prunable(model).items()}

    def _layer(self, weight: Tensor) -> Tensor:
        n = weight.numel()
        ranks = (torch.randperm(n).double() + 0.5) / n
        factor = erk_factor(weight.shape) if self.distribution == "erk" else 1.0
        return (factor / ranks).view(weight.shape).to(weight.device)
