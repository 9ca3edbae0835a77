"""From a trained network to the model that is handed on: one folder, which MLflow serves and `epsd predict` asks."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from epsd.architectures import built
from epsd.evaluation import compact_file
from epsd.evaluation.servable import Intake, Servable, ServingError, answers, example, find_images
from epsd.project import artifacts
from epsd.types import Batches

_EXAMPLES = 2
"""Images in the input example: of one alone the export would take the number 1 for a part of the model."""


def exported(network: nn.Module, card: Mapping[str, Any], test: Batches) -> None:
    """Write `network` with its preprocessing to artifacts/evaluate/model, beside its card in Markdown."""
    from epsd.tracking import models

    intake = Intake.of(card)
    images = pixels_of(test, intake)
    contents = models.Contents(
        example=example(images),
        network_sized=images.astype(np.float32),
        classes=len(intake.class_names),
        metadata={"class_names": intake.class_names, "card": json.dumps(card)},
        files=[artifacts.MODEL_README, artifacts.MODEL_CARD],
        weights=[artifacts.MODEL],
    )
    models.write(artifacts.SERVED_MODEL, Servable(copy.deepcopy(network).cpu(), intake), contents)


def pixels_of(test: Batches, intake: Intake) -> NDArray[np.uint8]:
    """The first images of a split as (B, C, H, W) uint8, from batches that are normalised."""
    first = next(iter(test.epoch(0))).images[:_EXAMPLES].cpu()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (intake.mean, intake.std))
    levels = ((first * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    images: NDArray[np.uint8] = levels.expand(len(levels), -1, -1, -1).numpy()
    return images if len(images) == _EXAMPLES else np.repeat(images, _EXAMPLES, axis=0)


def trained_network(weights: Path, card: Mapping[str, Any]) -> nn.Module:
    """The network of a card with its weights. Raises EpsdError where they do not fit."""
    return artifacts.load_into(_network(card, weights.with_suffix(".json")), weights)


def _network(card: Mapping[str, Any], path: Path) -> nn.Module:
    with artifacts.naming(path):
        return built(card["architecture"], card["num_classes"], tuple(card["image_shape"]), card.get("shapes"))


def opened(model: str | None) -> tuple[nn.Module, Intake]:
    """The model that a user names: None is the one trained in this folder; `champion`, `candidate`, a run, or a path
    (a folder, weights with their card beside them, a compact file).

    Raises EpsdError: nothing of that name, or nothing that can be asked.
    """
    if model is None:
        return _from_folder(artifacts.TRAIN)
    if model not in ("champion", "candidate") and Path(model).exists():
        return _from_folder(Path(model))
    from epsd.tracking import registered

    return _from_folder(registered.fetch(model))


def _from_folder(place: Path) -> tuple[nn.Module, Intake]:
    """From weights and their card, or from what MLflow keeps."""
    if (place / "MLmodel").is_file():
        return _from_mlflow(place)
    if place.is_file() and compact_file.is_compact(place):
        state, card = compact_file.load(place)
        artifacts.valid(card, artifacts.Card, place)
        intake = Intake.of(card)
        return Servable(artifacts.fill(_network(card, place), state, place), intake), intake
    weights = place if place.is_file() else place / artifacts.MODEL.name
    if weights.suffix != ".safetensors":
        raise ServingError(f"{place}: neither a folder with a model nor a .safetensors file with its .json beside it.")
    card = artifacts.read_card(weights.with_suffix(".json"))
    intake = Intake.of(card)
    return Servable(trained_network(weights, card), intake), intake


def _from_mlflow(folder: Path) -> tuple[nn.Module, Intake]:
    from epsd.tracking import models

    weights = folder / "extra_files" / artifacts.MODEL.name
    if weights.is_file():  # the graph could only be pickled
        return _from_folder(weights)
    return models.load_exported(folder), Intake.of(models.card_of(folder))


def predicted(places: Sequence[str], model: str | None, top: int, as_json: bool) -> Iterator[str]:
    """One line for each image: its most probable classes. Raises EpsdError before the first one where it can."""
    paths = find_images(places)
    module, intake = opened(model)
    for answer in answers(module, intake, paths, top):
        yield answer.as_json() if as_json else answer.line()
