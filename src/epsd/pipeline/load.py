"""A trained network given back as a module, from wherever it lies: the library's `epsd.load`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from epsd.architectures import ARCHITECTURES
from epsd.detectors import DETECTORS, Picture
from epsd.evaluation import compact_file
from epsd.evaluation.intake import ServingError
from epsd.pipeline.export import network_of
from epsd.pipeline.place import inside, is_detector
from epsd.pipeline.weights import weights_of
from epsd.project import artifacts
from epsd.registry import choose


def load(path_or_run: str | Path) -> nn.Module:
    """A trained network, classifier or detector, ready to be asked or trained further: on the CPU, in evaluation mode.

    path_or_run : a weights file (.safetensors with its card beside it, or a compact file), a folder with one
        (`artifacts`, a project), an MLflow run (its id, the beginning of it, its name), `champion`, `candidate`, or an
        address of the registry (`models:/epsd@champion`, `models:/epsd-detector/2`). A network that was made narrow
        comes back narrow; where weights were removed it has zeros, which `Mask.of` finds.

    Raises ArtifactError (nothing there, or weights of another network), DamagedFile, RegistryError.
    """
    return network_at(weights_of(path_or_run))[0].eval()


def network_at(place: Path) -> tuple[nn.Module, Mapping[str, Any]]:
    """The network, with its card, of a compact file, of weights with their card beside them, or of the folder of these.

    Raises EpsdError.
    """
    if place.is_file() and compact_file.is_compact(place):
        state, card = compact_file.load(place)
        artifacts.valid(card, artifacts.Card, place)
        return artifacts.fill(_built(card, place), state, place), card
    weights = place if place.is_file() else inside(place)
    if weights.suffix != ".safetensors":
        raise ServingError(
            f"{place}: no folder with a model, no .onnx file, no .safetensors file with its .json beside it."
        )
    path = weights.with_suffix(".json")
    card = artifacts.read_card(path)
    return artifacts.load_into(_built(card, path), weights), card


def _built(card: Mapping[str, Any], path: Path) -> nn.Module:
    """The network or detector of a card, read from `path`, with weights drawn anew."""
    network = network_of(card, path)
    if not is_detector(card):
        return network
    about = artifacts.valid(card, artifacts.DetectorCard, path)
    with artifacts.naming(path):
        nodes = choose(ARCHITECTURES, card["architecture"], "architecture").feature_nodes(network)
        picture = Picture(*about.typical_size, about.mean, about.std)
        return choose(DETECTORS, about.detector, "detector")(network, nodes, picture, len(about.detected))
