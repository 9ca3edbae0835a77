"""What a score cannot see: weights without gradient, layers that start silenced, parameters outside every mask."""

import copy
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from epsd.compute import distributed
from epsd.masks import hidden, prunable, shortened
from epsd.pruning.scoring import calling, scoring

_WORTH_A_WORD = 0.1
"""Share of all parameters outside the mask that is told. Biases and norms are 1 to 5 % of a convolutional network."""


class BlindSpots(NamedTuple):
    """Names of prunable weights. `unused`: the output does not depend on them. `silent`: no gradient reaches them at
    the start. `zeros`: parameters that scale by zero, which is why.
    """

    unused: list[str]
    silent: list[str]
    zeros: list[str]

    def told(self) -> list[str]:
        """A sentence or two for each kind that there is."""
        because = f", as {shortened(self.zeros)} scale by zero: let those start at 1" if self.zeros else ": look there"
        unused = f"not in the mask nor in its count, as the output does not depend on it: {shortened(self.unused)}."
        silent = f"no gradient reaches {shortened(self.silent)} at the start{because}, or exclude these layers."
        return [told for names, told in ((self.unused, unused), (self.silent, silent)) if names]


def blind_spots(model: nn.Module, images: Tensor) -> BlindSpots:
    """What the gradient of the logits of `images` (B, C, H, W) says of every prunable weight.

    A weight that is used in one of train and eval mode is not unused. Nothing of `model` changes or is counted.
    """
    model = copy.copy(model)
    model._forward_hooks = OrderedDict()  # such as count what a score costs
    gradients = _gradients(model, images, train=True)
    if any(gradients[name] is None for name in prunable(model)):
        evaluated = _gradients(model, images, train=False)
        gradients = {name: evaluated[name] if g is None else g for name, g in gradients.items()}
    found = {name: gradients[name] for name in prunable(model)}
    silent = [name for name, g in found.items() if g is not None and not g.any()]
    zeros = [name for name, p in model.named_parameters() if _scales_by_zero(name, p, gradients.get(name))]
    return BlindSpots([name for name, g in found.items() if g is None], silent, zeros if silent else [])


def _gradients(model: nn.Module, images: Tensor, train: bool) -> dict[str, Tensor | None]:
    """Of a random sum of the logits, which no symmetry cancels: the sum of a batch's normalised values is constant."""
    with distributed.alone(), scoring(model, train):
        leaves = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}
        logits = calling(model, leaves)(images)
        if not logits.requires_grad:
            return dict.fromkeys(leaves)
        factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits)
        found = torch.autograd.grad((logits * factors).sum(), list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, found, strict=True))


def _scales_by_zero(name: str, parameter: Tensor, gradient: Tensor | None) -> bool:
    """A bias starts at zero, too, and silences nothing."""
    return "bias" not in name and not parameter.any() and gradient is not None and bool(gradient.any())


def uncovered(model: nn.Module) -> list[str]:
    """A sentence about the trainable parameters that are in no prunable layer, where they are not few."""
    inside = {id(p) for p in prunable(model).values()}
    for layer in hidden(model):  # of which was told
        inside |= {id(p) for p in model.get_submodule(layer).parameters()}
    outside = {
        name or "the network itself": sum(
            p.numel() for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in inside
        )
        for name, module in model.named_modules()
    }
    share = sum(outside.values()) / max(1, sum(p.numel() for p in model.parameters() if p.requires_grad))
    if share < _WORTH_A_WORD:
        return []
    ranked = sorted(outside, key=lambda name: -outside[name])
    largest = [name for name in ranked if 10 * outside[name] > outside[ranked[0]]]
    return [
        f"{share:.1%} of the parameters are neither of convolutions nor of linear layers nor of attention, so that no "
        f"mask covers them ({shortened(largest, 3)}): the sparsity is a share of the other {1 - share:.1%}."
    ]
