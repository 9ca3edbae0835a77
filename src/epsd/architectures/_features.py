"""What the variants share: trying a network on one image, and finding where it has feature maps."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from epsd.compute.networks import evaluated, hooked
from epsd.types import EpsdError

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)
_FIXED = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
TRUNKS = ("features", "trunk_output", "layers", "stages", "blocks")


class ArchitectureError(EpsdError):
    """A network that cannot take these images, or that has no feature maps for a detector."""


def try_on(model: nn.Module, image_shape: tuple[int, int, int], name: str, hint: str) -> nn.Module:
    """`model` itself, after one image (C, H, W) of zeros has passed through it; buffers and mode untouched.

    Raises ArchitectureError naming the network and `hint` where the image does not fit (too small, wrong multiple).
    """
    try:
        evaluated(model, torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        channels, height, width = image_shape
        reason = " ".join(str(error).split())[:160]
        raise ArchitectureError(
            f"architecture: '{name}' cannot take images of {channels}x{height}x{width} ({hint}; {reason})."
        ) from None
    return model


def wake_(model: nn.Module) -> nn.Module:
    """`model`, its convolution and linear layers that start at zero drawn as torch draws such layers by default, and
    its normalisations that scale by zero at the start at 1.

    Vision transformers start with a classifier of zeros, timm's ResNets with the last norm of every block at zero.
    Nothing that is pruned at initialisation may: scores multiply by the initial weights and by the gradients that come
    through the norms, so that such a layer, or the branch before such a norm, would lose all its weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and not module.weight.any():
            module.reset_parameters()
        elif isinstance(module, _NORMS) and module.weight is not None and not module.weight.any():
            nn.init.ones_(module.weight)
    return model


def _shapes(model: nn.Module, names: list[str], image: Tensor) -> dict[str, torch.Size]:
    """Output shape of each named submodule that gave one tensor, in the order of the forward pass."""
    found: dict[str, torch.Size] = {}

    def noting(name: str) -> tuple[nn.Module, Callable[..., None]]:
        def note(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor):
                found[name] = output.shape

        return model.get_submodule(name), note

    with hooked(map(noting, names)):
        evaluated(model, image)
    return found


def blocks(model: nn.Module) -> list[str]:
    """The direct children of a network, with those of its trunk (`features`, `stages`, ...) instead of the trunk."""
    names: list[str] = []
    for name, child in model.named_children():
        names += [f"{name}.{inner}" for inner, _ in child.named_children()] if name in TRUNKS else [name]
    return names


def last_of_each_size(model: nn.Module, names: list[str], side: int = 224) -> list[str]:
    """The last of `names` at each resolution from stride 2 on, fine to coarse, while the maps get smaller.

    A square image of `side` px is passed through. Only square outputs (1, C, h, h) with h >= 2 count as maps: tokens
    (1, N, C) do not, nor do channels-last maps or what follows the global pooling. Nor does a pooling to a fixed size
    (before the classifier of VGG), whose output does not grow with the picture.
    """
    nodes: dict[int, str] = {}
    convolution = first_convolution(model)[1]
    image = torch.zeros(1, convolution.in_channels, side, side, device=convolution.weight.device)
    names = [name for name in names if not isinstance(model.get_submodule(name), _FIXED)]
    for name, shape in _shapes(model, names, image).items():
        if len(shape) == 4 and shape[2] == shape[3] and 2 <= shape[3] <= min(nodes, default=side // 2):
            nodes[shape[3]] = name
    return list(nodes.values())


def pyramid(model: nn.Module, name: str) -> list[str]:
    """The nodes of a network from a zoo. Raises ArchitectureError where there is no pyramid of feature maps.

    A ViT is built for one size and may refuse the trial image: it has no pyramid to offer either.
    """
    try:
        nodes = last_of_each_size(model, blocks(model))
    except (RuntimeError, ValueError, AssertionError, StopIteration):
        nodes = []
    if len(nodes) < 2:
        raise ArchitectureError(
            f"architecture: '{name}' has no pyramid of feature maps (B, C, H, W), so it cannot carry a detector. It "
            "prunes, trains and evaluates; for detection choose a convolutional network (resnet, vgg, mobilenet, ...)."
        )
    return nodes


def first_convolution(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """Name and module of the convolution that sees the image."""
    return next((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def adapt_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution in place by one for `channels` input channels (Kaiming normal, fan-out)."""
    name, old = first_convolution(model)
    if old.in_channels == channels:
        return
    new = copy.deepcopy(old)
    new.in_channels = channels
    new.weight = nn.Parameter(torch.empty(old.out_channels, channels, *old.kernel_size))
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
