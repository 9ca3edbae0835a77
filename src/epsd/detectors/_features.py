"""The feature maps of a classifier, as the detectors of torchvision want them. Shared by every detector; no choice."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from epsd.compute.networks import evaluated
from epsd.types import EpsdError

Floats = npt.NDArray[np.float64]

PROBE = 128
"""Side in pixels of the blank picture that is sent through the network to learn its strides."""

NORMS = (nn.modules.batchnorm._BatchNorm,)


class DetectorError(EpsdError):
    """A classifier that gives no feature maps a detector can use, or settings that do not fit it."""


class Level(NamedTuple):
    """One feature map: the node that gives it, pixels of the picture per cell, channels."""

    node: str
    stride: int
    channels: int


class Picture(NamedTuple):
    """What detectors must know about the pictures: typical height and width, channel mean and std in [0, 1].

    `boxes` (n, 2): widths and heights of the training boxes, as shares of the shorter side of their picture; None: not
    known.
    """

    height: int
    width: int
    mean: list[float]
    std: list[float]
    boxes: Floats | None = None

    @property
    def shorter(self) -> int:
        """Pixels of the shorter side."""
        return min(self.height, self.width)

    @property
    def longer(self) -> int:
        """Pixels of the longer side."""
        return max(self.height, self.width)


class Body(nn.Module):
    """Image (B, C, H, W) -> feature maps by name ("0", "1", ... fine to coarse), made by the classifier's own layers.

    The parameters are those of the classifier, under its names behind `body.`; its head stays behind. The norm layers
    of frozen stages (all of them with `frozen_norms`) keep their running statistics.
    """

    def __init__(
        self, model: nn.Module, levels: Sequence[Level], frozen: Sequence[str], frozen_norms: bool = False
    ) -> None:
        super().__init__()
        self.body = extract(model, [level.node for level in levels])
        self._still = [module for module in self.body.modules() if frozen_norms and isinstance(module, NORMS)]
        for node in frozen[-1:]:  # the layers before the last frozen node contain those before the others
            part = extract(model, [node])
            part.requires_grad_(False)
            self._still += [module for module in part.modules() if isinstance(module, NORMS)]

    def train(self, mode: bool = True) -> "Body":
        """As `nn.Module.train`, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """See the class."""
        return OrderedDict((str(number), maps) for number, maps in enumerate(self.body(images).values()))


def extract(model: nn.Module, nodes: Sequence[str]) -> nn.Module:
    """The part of `model` that computes the outputs of `nodes`. It shares the model's parameters and their names.

    Norm layers of any library stay modules, so that they can be told from the rest and what nobody needs falls away.
    """
    from torchvision.models.feature_extraction import create_feature_extractor

    norms = list({type(module) for module in model.modules() if isinstance(module, NORMS)})
    try:
        part: nn.Module = create_feature_extractor(
            model, return_nodes=list(nodes), tracer_kwargs={"leaf_modules": norms}, suppress_diff_warning=True
        )
        return part
    except Exception as error:  # torch.fx raises nearly any type on a network that it cannot trace
        reason = " ".join(str(error).split())[:200]
        raise DetectorError(f"{type(model).__name__}: no feature maps can be taken from it ({reason}).") from None


def levels_of(model: nn.Module, nodes: Sequence[str], channels: int) -> list[Level]:
    """Stride and channels of each node's feature map, fine to coarse; of several at one stride, the deepest.

    Raises DetectorError where a node gives no map (B, C, H, W) or there is no node: transformers, for one.
    """
    name = type(model).__name__
    if not nodes:
        raise DetectorError(
            f"{name}: has no feature maps (a transformer has none); detection needs a convolutional net."
        )
    body, device = extract(model, nodes), next(model.parameters()).device
    try:
        outputs = evaluated(body, torch.zeros(1, channels, PROBE, PROBE, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DetectorError(
            f"{name}: takes no picture of {PROBE}x{PROBE} px with {channels} channels ({reason})."
        ) from None
    found: dict[int, Level] = {}
    for node, output in outputs.items():
        if not isinstance(output, Tensor) or output.ndim != 4 or not 0 < output.shape[2] <= PROBE:
            raise DetectorError(f"{name}: node '{node}' gives no feature map (B, C, H, W); detection needs one.")
        stride = round(PROBE / output.shape[2])
        found[stride] = Level(node, stride, output.shape[1])
    return [found[stride] for stride in sorted(found)]


def choose_levels(levels: Sequence[Level], finest: int, pyramid: bool) -> list[Level]:
    """The levels a detector looks at: those at stride `finest` and coarser; the coarsest alone where all are finer.

    Without a pyramid only one: the coarsest at a stride of at most 16 (as the C4 detectors do), or the finest there is.
    """
    wanted = [level for level in levels if level.stride >= finest] or [levels[-1]]
    if pyramid:
        return wanted
    return [[level for level in wanted if level.stride <= 16 or level == wanted[0]][-1]]


def frozen_nodes(nodes: Sequence[str], count: int) -> list[str]:
    """The first `count` nodes. Raises DetectorError when there are fewer."""
    if count > len(nodes):
        raise DetectorError(f"detect.frozen_stages: {count}, but the backbone has {len(nodes)} ({', '.join(nodes)}).")
    return list(nodes[:count])


class Pyramid(Body):
    """`backbone` of a torchvision detector: the body, then a feature pyramid (Lin et al., CVPR 2017).

    Gives maps "0", "1", ... of `out_channels` each, at `strides`; `extra` coarser ones come by 2x subsampling. With a
    single level the pyramid is a 1x1 projection and a 3x3 convolution.
    """

    def __init__(
        self,
        model: nn.Module,
        levels: Sequence[Level],
        frozen: Sequence[str],
        frozen_norms: bool,
        *,
        channels: int,
        extra: int,
    ) -> None:
        super().__init__(model, levels, frozen, frozen_norms)
        from torchvision.ops import FeaturePyramidNetwork

        self.fpn = FeaturePyramidNetwork([level.channels for level in levels], channels)
        self.out_channels = channels
        self.strides = [level.stride for level in levels]
        self.strides += [self.strides[-1] * 2**step for step in range(1, extra + 1)]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, C, H, W) -> maps by name, fine to coarse."""
        maps: OrderedDict[str, Tensor] = self.fpn(super().forward(images))
        for number in range(len(maps), len(self.strides)):
            maps[str(number)] = torch.nn.functional.max_pool2d(maps[str(number - 1)], 1, 2)
        return maps


def sides(picture: Picture, size: int | None, largest: int | None) -> tuple[int, int]:
    """Shorter side to which pictures are resized, and most pixels of the longer one.

    `size` None: the typical picture stays as it is. `largest` None: 5/3 of the shorter side (800 and 1333 in the
    literature), and at least what the typical picture needs.
    """
    shorter = size or picture.shorter
    needed = shorter * picture.longer / picture.shorter
    return shorter, largest or max(round(shorter * 5 / 3), round(needed))
