"""The classifier that a detector is built on: what `train` left in this folder, or one from elsewhere."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from epsd.architectures import built
from epsd.compute import distributed
from epsd.data.prepared import Prepared
from epsd.masks import Mask
from epsd.pipeline.weights import source_of
from epsd.project import artifacts
from epsd.project.params import Params
from epsd.project.runtime import note
from epsd.pruning import start

_TOLD = ("num_classes", "class_names", "image_shape", "mean", "std")


class Backbone(NamedTuple):
    """`card`: of the classifier, as `artifacts.save_model` keeps it.  `mask`: that it was trained under."""

    card: dict[str, Any]
    model: nn.Module
    mask: Mask


def backbone(params: Params) -> Backbone:
    """By `detect.backbone`. Of a bare file the network is `architecture`, its input that of artifacts/data.

    Raises ArtifactError, RegistryError, StartError: weights that cannot be had, or that do not fit.
    """
    if params.detect.backbone is None:
        card = artifacts.read_card(artifacts.MODEL_CARD)
        with artifacts.naming(artifacts.MODEL_CARD):
            model = network(card)
        artifacts.load_into(model, artifacts.MODEL)
        return Backbone(card, model, artifacts.load_mask(model))
    source = source_of(params.detect.backbone, "detect.backbone")
    card = dict(source.card) or _assumed(params)
    model = network(card)
    taken = start.take_(model, source, "auto", card["class_names"])
    if distributed.is_main():
        note(f"detect: {taken}")
    return Backbone(card, model, start.mask_of(model, taken))


def network(card: Mapping[str, Any]) -> nn.Module:
    """The classifier of a card, with random weights."""
    return built(card["architecture"], card["num_classes"], tuple(card["image_shape"]), card.get("shapes"))


def _assumed(params: Params) -> dict[str, Any]:
    data = Prepared.load(artifacts.DATA)
    return {"architecture": params.architecture, **{name: getattr(data, name) for name in _TOLD}}
