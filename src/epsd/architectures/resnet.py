"""ResNet as He et al. published it (CVPR 2016): three thin stages for 32 px, four wide ones for photographs."""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from epsd.registry import variant

Stem = Literal["cifar", "tiny_imagenet", "imagenet"]
Shortcut = Literal["projection", "padding"]

WIDE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BOTTLENECK_FROM = 50


class Padding(nn.Module):
    """The paper's option A: keep every `stride`-th pixel and fill the new channels with zeros; no weights."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C + extra, ceil(H / stride), ceil(W / stride))."""
        before = self.extra // 2
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, before, self.extra - before))


def shortcut_of(inputs: int, outputs: int, stride: int, kind: Shortcut) -> nn.Module | None:
    """What the identity passes through where a block changes the shape; None where it does not."""
    if stride == 1 and inputs == outputs:
        return None
    if kind == "padding":
        return Padding(inputs, outputs, stride)
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, kind: Shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut_of(inputs, planes, stride, kind)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, planes, ceil(H / stride), ceil(W / stride))."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with four times the planes at the end; the stride is on the 3x3 (as torchvision has it)."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, kind: Shortcut):
        super().__init__()
        outputs = planes * self.expansion
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut_of(inputs, outputs, stride, kind)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4 planes, ceil(H / stride), ceil(W / stride))."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


def stem_of(channels: int, planes: int, stem: Stem) -> tuple[nn.Conv2d, nn.Module]:
    """First convolution and the pooling behind it. Total stride: cifar 1, tiny_imagenet 2, imagenet 4."""
    if stem == "imagenet":
        return nn.Conv2d(channels, planes, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
    return nn.Conv2d(channels, planes, 3, 1 if stem == "cifar" else 2, 1, bias=False), nn.Identity()


def initialise(model: nn.Module) -> None:
    """Kaiming normal, fan-out, for convolutions (He et al. 2015); norm layers start as the identity; the classifier
    keeps PyTorch's own uniform initialisation, as in torchvision."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Net(nn.Module):
    """A residual network; submodules are named as in torchvision (conv1, bn1, layer1.0.conv1, ..., fc)."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        blocks: tuple[int, ...],
        planes: tuple[int, ...],
        channels: int,
        num_classes: int,
        stem: Stem,
        kind: Shortcut,
    ):
        super().__init__()
        self.conv1, self.maxpool = stem_of(channels, planes[0], stem)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        inputs = planes[0]
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for number, (stage, count, width) in enumerate(zip(self.stages, blocks, planes, strict=True)):
            strides = [1 if number == 0 else 2] + [1] * (count - 1)
            layers: list[nn.Module] = []
            for stride in strides:
                layers.append(block(inputs, width, stride, kind))
                inputs = width * block.expansion
            self.add_module(stage, nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, K)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


@variant
class ResNet:
    """Residual networks of He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (CVPR 2016).

    Depths 8, 14, 20, 32, 44, 56, 110: the CIFAR networks (the paper starts at 20), three stages of 16-32-64 channels.
    Depths 18, 34, 50, 101, 152: its ImageNet networks, four stages from 64 channels (times `width`).

    Settings
    --------
    depth : layers with weights, as the name of the network counts them.
    width : (0, ...) times the published number of channels. GraSP's ResNet-32 has width 2.
    stem : "cifar": 3x3, stride 1, no pooling (the usual net for 32 px: 11,173,962 parameters at depth 18 and 10
        classes). "tiny_imagenet": 3x3, stride 2, no pooling, so that 64 px cost what 32 px do (as GraSP does).
        "imagenet": 7x7, stride 2 and a 3x3 max pooling, as published for 224 px.
    shortcut : "projection" (default; the paper's option B, a 1x1 convolution where the shape changes: what
        torchvision, GraSP and Synaptic-Flow use; prunable) or "padding" (option A, no weights: what
        the paper uses for depths 20 to 110).

    Initial weights: Kaiming normal, fan-out (He et al., ICCV 2015).
    """

    depth: Literal[8, 14, 20, 32, 44, 56, 110, 18, 34, 50, 101, 152] = 18
    width: Annotated[float, Field(gt=0, le=64)] = 1.0
    stem: Stem = "cifar"
    shortcut: Shortcut = "projection"

    def __call__(self, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
        """A network with random weights from the global generator. `image_shape`: (C, H, W); any H and W."""
        thin = self.depth not in WIDE_BLOCKS
        blocks = ((self.depth - 2) // 6,) * 3 if thin else WIDE_BLOCKS[self.depth]
        planes = tuple(max(1, round((16 if thin else 64) * 2**stage * self.width)) for stage in range(len(blocks)))
        block = Bottleneck if not thin and self.depth >= BOTTLENECK_FROM else Basic
        return Net(block, blocks, planes, image_shape[0], num_classes, self.stem, self.shortcut)

    def feature_nodes(self, model: nn.Module) -> list[str]:
        """One node per stage, fine to coarse: the output of its last block."""
        return [name for name, _ in model.named_children() if name.startswith("layer")]
