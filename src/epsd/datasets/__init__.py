"""The data sets that `dataset.name` (DATASETS) and `voc.name` (DEVKITS) can choose from: one file, one line each."""

from typing import Any

from epsd.datasets.digits import Digits
from epsd.datasets.image_folder import ImageFolder

DATASETS: dict[str, type[Any]] = {
    "digits": Digits,
    "image_folder": ImageFolder,
}

DEVKITS: dict[str, type[Any]] = {}
