"""SynFlow: synaptic flow, without data (Tanaka et al., NeurIPS 2020; official code ganguli-lab/Synaptic-Flow)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from epsd.masks import prunable
from epsd.metagradients import calling, draw, scoring
from epsd.registry import variant
from epsd.types import Batch, Objective, Scores


@variant
class SynFlow:
    """|w| ⊙ ∂R/∂|w|, R the summed output of the net with every parameter and buffer replaced by its absolute value,
    for one image of ones.

    Use `prune.rounds: 100`, as the paper does (the official command line defaults to 1). In eval mode, so BatchNorm
    stays at its initial statistics. Computed in double precision: single precision over- or underflows in deep nets
    (official issue).
    """

    def __call__(self, model: nn.Module, batches: Iterable[Batch], objective: Objective) -> Scores:
        """Draws one batch, for the shape of an image alone."""
        names = list(prunable(model))
        if not names:
            return {}
        device = next(model.parameters()).device
        image = draw(batches, 1, "score synflow", device)[0].images[:1]
        with scoring(model, train=False):
            weights = {n: p.detach().double().abs().requires_grad_() for n, p in model.named_parameters()}
            flow = _flow(model, weights, torch.ones_like(image, dtype=torch.float64))
            gradients = torch.autograd.grad(flow, [weights[name] for name in names], materialize_grads=True)
        return {name: (weights[name].detach() * g).abs() for name, g in zip(names, gradients, strict=True)}


def _flow(model: nn.Module, weights: dict[str, Tensor], image: Tensor) -> Tensor:
    buffers = {n: b.double().abs() if b.is_floating_point() else b for n, b in model.named_buffers()}
    return calling(model, {**weights, **buffers})(image).sum()
