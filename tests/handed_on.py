"""Small networks as the pipeline hands them on: an MLflow model's folder, and runs that hold one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from epsd.evaluation.deploy import export
from epsd.evaluation.intake import Intake
from epsd.evaluation.servable import Servable
from epsd.files.onnx_file import CARD, FOLDER, FP32, OnnxFile
from epsd.pipeline.export import SCRIPT
from epsd.tracking import models
from toys import convnet

INTAKE = Intake(["ape", "bee", "cow"], (1, 4, 4), [0.3], [0.2])


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


def exported_folder(parent: Path, seed: int = 0) -> Path:
    """Exported by torch: what is handed on where there is no ONNX file."""
    parent.mkdir(parents=True, exist_ok=True)
    parent.mkdir(parents=True, exist_ok=True)
    assert models.write(parent / "model", servable(seed), contents(parent)) == "pt2"
    return parent / "model"
