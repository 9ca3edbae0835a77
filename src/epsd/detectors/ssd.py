"""SSD: one pass over pictures of one size, boxes read from a ladder of ever coarser maps."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor, nn

from epsd.detectors._features import Body, Floats, Level, Picture, choose_levels, frozen_nodes, levels_of
from epsd.detectors._suited import AUTO, Auto, Plan, all_strides, finest, further, known, reach, shapes, size_of
from epsd.project.settings import MOST, Count, Positive, Share
from epsd.registry import variant


class Ladder(Body):
    """`backbone` of SSD: the classifier's maps, then coarser ones, each by a 1x1 and a 3x3 convolution of stride 2."""

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
        inputs = [levels[-1].channels, *[channels] * extra]
        self.extra = nn.ModuleList(_step(before, after) for before, after in pairwise(inputs))
        self.out_channels = [*(level.channels for level in levels), *[channels] * extra]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """(B, C, H, W) -> maps by name, fine to coarse."""
        maps = super().forward(images)
        for step in self.extra:
            maps[str(len(maps))] = step(maps[str(len(maps) - 1)])
        return maps


def _step(inputs: int, outputs: int) -> nn.Module:
    middle = max(1, outputs // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 1, bias=False),
        nn.BatchNorm2d(middle),
        nn.ReLU(inplace=True),
        nn.Conv2d(middle, outputs, 3, 2, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


@variant
class Ssd:
    """Liu et al. (ECCV 2016).

    Settings (defaults: torchvision's, which are the paper's, unless said otherwise)
    --------
    size, finest_stride, extra_levels, smallest, biggest : "auto" suits them to the training data:
        `epsd.detectors._suited`.
    size : side in pixels to which every picture is resized; null: the longer side of the typical picture. The paper
        takes 300 or 512.
    fpn : read the classifier's maps at several strides; false: only the coarsest up to 16, then the ladder.
    finest_stride : finest feature map that is used; 8 in the paper, meant for 300 px.
    extra_levels : maps added by the ladder (4 in the paper at 300 px).
    channels : of those (256 in the paper).
    smallest, biggest : side of the default boxes at the finest and at the coarsest map, as a share of the picture.
    aspect_ratios : of default boxes beside the square ones, each also turned by a right angle.
    score_threshold, nms_threshold, max_detections : of what is reported per picture.
    frozen_norms : norm layers of the backbone keep the running statistics of classification (for very small batches).
    """

    size: Annotated[int, Field(ge=16, le=4096)] | Auto | None = AUTO
    fpn: bool = True
    finest_stride: Count | Auto = AUTO
    extra_levels: Annotated[int, Field(ge=0, le=6)] | Auto = AUTO
    channels: Annotated[int, Field(ge=2, le=MOST)] = 256
    smallest: Annotated[float, Field(gt=0, lt=1)] | Auto = AUTO
    biggest: Annotated[float, Field(gt=0, le=1)] | Auto = AUTO
    aspect_ratios: list[Positive] = Field(default_factory=lambda: [2.0])
    score_threshold: Share = 0.01
    nms_threshold: Annotated[float, Field(gt=0, le=1)] = 0.45
    max_detections: Count = 200
    frozen_norms: bool = False

    def __call__(
        self, model: nn.Module, nodes: Sequence[str], picture: Picture, num_classes: int, frozen_stages: int = 0
    ) -> nn.Module:
        """See `epsd.detectors.Detector`."""
        from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
        from torchvision.models.detection.ssd import SSD

        plan = self.plan(model, nodes, picture)
        frozen, extra = frozen_nodes(nodes, frozen_stages), len(plan.strides) - len(plan.levels)
        backbone = Ladder(model, plan.levels, frozen, self.frozen_norms, channels=self.channels, extra=extra)
        ratios = [list(self.aspect_ratios)] * len(backbone.out_channels)
        smallest, biggest = (plan.settings.get(name, getattr(self, name)) for name in ("smallest", "biggest"))
        detector: nn.Module = SSD(
            backbone,
            DefaultBoxGenerator(ratios, min_ratio=smallest, max_ratio=biggest),
            (plan.shorter, plan.shorter),
            num_classes + 1,
            image_mean=picture.mean,
            image_std=picture.std,
            score_thresh=self.score_threshold,
            nms_thresh=self.nms_threshold,
            detections_per_img=self.max_detections,
        )
        return detector

    def plan(self, model: nn.Module, nodes: Sequence[str], picture: Picture) -> Plan:
        """See `epsd.detectors.Detector`."""
        levels = levels_of(model, nodes, len(picture.mean))
        asked = {name: getattr(self, name) for name in ("size", *_USUAL)}
        found = known(asked, _USUAL) if picture.boxes is None else dict(asked)
        if found["size"] == AUTO:
            found["size"] = max(16, round(size_of(picture) * picture.longer / picture.shorter))
        side = found["size"] or picture.longer
        squeezed = side * picture.shorter / np.array([picture.width, picture.height])
        boxes = np.zeros((0, 2)) if picture.boxes is None else picture.boxes * squeezed
        low, high = reach(boxes)
        if found["finest_stride"] == AUTO:
            found["finest_stride"] = finest(levels, low, side)
        used = choose_levels(levels, found["finest_stride"], self.fpn)
        if found["smallest"] == AUTO:
            found["smallest"] = min(0.9, max(0.01, round(low / side, 2)))
        if found["biggest"] == AUTO:
            found["biggest"] = min(1.0, max(found["smallest"] + 0.05, round(high / side, 2)))
        if found["extra_levels"] == AUTO:
            found["extra_levels"] = further(used, found["smallest"] * side, high, side, _MOST_LEVELS)
        strides = all_strides(used, found["extra_levels"])
        anchors = self._boxes(len(strides), found["smallest"] * side, found["biggest"] * side)
        chosen = {name: value for name, value in found.items() if asked[name] == AUTO}
        return Plan(chosen, side, side, used, strides, anchors, boxes)

    def _boxes(self, maps: int, low: float, high: float) -> Floats:
        """The default boxes: from map to map wider by as much, and on each one between it and the next."""
        ladder = [*np.linspace(low, high, maps), high]
        between = [(round(side), round(math.sqrt(side * after))) for side, after in pairwise(ladder)]
        return shapes(between, [1.0, *self.aspect_ratios, *(1 / ratio for ratio in self.aspect_ratios)])


_USUAL = {"size": None, "finest_stride": 4, "extra_levels": 2, "smallest": 0.2, "biggest": 0.9}
_MOST_LEVELS = 6
