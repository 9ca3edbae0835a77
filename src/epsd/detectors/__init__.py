"""Detectors by name: a torchvision detector around the feature maps of a classifier that is already trained."""

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from epsd.detectors._features import DetectorError, Picture
from epsd.detectors._suited import Plan
from epsd.detectors.faster_rcnn import FasterRcnn
from epsd.detectors.retinanet import RetinaNet
from epsd.detectors.ssd import Ssd

__all__ = ["DETECTORS", "Detector", "DetectorError", "Picture", "Plan"]


class Detector(Protocol):
    """A recipe for a detector."""

    def __call__(
        self, model: nn.Module, nodes: Sequence[str], picture: Picture, num_classes: int, frozen_stages: int = 0
    ) -> nn.Module:
        """A detector that follows torchvision's interface, around `model`'s own layers.

        Parameters
        ----------
        model : a classifier; its parameters are used, not copied, and keep their names behind `backbone.body.`.
        nodes : names of its feature maps, fine to coarse (`Architecture.feature_nodes`).
        picture : typical size of the pictures, channel mean and std.
        num_classes : classes without the background; the detector's labels are 1 to `num_classes`.
        frozen_stages : the first so many nodes, with all that feeds them, are not trained.

        Raises
        ------
        DetectorError : no usable feature maps, or fewer stages than `frozen_stages`.
        """

    def plan(self, model: nn.Module, nodes: Sequence[str], picture: Picture) -> Plan:
        """What it would look at pictures with: a number for every setting that is "auto". Raises DetectorError."""


DETECTORS: dict[str, type[Detector]] = {
    "faster_rcnn": FasterRcnn,
    "retinanet": RetinaNet,
    "ssd": Ssd,
}
