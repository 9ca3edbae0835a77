"""Small networks as the pipeline hands them on: an MLflow model's folder, and runs that hold one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from epsd.architectures import ARCHITECTURES, built
from epsd.detection import deploy as detection
from epsd.detectors import DETECTORS, Picture
from epsd.evaluation.deploy import export
from epsd.evaluation.intake import Intake
from epsd.evaluation.servable import Servable
from epsd.files.onnx_file import CARD, FOLDER, FP32, SCRIPT, OnnxFile
from epsd.project import artifacts
from epsd.registry import choose
from epsd.tracking import models
from epsd.voc.scenes import Scene
from toys import convnet

INTAKE = Intake(["ape", "bee", "cow"], (1, 4, 4), [0.3], [0.2])


NET = {"name": "resnet", "depth": 8, "width": 0.5}
DETECTOR_CARD: dict[str, Any] = {
    "dataset": "cells",
    "architecture": NET,
    "num_classes": 10,
    "class_names": list("0123456789"),
    "image_shape": [1, 8, 8],
    "mean": [0.3],
    "std": [0.35],
    "detector": {
        "name": "faster_rcnn",
        "finest_stride": 2,
        "extra_levels": 0,
        "channels": 16,
        "head_width": 32,
        "proposals": 40,
        "score_threshold": 0.0,
    },
    "detected": ["ape", "bée", "cow"],
    "typical_size": [32, 32],
}


def servable(seed: int = 0) -> Servable:
    """A convnet with batch norm for 1x4x4 images; another seed is another network."""
    network = convnet()
    torch.manual_seed(seed)
    nn.init.normal_(network[-1].weight)  # type: ignore[arg-type,union-attr]
    return Servable(network, INTAKE)


def contents(folder: Path, **more: Any) -> models.Contents:
    """With a page and a card as extra files."""
    card = INTAKE._asdict() if hasattr(INTAKE, "_asdict") else dict(vars(INTAKE))
    (folder / "model_card.md").write_text("# A model\n")
    (folder / "model.json").write_text(json.dumps(card))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 4, 4)).astype(np.float32)
    fields: dict[str, Any] = {
        "example": pixels,
        "network_sized": pixels,
        "classes": 3,
        "metadata": {"class_names": INTAKE.class_names, "card": json.dumps(card)},
        "files": [folder / "model_card.md", folder / "model.json"],
        "weights": [],
    }
    return models.Contents(**{**fields, **more})


def onnx_folder(parent: Path, seed: int = 0) -> Path:
    """A folder with the ONNX file of `servable(seed)`."""
    words = {CARD: json.dumps(vars(INTAKE))}
    images = torch.zeros(2, 1, 7, 5)
    export(servable(seed), images, ("batch", "height", "width"), parent / FOLDER / FP32, words)
    return parent / FOLDER


def model_folder(parent: Path, seed: int = 0) -> Path:
    """As it is handed on: an ONNX file that MLflow serves."""
    parent.mkdir(parents=True, exist_ok=True)
    given = contents(parent, onnx=onnx_folder(parent, seed), script=SCRIPT)
    assert models.write(parent / "model", servable(seed), given) == "onnx"
    return parent / "model"


def asked(folder: Path) -> OnnxFile:
    """The ONNX file of an MLflow model's folder."""
    return OnnxFile(folder / "data" / FOLDER / FP32)


def detector() -> nn.Module:
    """A small Faster R-CNN for grey pictures, with random weights, that reports many boxes."""
    torch.manual_seed(0)
    net = built(NET, 10, (1, 8, 8))
    nodes = choose(ARCHITECTURES, NET, "architecture").feature_nodes(net)
    return choose(DETECTORS, DETECTOR_CARD["detector"], "detector")(
        net, nodes, Picture(32, 32, [0.3], [0.35]), 3
    ).eval()


def save_detector(path: Path) -> nn.Module:
    """With its card, as the stage does it."""
    made = detector()
    artifacts.save_model(made, path, DETECTOR_CARD)
    return made


def detector_folder(parent: Path) -> Path:
    """Weights, and the model that is served, as `detect` leaves them; the folder of the latter."""
    made, weights, onnx = save_detector(parent / "model.safetensors"), parent / "model.safetensors", parent / FOLDER
    onnx.mkdir()
    detection.exported(made, DETECTOR_CARD, weights, onnx / FP32)
    Image.fromarray(photo()).save(parent / "example.png")
    nothing: Any = np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    scene = Scene("example", parent / "example.png", 32, 32, *nothing)
    detection.served(made, scene, DETECTOR_CARD, onnx, parent / "model", parent / "model.json")
    return parent / "model"


def photo(side: int = 32, seed: int = 0) -> Any:
    """Grey noise (side, side) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (side, side), dtype=np.uint8)


def exported_folder(parent: Path, seed: int = 0) -> Path:
    """Exported by torch: what is handed on where there is no ONNX file."""
    parent.mkdir(parents=True, exist_ok=True)
    parent.mkdir(parents=True, exist_ok=True)
    assert models.write(parent / "model", servable(seed), contents(parent)) == "pt2"
    return parent / "model"
