"""From a trained network to the model that is handed on: one folder, which MLflow serves and `epsd predict` asks."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from epsd.architectures import built
from epsd.evaluation.intake import Intake
from epsd.evaluation.servable import Servable, example, levels
from epsd.files.onnx_file import FP32, SCRIPT
from epsd.project import artifacts
from epsd.tracking import models
from epsd.types import Batches

_EXAMPLES = 2
"""Images in the input example: of one alone the export would take the number 1 for a part of the model."""


def exported(network: nn.Module, card: Mapping[str, Any], test: Batches, onnx: Path) -> None:
    """Write `network` with its preprocessing to artifacts/evaluate/model, beside its card in Markdown.

    `onnx`: the folder with its ONNX files; where it is empty, torch.export makes the model.
    """
    intake = Intake.of(card)
    images = pixels_of(test, intake)
    contents = models.Contents(
        example=example(images),
        network_sized=images.astype(np.float32),
        classes=len(intake.class_names),
        metadata={"class_names": intake.class_names, "card": json.dumps(card)},
        files=[artifacts.MODEL_README, artifacts.MODEL_CARD],
        weights=[artifacts.MODEL],
        onnx=onnx if (onnx / FP32).is_file() else None,
        script=SCRIPT,
    )
    models.write(artifacts.SERVED_MODEL, Servable(copy.deepcopy(network).cpu(), intake), contents)


def pixels_of(test: Batches, intake: Intake) -> NDArray[np.uint8]:
    """The first images of a split as (B, C, H, W) uint8, from batches that are normalised."""
    images = levels(next(iter(test.epoch(0))).images[:_EXAMPLES], intake)
    return images if len(images) == _EXAMPLES else np.repeat(images, _EXAMPLES, axis=0)


def trained_network(weights: Path, card: Mapping[str, Any]) -> nn.Module:
    """The network of a card with its weights. Raises EpsdError where they do not fit."""
    return artifacts.load_into(network_of(card, weights.with_suffix(".json")), weights)


def network_of(card: Mapping[str, Any], path: Path) -> nn.Module:
    """The network of a card, read from `path`, with weights drawn anew. Raises EpsdError."""
    with artifacts.naming(path):
        return built(card["architecture"], card["num_classes"], tuple(card["image_shape"]), card.get("shapes"))
