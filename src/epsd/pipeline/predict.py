"""Ask a classifier about images: `epsd predict`. An ONNX file is asked without torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from epsd.evaluation.intake import Ask, Intake, answers, find_images
from epsd.files.onnx_file import OnnxFile
from epsd.pipeline.place import CLASSIFIER, check_kind, onnx_at, place_of, tell
from epsd.project import artifacts


def predicted(places: Sequence[str], model: str | None, top: int, as_json: bool) -> Iterator[str]:
    """One line for each image: its most probable classes. Raises EpsdError before the first one where it can."""
    paths = find_images(places)
    ask, intake = opened(model)
    tell(CLASSIFIER, intake.dataset, intake.class_names)
    for answer in answers(ask, intake, paths, top):
        yield answer.as_json() if as_json else answer.line()


def opened(model: str | None) -> tuple[Ask, Intake]:
    """The model that a user names (`place_of`): an ONNX file where there is one, else in torch.

    Raises EpsdError: nothing of that name, or nothing that can be asked.
    """
    return _at(place_of(model))


def _at(place: Path) -> tuple[Ask, Intake]:
    if path := onnx_at(place):
        found = OnnxFile(path)
        check_kind(found.card, CLASSIFIER, place)
        return found, Intake.of(found.card)
    if (place / "MLmodel").is_file():
        return _from_mlflow(place)
    from epsd.evaluation.servable import Servable, asking
    from epsd.pipeline.load import network_at

    network, card = network_at(place)
    check_kind(card, CLASSIFIER, place)
    intake = Intake.of(card)
    return asking(Servable(network, intake)), intake


def _from_mlflow(folder: Path) -> tuple[Ask, Intake]:
    """What was exported by torch, or could only be pickled."""
    from epsd.evaluation.servable import asking
    from epsd.tracking import models

    weights = folder / "extra_files" / artifacts.MODEL.name
    if weights.is_file():
        return _at(weights)
    return asking(models.load_exported(folder)), Intake.of(models.card_of(folder))
