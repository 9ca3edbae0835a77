"""From a trained network to the model that is handed on: one folder, which MLflow serves and `epsd predict` asks.

Asking an ONNX file starts without torch, so that what needs it is imported where it is needed.
"""

import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from epsd.evaluation.intake import Ask, Intake, ServingError, answers, find_images
from epsd.files.digests import digest_of
from epsd.files.onnx_file import FOLDER, FP32, INT8, OnnxFile
from epsd.project import artifacts

if TYPE_CHECKING:
    from torch import nn

    from epsd.types import Batches

SCRIPT = Path(__file__).parents[1] / "evaluation" / "predict.py"
"""Goes with every ONNX file that is handed on, and needs nothing else of this package."""

_EXAMPLES = 2
"""Images in the input example: of one alone the export would take the number 1 for a part of the model."""


def exported(network: "nn.Module", card: Mapping[str, Any], test: "Batches", onnx: Path) -> None:
    """Write `network` with its preprocessing to artifacts/evaluate/model, beside its card in Markdown.

    `onnx`: the folder with its ONNX files; where it is empty, torch.export makes the model.
    """
    from epsd.evaluation.servable import Servable, example
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
        onnx=onnx if (onnx / FP32).is_file() else None,
        script=SCRIPT,
    )
    models.write(artifacts.SERVED_MODEL, Servable(copy.deepcopy(network).cpu(), intake), contents)


def pixels_of(test: "Batches", intake: Intake) -> NDArray[np.uint8]:
    """The first images of a split as (B, C, H, W) uint8, from batches that are normalised."""
    from epsd.evaluation.servable import levels

    images = levels(next(iter(test.epoch(0))).images[:_EXAMPLES], intake)
    return images if len(images) == _EXAMPLES else np.repeat(images, _EXAMPLES, axis=0)


def trained_network(weights: Path, card: Mapping[str, Any]) -> "nn.Module":
    """The network of a card with its weights. Raises EpsdError where they do not fit."""
    return artifacts.load_into(_network(card, weights.with_suffix(".json")), weights)


def _network(card: Mapping[str, Any], path: Path) -> "nn.Module":
    from epsd.architectures import built

    with artifacts.naming(path):
        return built(card["architecture"], card["num_classes"], tuple(card["image_shape"]), card.get("shapes"))


def opened(model: str | None) -> tuple[Ask, Intake]:
    """The model that a user names (`place_of`): an ONNX file where there is one, else in torch.

    Raises EpsdError: nothing of that name, or nothing that can be asked.
    """
    return _at(place_of(model))


def place_of(model: str | None) -> Path:
    """Where a model is: `champion`, `candidate`, a run, an address (`models:/epsd/3`), or a path (a folder, an ONNX
    file, weights with their card beside them, a compact file). None: what `evaluate` made of the network trained in
    this folder, or that itself where it has been trained again since.

    Raises EpsdError: nothing of that name.
    """
    if model is None:
        return artifacts.SERVED_MODEL if _is_current() else artifacts.TRAIN
    if model not in ("champion", "candidate") and Path(model).exists():
        return Path(model)
    from epsd.tracking import registered

    return registered.fetch(model)


def _is_current() -> bool:
    path = onnx_at(artifacts.SERVED_MODEL)
    if path is None or not artifacts.MODEL.is_file():
        return path is not None
    return OnnxFile(path).weights == digest_of(artifacts.MODEL)


def onnx_at(place: Path) -> Path | None:
    """The ONNX file of a place; None where it has none."""
    inside = place / "data" / FOLDER if (place / "MLmodel").is_file() else place
    path = place if place.suffix == ".onnx" else inside / FP32
    return path if path.is_file() else None


def _at(place: Path) -> tuple[Ask, Intake]:
    if path := onnx_at(place):
        found = OnnxFile(path)
        return found, Intake.of(found.card)
    if (place / "MLmodel").is_file():
        return _from_mlflow(place)
    from epsd.evaluation.servable import Servable, asking

    network, card = network_at(place)
    intake = Intake.of(card)
    return asking(Servable(network, intake)), intake


def network_at(place: Path) -> "tuple[nn.Module, Mapping[str, Any]]":
    """The network, with its card, of a compact file, of weights with their card beside them, or of the folder of these.

    Raises EpsdError.
    """
    from epsd.evaluation import compact_file

    if place.is_file() and compact_file.is_compact(place):
        state, card = compact_file.load(place)
        artifacts.valid(card, artifacts.Card, place)
        return artifacts.fill(_network(card, place), state, place), card
    weights = place if place.is_file() else place / artifacts.MODEL.name
    if weights.suffix != ".safetensors":
        raise ServingError(
            f"{place}: no folder with a model, no .onnx file, no .safetensors file with its .json beside it."
        )
    card = artifacts.read_card(weights.with_suffix(".json"))
    return trained_network(weights, card), card


def _from_mlflow(folder: Path) -> tuple[Ask, Intake]:
    """What was exported by torch, or could only be pickled."""
    from epsd.evaluation.servable import asking
    from epsd.tracking import models

    weights = folder / "extra_files" / artifacts.MODEL.name
    if weights.is_file():
        return _at(weights)
    return asking(models.load_exported(folder)), Intake.of(models.card_of(folder))


def predicted(places: Sequence[str], model: str | None, top: int, as_json: bool) -> Iterator[str]:
    """One line for each image: its most probable classes. Raises EpsdError before the first one where it can."""
    paths = find_images(places)
    ask, intake = opened(model)
    for answer in answers(ask, intake, paths, top):
        yield answer.as_json() if as_json else answer.line()


def hand_over(model: str | None, folder: Path) -> list[str]:
    """Write what it takes to ask a model elsewhere to a new `folder`: its ONNX files, or one made of its weights, the
    names of its classes, its card, and a script that needs onnxruntime, numpy and Pillow. Returns the files' names.

    Raises ArtifactError where `folder` is there already or cannot be written, EpsdError as `opened` does.
    """
    place = place_of(model)
    with artifacts.new_folder(folder) as made:
        _copy_or_make(place, made)
        card = OnnxFile(made / FP32).card
        artifacts.write_text(made / "class_names.txt", "\n".join([*card["class_names"], ""]))
        artifacts.write_json(made / artifacts.MODEL_CARD.name, card)
        for path in (SCRIPT, place / "extra_files" / artifacts.MODEL_README.name):
            if path.is_file():
                shutil.copyfile(path, made / path.name)
        return sorted(path.name for path in made.iterdir())


def _copy_or_make(place: Path, made: Path) -> None:
    if path := onnx_at(place):
        beside = [] if path == place else [path.with_name(INT8)]
        for source, name in ((path, FP32), *((other, other.name) for other in beside if other.is_file())):
            shutil.copyfile(source, made / name)
        return
    if (place / "MLmodel").is_file():
        raise ServingError(
            f"{place}: this model has no ONNX file. evaluate makes one where evaluate.export.onnx is true."
        )
    from epsd.pipeline import deploy

    network, card = network_at(place)
    deploy.export(network.eval(), card, place if place.is_file() else place / artifacts.MODEL.name, made / FP32)
