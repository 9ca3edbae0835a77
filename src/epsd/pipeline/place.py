"""Where a model lies that is meant by a run, an alias, an address or a path: to ask it. Starts without torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from epsd.evaluation.intake import ServingError
from epsd.files.digests import digest_of
from epsd.files.onnx_file import FOLDER, FP32, OnnxFile
from epsd.project import artifacts
from epsd.project.runtime import note, quiet
from epsd.tracking import registered
from epsd.tracking.models import CANDIDATE, NAME
from epsd.tracking.models import DETECTOR as DETECTOR_NAME


class Kind(NamedTuple):
    """What a model is: its name in the registry, the command that asks it, what its stage handed on, its weights."""

    name: str
    command: str
    served: Path
    weights: Path


CLASSIFIER = Kind(NAME, "epsd predict", artifacts.SERVED_MODEL, artifacts.MODEL)
DETECTOR = Kind(DETECTOR_NAME, "epsd detect", artifacts.DETECT_MODEL, artifacts.DETECTOR)


def place_of(model: str | None, kind: Kind = CLASSIFIER) -> Path:
    """Where a model is: `champion`, `candidate`, a run, an address (`models:/epsd/3`), or a path (a folder, an ONNX
    file, weights with their card beside them, a compact file). None: what the stage made of the network trained in
    this folder, or that itself where it has been trained again since. Of a run without a registered model, its weights.

    Raises EpsdError: nothing of that name.
    """
    if model is None:
        return kind.served if _is_current(kind) else kind.weights.parent
    if not _is_alias(model) and Path(model).exists():
        return Path(model)
    try:
        return registered.fetch(model, kind.name)
    except registered.Unregistered as error:
        try:
            return registered.fetch_weights(model, kind.name)
        except registered.RegistryError:
            raise error from None


def _is_alias(model: str) -> bool:
    return model in (CANDIDATE, registered.CHAMPION)


def _is_current(kind: Kind) -> bool:
    path = onnx_at(kind.served)
    if path is None or not kind.weights.is_file():
        return path is not None
    return OnnxFile(path).weights == digest_of(kind.weights)


def onnx_at(place: Path) -> Path | None:
    """The ONNX file of a place; None where it has none."""
    inside = place / "data" / FOLDER if (place / "MLmodel").is_file() else place
    path = place if place.suffix == ".onnx" else inside / FP32
    return path if path.is_file() else None


def tell(kind: Kind, dataset: str, class_names: Sequence[str]) -> None:
    """On what the model that is asked was trained, where it says so."""
    if dataset and not quiet():
        note(f"{kind.command}: asks what was trained on {dataset} ({len(class_names)} classes).")


def inside(folder: Path) -> Path:
    """The weights in a folder, or the compact file; where they would be if it has neither."""
    both = [folder / artifacts.MODEL.name, folder / artifacts.SPARSE_MODEL.name]
    return next((path for path in both if path.is_file()), both[0])


def is_detector(card: Mapping[str, Any]) -> bool:
    """Whether a card is that of a detector."""
    return "detector" in card


def check_kind(card: Mapping[str, Any], kind: Kind, place: Path) -> None:
    """Raises ServingError where the model at `place` is none that the command of `kind` asks; it names the other."""
    found = DETECTOR if is_detector(card) else CLASSIFIER
    if found != kind:
        what = "a detector" if found == DETECTOR else "a classifier"
        raise ServingError(f"{place}: {what}, which `{found.command}` asks, not `{kind.command}`.")
