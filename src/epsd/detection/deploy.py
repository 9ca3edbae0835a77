"""A detector as an ONNX file, decoding and suppression of boxes included, compared with torch and timed beside it."""

import copy
import functools
import io
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from epsd.compute import timing
from epsd.compute.devices import Machine
from epsd.detection.average_precision import Detections
from epsd.detection.pictures import Pictures
from epsd.detection.score import as_detections
from epsd.files.digests import digest_of
from epsd.files.onnx_file import CARD, SCRIPT, WEIGHTS, OnnxFile, fill, save, silently
from epsd.project.runtime import brief, note
from epsd.tracking import models
from epsd.voc.annotations import read_picture
from epsd.voc.scenes import Scene

OPSET = 17
"""Of torch's tracing exporter: `torch.export` cannot take what torchvision does with boxes."""


def export(detector: nn.Module, picture: Tensor, path: Path, words: Mapping[str, str]) -> None:
    """Write `detector` (torchvision's interface, in evaluation mode, on the processor) to `path`.

    The file takes one picture (C, H, W) of any size, values 0 to 1, as `images`, and gives `boxes` (n, 4) in its
    pixels, `labels` (n,) from 1 and `scores` (n,). `picture` is an example.

    Raises nearly any type of error where torch cannot export it; OSError where the file cannot be written.
    """
    import onnx

    with torch.no_grad():
        names = list(detector([picture])[0])
    with silently(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's: what it takes for constant is so in torchvision's detectors
        torch.onnx.export(
            detector,
            ([picture],),
            path,
            input_names=["images"],
            output_names=names,
            dynamic_axes={"images": {1: "height", 2: "width"}, **{name: {0: "boxes"} for name in names}},
            opset_version=OPSET,
            dynamo=False,
        )
    save(onnx.load(path), path, words)


def words(card: Mapping[str, Any], weights: Path) -> dict[str, str]:
    """Metadata of a file: the card, and the digest of the weights that it is made of."""
    return {CARD: json.dumps(card), WEIGHTS: digest_of(weights)}


def exported(detector: nn.Module, card: Mapping[str, Any], weights: Path, path: Path) -> None:
    """Write `detector` as it comes from its `weights`, without an example at hand. Errors: see `export`."""
    picture = torch.rand(card["image_shape"][0], *card["typical_size"])
    export(copy.deepcopy(detector).cpu().eval(), picture, path, words(card, weights))


COMPARED = 32
"""Test pictures in which what the file finds is compared with what torch finds, each alone."""


def deployed(
    detector: nn.Module,
    scenes: Sequence[Scene],
    card: Mapping[str, Any],
    weights: Path,
    path: Path,
    machine: Machine,
    repeats: int,
) -> dict[str, float]:
    """Write `detector`, saved as `weights`, to `path`. Its bytes, agreement with torch on some of `scenes`, and the
    time of one picture in torch and in ONNX, beside the dense twin (the same detector with a number for every zero).

    {} where torch cannot export it; a line says why.
    """
    here = copy.deepcopy(detector).cpu().eval()
    pictures = Pictures(scenes[:COMPARED], card["image_shape"][0])
    samples = [pictures[place][0] for place in range(len(pictures))]
    try:
        export(here, samples[0], path, words(card, weights))
    except OSError:  # a full disk
        raise
    except Exception as error:  # torch's exporter raises nearly any type
        note(f"detect: no ONNX file: torch cannot export this detector ({type(error).__name__}: {brief(error)}).")
        return {}
    same = agreement(_found(here, samples), _found(OnnxDetector(path), samples))
    figures = {"onnx_bytes": float(path.stat().st_size), "onnx_agreement": same}
    times = _timed(here, path, samples[0], Machine(threads=machine.threads), repeats)
    return figures | {f"latency_{name}": value for name, value in times.items()}


@torch.no_grad()
def _found(module: nn.Module, samples: Sequence[Tensor]) -> list[Detections]:
    return [as_detections(module([picture])[0]) for picture in samples]


def _timed(here: nn.Module, path: Path, picture: Tensor, machine: Machine, repeats: int) -> dict[str, float]:
    modules, session = {"torch": here, "dense_torch": timing.filled(here)}, functools.cache(OnnxFile)
    with tempfile.TemporaryDirectory() as elsewhere:
        files = {"onnx": path, "dense_onnx": Path(elsewhere) / path.name}
        fill(path, files["dense_onnx"])

        def passes(threads: int, batch: int) -> dict[str, timing.Pass]:
            found = {form: timing.in_torch(module, [picture]) for form, module in modules.items()}
            onnx = {form: session(file, threads).outputs for form, file in files.items()}
            return found | {form: functools.partial(ask, picture.numpy()) for form, ask in onnx.items()}

        return timing.sweep(passes, [1], machine, repeats)


EXAMPLE_UP_TO = 64
"""Pixels on the longer side of the input example: it is stored as text, and any size is accepted."""


def served(detector: nn.Module, scene: Scene, card: Mapping[str, Any], onnx: Path, folder: Path, about: Path) -> None:
    """Write the MLflow model around the ONNX file in the folder `onnx` to `folder`, the file `about` beside it."""
    pixels = read_picture(scene, card["image_shape"][0])
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    picture.thumbnail((EXAMPLE_UP_TO, EXAMPLE_UP_TO))
    picture.save(content := io.BytesIO(), "PNG")
    metadata = {"class_names": list(card["detected"]), "card": json.dumps(card)}
    here = copy.deepcopy(detector).cpu()
    models.write_detector(folder, here, content.getvalue(), metadata, onnx=onnx, script=SCRIPT, files=[about])


class OnnxDetector(nn.Module):
    """The file with torchvision's interface: pictures -> one mapping of tensors each, one after the other."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__()
        self.file = OnnxFile(path, threads)

    def forward(self, pictures: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """(C, H, W) each, values 0 to 1."""
        said = [self.file.outputs(picture.cpu().numpy()) for picture in pictures]
        return [{name: torch.from_numpy(array) for name, array in one.items()} for one in said]


def agreement(found: Sequence[Detections], other: Sequence[Detections], pixels: float = 1.0) -> float:
    """Share of the pictures in which both found as much, of the same classes, at the same places within `pixels`."""
    return float(np.mean([_alike(one, two, pixels) for one, two in zip(found, other, strict=True)]))


def _alike(one: Detections, two: Detections, pixels: float) -> bool:
    if len(one.labels) != len(two.labels) or not len(one.labels):
        return len(one.labels) == len(two.labels)
    gaps = np.abs(one.boxes[:, None] - two.boxes[None]).max(axis=2)
    gaps[one.labels[:, None] != two.labels[None]] = np.inf
    return bool(max(gaps.min(axis=0).max(), gaps.min(axis=1).max()) <= pixels)
