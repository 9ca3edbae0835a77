"""Weights on a grid of 8 or 4 bits, in training as in the file that is deployed: quantisation-aware training.

Every pass rounds the weights of convolutions and linear layers; the gradient goes through as if nothing had been
rounded (straight-through: Bengio et al., 2013), so that the optimiser moves weights in full precision towards values
that rounding does not harm. The grid is that of `epsd.evaluation.deploy.quantise`: for each output channel w = q · s, q
a whole number of ±127 or ±7, s = max |w| / 127 or / 7. It is symmetric. So a zero stays a zero, and a BatchNorm behind
the layer, which multiplies whole channels by factors of either sign, changes s alone: the file holds the same q.

Activations are not rounded in training. `evaluate` finds their ranges afterwards, on training images, as for every
network: ranges that are learnt would be one more state, to be averaged over processes and kept in checkpoints.

The rounding is torch's own kernel, one forwards and one backwards. torchao's `IntxFakeQuantizer` gives the same numbers
by a dozen kernels, for matrices alone (`tests/compute/test_quantise.py` compares the two).
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from epsd.compute import networks
from epsd.masks import hidden, matrices

LEVELS = {8: 127, 4: 7}
"""Bits of a weight -> largest whole number on its grid."""


def check(model: nn.Module) -> None:
    """NetworkError where weights cannot be rounded: computed from others, in other than single precision, or of a
    transposed convolution, whose output channels are not its first dimension.
    """
    if computed := hidden(model):
        raise networks.NetworkError(
            f"train.quantise: the weight of '{computed[0]}' is computed from others (weight_norm, spectral_norm), so "
            "that it cannot be rounded: remove the parametrisation, or use null."
        )
    if (kind := networks.weight_type(model)) != torch.float32:
        raise networks.NetworkError(f"train.quantise: rounds weights of float32, these are {kind}: use null.")
    for name, module in model.named_modules():
        if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            raise networks.NetworkError(f"train.quantise: '{name}' is a transposed convolution: use null.")


def rounded(weight: Tensor, bits: int) -> Tensor:
    """`weight` (output channels, ...) on the grid of `bits` (8 or 4), differentiable as if it were itself."""
    with torch.no_grad():
        scale = weight.flatten(1).abs().amax(1).div(LEVELS[bits]).clamp(min=torch.finfo(weight.dtype).tiny)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -LEVELS[bits], LEVELS[bits])


def passed(net: nn.Module, images: Tensor, bits: int | None) -> object:
    """What `net` (a model, or what stands in for it) says of `images` with its weights rounded; None: as they are."""
    if bits is None:
        return net(images)
    return functional_call(net, {name: rounded(weight, bits) for name, weight in matrices(net).items()}, (images,))


@torch.no_grad()
def round_(model: nn.Module, bits: int) -> None:
    """Put the weights of `model` onto their grid, in place: what `passed` computes with."""
    for weight in matrices(model).values():
        weight.copy_(rounded(weight, bits))
