"""VGG with batch normalisation for small images: the convolutions of the paper and one linear layer."""

from typing import Literal

import torch
from torch import Tensor, nn

from epsd.architectures._features import ArchitectureError
from epsd.registry import variant

PLANES = (64, 128, 256, 512, 512)
CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
SMALLEST = 2 ** len(PLANES)


def _features(depth: int, channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for planes, count in zip(PLANES, CONVOLUTIONS[depth], strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(channels, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU(inplace=True)]
            channels = planes
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def initialise(model: nn.Module) -> None:
    """Kaiming normal, fan-out, biases zero; the classifier N(0, 0.01) (Simonyan and Zisserman's figure)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


class Net(nn.Module):
    """Names as in torchvision: features.N, then avgpool and one `classifier`."""

    def __init__(self, depth: int, channels: int, num_classes: int):
        super().__init__()
        self.features = _features(depth, channels)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(PLANES[-1], num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K)."""
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


@variant
class Vgg:
    """Simonyan and Zisserman's networks (ICLR 2015) as the pruning literature uses them at 32 px.

    Batch normalisation after each convolution, five 2x2 poolings, one linear layer instead of three (GraSP, PKD,
    Synaptic-Flow). Larger images are averaged before the classifier. VGG-19 with 10 classes: 20,040,522 parameters.

    Settings
    --------
    depth : layers with weights in the paper's network (it counts three linear layers).

    Initial weights: Kaiming normal, fan-out, biases zero, classifier N(0, 0.01).
    """

    depth: Literal[11, 13, 16, 19] = 19

    def __call__(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A network with random weights from the global generator. Raises ArchitectureError below 32 px."""
        channels, height, width = image_shape
        if min(height, width) < SMALLEST:
            raise ArchitectureError(
                f"architecture: 'vgg' halves the image five times: {SMALLEST} px at least (given {height}x{width})."
            )
        return Net(self.depth, channels, num_classes)

    def feature_nodes(self, model: nn.Module) -> list[str]:
        """The activation before each of the five poolings: strides 1, 2, 4, 8 and 16, fine to coarse."""
        layers = model.get_submodule("features").named_children()
        return [f"features.{int(name) - 1}" for name, layer in layers if isinstance(layer, nn.MaxPool2d)]
