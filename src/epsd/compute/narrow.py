"""A network whose layers have fewer channels than its architecture gives them: built whole, then made narrow."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from epsd.types import EpsdError

Shapes = dict[str, tuple[int, ...]]
"""State-dict name -> shape of that tensor, of those alone that are smaller than the architecture has them."""


class NarrowError(EpsdError):
    """Shapes that a network cannot take."""


def shapes_of(narrow: nn.Module, whole: nn.Module) -> Shapes:
    """What `narrow_` needs to make `whole` as narrow as `narrow`."""
    sizes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    return {name: tuple(t.shape) for name, t in narrow.state_dict().items() if tuple(t.shape) != sizes[name]}


def narrow_(model: nn.Module, shapes: Mapping[str, tuple[int, ...] | list[int]]) -> nn.Module:
    """`model` itself with tensors of these shapes (entries from the front; weights are loaded afterwards).

    Layers are told their new sizes: convolutions (grouped, depthwise), linear, norm layers, MultiheadAttention.
    Raises NarrowError for a tensor that is not there, or that would grow.
    """
    own = model.state_dict()
    for name, shape in shapes.items():
        if name not in own or own[name].dim() != len(shape) or any(map(int.__gt__, map(int, shape), own[name].shape)):
            had = tuple(own[name].shape) if name in own else "nothing of that name"
            raise NarrowError(f"'{name}' cannot have the shape {tuple(shape)}: the architecture has {had}.")
        place, _, leaf = name.rpartition(".")
        _shrink(model.get_submodule(place), leaf, tuple(int(size) for size in shape))
    for place in {name.rpartition(".")[0] for name in shapes}:
        _tell(model.get_submodule(place))
    return model


def _shrink(module: nn.Module, leaf: str, shape: tuple[int, ...]) -> None:
    old: Tensor = getattr(module, leaf)
    part = old.detach()[tuple(slice(size) for size in shape)].clone()
    if isinstance(old, nn.Parameter):
        setattr(module, leaf, nn.Parameter(part, old.requires_grad))
    else:
        module.register_buffer(leaf, part, persistent=leaf not in module._non_persistent_buffers_set)


@torch.no_grad()
def _tell(layer: Any) -> None:
    """Its sizes, by the tensors that it has now."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        outputs, inputs = layer.weight.shape[:2]
        if layer.groups == layer.in_channels > 1:  # depthwise: as many groups as channels, each with as many outputs
            layer.groups = outputs // (layer.out_channels // layer.groups)
        layer.in_channels, layer.out_channels = inputs * layer.groups, outputs
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        layer.num_features = len(layer.running_mean if layer.weight is None else layer.weight)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(layer.weight)
    elif isinstance(layer, nn.MultiheadAttention):
        layer.embed_dim = layer.kdim = layer.vdim = layer.out_proj.weight.shape[0]
        layer.head_dim = layer.embed_dim // layer.num_heads
