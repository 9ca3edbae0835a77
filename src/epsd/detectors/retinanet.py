"""RetinaNet: one pass, every anchor scored, with the focal loss against the mass of background."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import nn

from epsd.detectors._features import Picture, Pyramid, choose_levels, frozen_nodes, levels_of, sides
from epsd.project.settings import MOST, Count, Positive, Share
from epsd.registry import variant


@variant
class RetinaNet:
    """Lin, Goyal, Girshick, He and Dollár (ICCV 2017).

    It learns more slowly than the other two, at a lower rate (the paper's is 0.01): on the digit scenes, with a
    network 95 % sparse, 12 epochs at 0.01 reach a mAP of 0.53, where 8 at 0.05 reach 0.23.

    Settings (defaults: torchvision's, which are the paper's, unless said otherwise)
    --------
    size, largest : shorter side of the resized picture in pixels, most pixels of the longer; null: the typical picture
        keeps its size, 5/3 of the shorter side. The paper takes 800 and 1333.
    fpn : look at several strides through a pyramid; false: at one, the coarsest up to 16.
    finest_stride : finest feature map that is used; 8 in the paper, meant for 800 px; 4 suits small pictures.
    extra_levels : coarser maps added by subsampling (2 in the paper).
    channels : of the pyramid and of the two heads, a multiple of 32 (the heads normalise groups of channels).
    anchor_scale : side of the smallest of three anchors (1, 2^(1/3), 2^(2/3) times that), in cells.
    aspect_ratios : height over width of the anchors.
    score_threshold, nms_threshold, max_detections : of what is reported per picture.
    frozen_norms : norm layers of the backbone keep the running statistics of classification (for very small batches).
    """

    size: Count | None = None
    largest: Count | None = None
    fpn: bool = True
    finest_stride: Count = 4
    extra_levels: Annotated[int, Field(ge=0, le=4)] = 2
    channels: Annotated[int, Field(ge=32, le=MOST, multiple_of=32)] = 256
    anchor_scale: Positive = 4.0
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

        levels = choose_levels(levels_of(model, nodes, len(picture.mean)), self.finest_stride, self.fpn)
        frozen = frozen_nodes(nodes, frozen_stages)
        extra = self.extra_levels if self.fpn else 0
        backbone = Pyramid(model, levels, frozen, self.frozen_norms, channels=self.channels, extra=extra)
        shorter, longer = sides(picture, self.size, self.largest)
        sizes = tuple(
            tuple(round(self.anchor_scale * stride * 2 ** (third / 3)) for third in range(3))
            for stride in backbone.strides
        )
        anchors = AnchorGenerator(sizes, (tuple(self.aspect_ratios),) * len(sizes))
        per_cell = anchors.num_anchors_per_location()[0]
        detector: nn.Module = Network(
            backbone,
            num_classes + 1,
            min_size=shorter,
            max_size=longer,
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
