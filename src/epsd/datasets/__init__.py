"""The data sets that `dataset.name` (DATASETS) and `voc.name` (DEVKITS) can choose from: one file, one line each."""

from typing import Any

from epsd.datasets.cifar import Cifar
from epsd.datasets.coco import Coco
from epsd.datasets.cub import Cub
from epsd.datasets.devkit import Devkit
from epsd.datasets.digit_scenes import DigitScenes
from epsd.datasets.digits import Digits
from epsd.datasets.image_folder import ImageFolder
from epsd.datasets.imagenet import Imagenet
from epsd.datasets.none import Nothing
from epsd.datasets.tiny_imagenet import TinyImagenet
from epsd.datasets.yolo import Yolo

DATASETS: dict[str, type[Any]] = {
    "digits": Digits,
    "image_folder": ImageFolder,
    "cifar": Cifar,
    "tiny_imagenet": TinyImagenet,
    "imagenet": Imagenet,
    "cub": Cub,
}

DEVKITS: dict[str, type[Any]] = {
    "digit_scenes": DigitScenes,
    "devkit": Devkit,
    "coco": Coco,
    "yolo": Yolo,
    "none": Nothing,
}
