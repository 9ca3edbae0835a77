"""Faster R-CNN: proposals from the feature maps, then a small head that names and refines each."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from pydantic import Field
from torch import nn

from epsd.detectors._features import Picture, Pyramid, frozen_nodes, levels_of
from epsd.detectors._suited import AUTO, Auto, Plan, planned
from epsd.project.settings import Count, Positive, Share
from epsd.registry import variant


@variant
class FasterRcnn:
    """Ren, He, Girshick and Sun (NeurIPS 2015), with the feature pyramid of Lin et al. (CVPR 2017).

    Settings (defaults: torchvision's, which are those of the papers, unless said otherwise)
    --------
    size, finest_stride, extra_levels, anchor_scale : "auto" suits them to the training data: `epsd.detectors._suited`.
    size, largest : shorter side of the resized picture in pixels, most pixels of the longer; null: the typical picture
        keeps its size, 5/3 of the shorter side. The papers take 800 and 1333 on COCO, 600 and 1000 on VOC.
    fpn : look at several strides through a pyramid; false: at one, the coarsest up to 16 (the papers' C4).
    finest_stride : finest feature map that is used, in pixels per cell.
    extra_levels : coarser maps added by subsampling (1 in torchvision).
    channels : of the pyramid.
    anchor_scale : side of an anchor in cells; 8 in torchvision, meant for 800 px.
    aspect_ratios : height over width of the anchors.
    roi_size : cells per side to which each proposal is pooled.
    head_width : units of the two layers behind.
    proposals : kept per picture after suppression.
    roi_samples, anchor_samples : drawn per picture for the loss of the head and of the proposals.
    score_threshold, nms_threshold, max_detections : of what is reported per picture.
    frozen_norms : norm layers of the backbone keep the running statistics of classification (for very small batches).
    """

    size: Count | Auto | None = AUTO
    largest: Count | None = None
    fpn: bool = True
    finest_stride: Count | Auto = AUTO
    extra_levels: Annotated[int, Field(ge=0, le=4)] | Auto = AUTO
    channels: Count = 256
    anchor_scale: Positive | Auto = AUTO
    aspect_ratios: list[Positive] = Field(default_factory=lambda: [0.5, 1.0, 2.0], min_length=1)
    roi_size: Count = 7
    head_width: Count = 1024
    proposals: Count = 1000
    roi_samples: Count = 512
    anchor_samples: Count = 256
    score_threshold: Share = 0.05
    nms_threshold: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_detections: Count = 100
    frozen_norms: bool = False

    def __call__(
        self, model: nn.Module, nodes: Sequence[str], picture: Picture, num_classes: int, frozen_stages: int = 0
    ) -> nn.Module:
        """See `epsd.detectors.Detector`."""
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
        from torchvision.ops import MultiScaleRoIAlign

        plan = self.plan(model, nodes, picture)
        scale = float(plan.settings.get("anchor_scale", self.anchor_scale))
        frozen, extra = frozen_nodes(nodes, frozen_stages), len(plan.strides) - len(plan.levels)
        backbone = Pyramid(model, plan.levels, frozen, self.frozen_norms, channels=self.channels, extra=extra)
        names = [str(number) for number in range(len(plan.levels))]
        sizes = _anchor_sizes(plan.strides, scale)
        detector: nn.Module = FasterRCNN(
            backbone,
            min_size=plan.shorter,
            max_size=plan.longer,
            image_mean=picture.mean,
            image_std=picture.std,
            rpn_anchor_generator=AnchorGenerator(sizes, (tuple(self.aspect_ratios),) * len(sizes)),
            rpn_pre_nms_top_n_train=2 * self.proposals,
            rpn_pre_nms_top_n_test=self.proposals,
            rpn_post_nms_top_n_train=self.proposals,
            rpn_post_nms_top_n_test=self.proposals,
            rpn_batch_size_per_image=self.anchor_samples,
            # a proposal is pooled from the stride at which it is as many cells wide as an anchor, as in the paper
            box_roi_pool=MultiScaleRoIAlign(names, self.roi_size, 2, canonical_scale=round(28 * scale)),
            box_head=TwoMLPHead(self.channels * self.roi_size**2, self.head_width),
            box_predictor=FastRCNNPredictor(self.head_width, num_classes + 1),
            box_batch_size_per_image=self.roi_samples,
            box_score_thresh=self.score_threshold,
            box_nms_thresh=self.nms_threshold,
            box_detections_per_img=self.max_detections,
        )
        return detector

    def plan(self, model: nn.Module, nodes: Sequence[str], picture: Picture) -> Plan:
        """See `epsd.detectors.Detector`."""
        usual = {"size": None, "finest_stride": 4, "extra_levels": 1, "anchor_scale": 4.0}
        return planned(
            asdict(self), levels_of(model, nodes, len(picture.mean)), picture, usual, _anchor_sizes, first=0.5
        )


def _anchor_sizes(strides: Sequence[int], scale: float) -> tuple[tuple[int, ...], ...]:
    """One size per level of a pyramid; half to four times that on a single level."""
    if len(strides) > 1:
        return tuple((round(scale * stride),) for stride in strides)
    return (tuple(round(scale * strides[0] * factor) for factor in (0.5, 1, 2, 4)),)
