"""Ask a detector about pictures: `epsd detect`. An ONNX file is asked without torch, as `epsd predict` asks one."""

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from epsd.detection.average_precision import Detections
from epsd.detection.drawing import annotated
from epsd.evaluation.intake import find_images, unreadable
from epsd.files.images import ImageError, decode, pixels
from epsd.files.onnx_file import OnnxFile
from epsd.files.regular import read_bytes
from epsd.pipeline.place import DETECTOR, check_kind, onnx_at, place_of, tell
from epsd.project import artifacts

Outputs = Mapping[str, NDArray[Any]]
"""`boxes` (n, 4) in pixels, `labels` (n,) from 1, `scores` (n,)."""


class Finder(NamedTuple):
    """A detector as it is asked: `ask` a picture (C, H, W), values 0 to 1."""

    ask: Callable[[NDArray[np.float32]], Outputs]
    class_names: list[str]
    channels: int
    dataset: str = ""

    def find(self, picture: Image.Image, threshold: float) -> Detections:
        """What it finds with at least that score, best first; labels from 0."""
        found = self.ask(pixels(picture).astype(np.float32) / np.float32(255))
        order = np.argsort(-found["scores"], kind="stable")
        order = order[found["scores"][order] >= threshold]
        boxes, scores = (found[name][order].astype(np.float64) for name in ("boxes", "scores"))
        return Detections(boxes, scores, found["labels"][order].astype(np.int64) - 1)


class Options(NamedTuple):
    """`threshold`: score from which a detection counts. `out`: folder for the pictures with their boxes."""

    threshold: float
    out: Path | None
    as_json: bool


def detected(places: Sequence[str], model: str | None, options: Options) -> Iterator[str]:
    """One line for each picture: what is on it, with score and box.

    Raises EpsdError before the first one where it can; after the answers to all others, ImageError for files that
    cannot be read.
    """
    paths = find_images(places)
    finder = opened(model)
    if options.out is not None:
        artifacts.check_writable(options.out)
    tell(DETECTOR, finder.dataset, finder.class_names)
    names, broken = _names(paths), []
    for path in paths:
        try:
            picture = _read(path, finder.channels)
        except ImageError as error:
            broken.append(error)
            continue
        found = finder.find(picture, options.threshold)
        if options.out is not None:
            _draw(picture, found, finder.class_names, options.out / names[path])
        told = as_json if options.as_json else line
        yield told(str(path), found, finder.class_names, options.threshold)
    if broken:
        raise unreadable(broken, len(paths))


def opened(model: str | None) -> Finder:
    """The detector that a user names (`place_of`): its ONNX file where there is one, else in torch.

    Raises EpsdError: nothing of that name, or no detector.
    """
    place = place_of(model, DETECTOR)
    path = onnx_at(place)
    if path is None:
        return _in_torch(place)
    file = OnnxFile(path)
    return _finder(file.outputs, file.card, place)


def _in_torch(place: Path) -> Finder:
    import torch

    from epsd.pipeline.load import network_at

    network, card = network_at(place)
    network.eval()

    def ask(picture: NDArray[np.float32]) -> Outputs:
        with torch.no_grad():
            return {name: tensor.numpy() for name, tensor in network([torch.from_numpy(picture)])[0].items()}

    return _finder(ask, card, place)


def _finder(ask: Callable[[NDArray[np.float32]], Outputs], card: Mapping[str, Any], place: Path) -> Finder:
    check_kind(card, DETECTOR, place)
    about = artifacts.valid(card, artifacts.DetectorCard, place)
    return Finder(ask, about.detected, about.image_shape[0], about.dataset)


def _read(path: Path, channels: int) -> Image.Image:
    try:
        content = read_bytes(path)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}.") from None
    return decode(content, str(path), grayscale=channels == 1)


# --- what is said ---------------------------------------------------------------------------------------------------


def line(image: str, found: Detections, class_names: Sequence[str], threshold: float) -> str:
    """For a person: class, score and box (left, top, right, bottom in pixels) of each."""
    told = [
        f"{name} {score:.2f} ({', '.join(f'{side:.0f}' for side in box)})"
        for name, score, box in _named(found, class_names)
    ]
    shown = image.encode("utf-8", "backslashreplace").decode()  # a file's name need not be text
    return f"{shown}: {', '.join(told) or f'nothing of score {threshold:g} or more'}"


def as_json(image: str, found: Detections, class_names: Sequence[str], threshold: float) -> str:
    """For a program."""
    told = [{"class": name, "score": score, "box": box} for name, score, box in _named(found, class_names)]
    return json.dumps({"image": image, "threshold": threshold, "detections": told})


def _named(found: Detections, class_names: Sequence[str]) -> Iterator[tuple[str, float, list[float]]]:
    for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        yield class_names[label], score, box


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name of each drawn picture: that of its file, numbered where several are called so."""
    found: dict[Path, str] = {}
    taken: set[str] = set()
    for path in dict.fromkeys(paths):
        stems = itertools.chain([path.stem], (f"{path.stem}-{number}" for number in itertools.count(2)))
        found[path] = next(f"{stem}.png" for stem in stems if f"{stem}.png" not in taken)
        taken.add(found[path])
    return found


def _draw(picture: Image.Image, found: Detections, class_names: Sequence[str], path: Path) -> None:
    annotated(picture, found, class_names).save(content := io.BytesIO(), "PNG")
    with artifacts.replacing(path) as temporary:
        temporary.write_bytes(content.getvalue())
