"""Small networks as the pipeline hands them on: an MLflow model's folder, and runs that hold one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from epsd.evaluation.servable import Intake, Servable
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


def model_folder(parent: Path, seed: int = 0) -> Path:
    """Exported."""
    parent.mkdir(parents=True, exist_ok=True)
    assert models.write(parent / "model", servable(seed), contents(parent)) == "pt2"
    return parent / "model"
