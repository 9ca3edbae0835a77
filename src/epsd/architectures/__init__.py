"""Architectures by name. A variant is built from its settings and called with (num_classes, image_shape)."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from epsd.architectures.resnet import ResNet
from epsd.architectures.timm_zoo import TimmZoo
from epsd.architectures.torchvision_zoo import TorchvisionZoo
from epsd.architectures.vgg import Vgg
from epsd.compute.narrow import Shapes, narrow_, shapes_of
from epsd.registry import choose


class Architecture(Protocol):
    """A recipe for a network."""

    def __call__(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A network for images (C, H, W), randomly initialised from the global generator."""

    def feature_nodes(self, model: nn.Module) -> list[str]:
        """Names of nodes, fine to coarse, whose outputs are feature maps (B, C, H, W).

        For `torchvision.models.feature_extraction.create_feature_extractor`, which keeps the names of parameters.
        Raises EpsdError where the network has no such maps (ViT-like).
        """


ARCHITECTURES: dict[str, type[Architecture]] = {
    "resnet": ResNet,
    "vgg": Vgg,
    "torchvision_zoo": TorchvisionZoo,
    "timm_zoo": TimmZoo,
}


def built(
    choice: Mapping[str, Any],
    num_classes: int,
    image_shape: tuple[int, int, int],
    shapes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The network of a choice in params.yaml or in a model's card, with random weights.

    shapes : of the tensors that are narrower than the architecture has them (`epsd.compute.narrow`), as the card says.
    Raises ParamsError for an unknown choice, NarrowError for shapes that it cannot take.
    """
    architecture: Any = choose(ARCHITECTURES, choice, "architecture")
    network: nn.Module = architecture(num_classes, tuple(image_shape))
    return narrow_(network, shapes or {})


def narrowed(
    model: nn.Module, choice: Mapping[str, Any], num_classes: int, image_shape: tuple[int, int, int]
) -> Shapes:
    """In which shapes `model` differs from the network of the choice; {} where it is as wide. Nothing is allocated."""
    with torch.device("meta"):
        return shapes_of(model, built(choice, num_classes, image_shape))
