"""Architectures by name. A variant is built from its settings and called with (num_classes, image_shape)."""

from typing import Protocol

from torch import nn

from epsd.architectures.resnet import ResNet
from epsd.architectures.timm_zoo import TimmZoo
from epsd.architectures.torchvision_zoo import TorchvisionZoo
from epsd.architectures.vgg import Vgg


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
