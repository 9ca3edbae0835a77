"""RetinaNet: one pass, every anchor scored, with the focal loss against the mass of background."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from pydantic import Field
from torch import nn

from epsd.detectors._features import Picture, Pyramid, frozen_nodes, levels_of
from epsd.detectors._suited import AUTO, Auto, Plan, planned
from epsd.project.settings import MOST, Count, Positive, Share
from epsd.registry import variant


@variant
class RetinaNet:
    """Lin, Goyal, Girshick, He and Dollár (ICCV 2017).

    It learns more slowly than the other two, at a lower rate (the paper's is 0.01): on the digit scenes, with a
    network 95 % sparse, 12 epochs at 0.01 reach a mAP of 0.53, where 8 at 0.05 reach 0.23.

    Settings (defaults: torchvision's, which are the paper's, unless said otherwise)
    --------
    size, finest_stride, extra_levels, anchor_scale : "auto" suits them to the training data: `epsd.detectors._suited`.
    size, largest : shorter side of the resized picture in pixels, most pixels of the longer; null: the typical picture
        keeps its size, 5/3 of the shorter side. The paper takes 800 and 1333.
    fpn : look at several strides through a pyramid; false: at one, the coarsest up to 16.
    finest_stride : finest feature map that is used; 8 in the paper, meant for 800 px.
    extra_levels : coarser maps added by subsampling (2 in the paper).
    channels : of the pyramid and of the two heads, a multiple of 32 (the heads normalise groups of channels).
    anchor_scale : side of the smallest of three anchors (1, 2^(1/3), 2^(2/3) times that), in cells.
    aspect_ratios : height over width of the anchors.
    score_threshold, nms_threshold, max_detections : of what is reported per picture.
    frozen_norms : norm layers of the backbone keep the running statistics of classification (for very small batches).
    """

    size: Count | Auto | None = AUTO
    largest: Count | None = None
    fpn: bool = True
    finest_stride: Count | Auto = AUTO
    extra_levels: Annotated[int, Field(ge=0, le=4)] | Auto = AUTO
    channels: Annotated[int, Field(ge=32, le=MOST, multiple_of=32)] = 256
    anchor_scale: Positive | Auto = AUTO
    aspect_ratios: list[Positive] = Field(default_factory=lambda: [0.5, 1.0, 2.0], min_length=1)
    score_threshold: Share = 0.05
    nms_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_detections: Count = 300
    frozen_norms: bool = False

    def __call__(
        self, model: nn.Module, nodes: Sequence[str], picture: Picture, num_classes: int, frozen_stages: int = 0
    ) -> nn.Module:
        """See `epsd.detectors.Detector`."""
        from functools import partial

        from torchvision.models.detection import RetinaNet as Network
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.retinanet import RetinaNetHead

        plan = self.plan(model, nodes, picture)
        frozen, extra = frozen_nodes(nodes, frozen_stages), len(plan.strides) - len(plan.levels)
        backbone = Pyramid(model, plan.levels, frozen, self.frozen_norms, channels=self.channels, extra=extra)
        sizes = _anchor_sizes(plan.strides, float(plan.settings.get("anchor_scale", self.anchor_scale)))
        anchors = AnchorGenerator(sizes, (tuple(self.aspect_ratios),) * len(sizes))
        per_cell = anchors.num_anchors_per_location()[0]
        detector: nn.Module = Network(
            backbone,
            num_classes + 1,
            min_size=plan.shorter,
            max_size=plan.longer,
            image_mean=picture.mean,
            image_std=picture.std,
            anchor_generator=anchors,
            # group norm in the heads, as torchvision's second version: without it plain SGD starts too slowly
            head=RetinaNetHead(self.channels, per_cell, num_classes + 1, norm_layer=partial(nn.GroupNorm, 32)),
            score_thresh=self.score_threshold,
            nms_thresh=self.nms_threshold,
            detections_per_img=self.max_detections,
        )
        return detector

    def plan(self, model: nn.Module, nodes: Sequence[str], picture: Picture) -> Plan:
        """See `epsd.detectors.Detector`."""
        usual = {"size": None, "finest_stride": 4, "extra_levels": 2, "anchor_scale": 4.0}
        return planned(asdict(self), levels_of(model, nodes, len(picture.mean)), picture, usual, _anchor_sizes)


def _anchor_sizes(strides: Sequence[int], scale: float) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(round(scale * stride * 2 ** (third / 3)) for third in range(3)) for stride in strides)
