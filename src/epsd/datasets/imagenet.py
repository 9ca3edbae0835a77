"""ImageNet (ILSVRC 2012): 1,281,167 training and 50,000 validation photographs in 1,000 classes, streamed from files.

O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 115(3), 2015. Its terms ask for
registration, so nothing is downloaded here. The labels of its test images are not public: as in the literature, the
official validation images are the test split here, and validation is carved from train.
"""

import io
import re
from typing import Any

from epsd.files.archives import Tree, open_tree
from epsd.files.images import is_image
from epsd.files.layouts import (
    Labelled,
    Reading,
    Source,
    SourceError,
    Split,
    Unreadable,
    below,
    check_apart,
    labelled,
    unread,
)
from epsd.project.runtime import located
from epsd.project.settings import Place, Side
from epsd.registry import variant

SITE = "https://image-net.org/download-images"
DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_STRAY = "has no folder below train/"
_META = "data/meta.mat"
_HOW = (
    f"Unpack ILSVRC2012_img_train.tar (one folder per synset) into train/ and ILSVRC2012_img_val.tar into val/; "
    f"both are to be had at {SITE} after registration."
)


@variant
class Imagenet:
    """`root`: folder with `train/<synset>/*.JPEG` and `val/`, either `val/<synset>/*.JPEG` or all images flat.

    Flat ones are labelled by the development kit, `ILSVRC2012_devkit_t12/` or its .tar.gz beside them. `size`,
    `resize`: side of the network's square, and of the shorter side before it is cut, in pixels.
    `unreadable`: "error" stops at a damaged image, "skip" leaves it out and counts it.
    """

    root: Place = "data/imagenet"
    size: Side = 224
    resize: Side | None = 256
    unreadable: Unreadable = "error"

    def __call__(self) -> Source:
        """Class names are the synsets, sorted; any subset of the 1,000 will do."""
        root = located(self.root)
        if not root.exists():
            raise SourceError(f"{root}: nothing there. {_HOW}")
        tree = open_tree(root)
        train = [name for name in tree.names if name.startswith("train/") and is_image(name)]
        val = [name for name in tree.names if name.startswith("val/") and is_image(name)]
        if not train or not val:
            raise SourceError(f"{root}: has no images in '{'val' if train else 'train'}/'. {_HOW}")
        check_apart(tree, {"train": train, "test": val})
        class_names = sorted(folder[len("train/") :] for folder in tree.folders if _level(folder, "train/") == 0)
        number = {name: i for i, name in enumerate(class_names)}
        synsets = (
            _flat(tree, val) if all(_level(name, "val/") == 0 for name in val) else [_synset(name) for name in val]
        )
        splits: dict[Split, Labelled] = {
            "train": labelled(tree, train, map(_synset, train), number, _STRAY),
            "test": labelled(tree, val, synsets, number, _STRAY),
        }
        reading = Reading(self.size, self.resize, unreadable=self.unreadable)
        left_out = unread(name for name in tree.names if name.startswith(("train/", "val/")))
        return Source(f"ImageNet ({root})", class_names, splits, reading, left_out)


def _level(name: str, start: str) -> int:
    """How many folders below `start` a name lies; -1: not below it."""
    return name[len(start) :].count("/") if name.startswith(start) else -1


def _synset(name: str) -> str:
    """The folder below train/ or val/."""
    return name.split("/")[1]


def _flat(tree: Tree, names: list[str]) -> list[str]:
    """The synset of each val/ILSVRC2012_val_<number>.JPEG, by the development kit."""
    kit, top = _devkit(tree)
    truth = kit.text(f"{top}{_TRUTH}").split()
    synset = _synsets(kit.read(f"{top}{_META}"), kit)
    found = []
    for name in names:
        match = re.search(r"_(\d+)\.\w+$", name)
        line = int(match[1]) if match else 0
        if not 1 <= line <= len(truth) or truth[line - 1] not in synset:
            raise SourceError(f"{tree.where}: '{name}' has no line in the development kit's ground truth.")
        found.append(synset[truth[line - 1]])
    return found


def _devkit(tree: Tree) -> tuple[Tree, str]:
    """The kit's files: unpacked beside train/ and val/, or in its .tar.gz there."""
    if f"{DEVKIT}/{_TRUTH}" in tree.names:
        return tree, f"{DEVKIT}/"
    archive = tree.where / f"{DEVKIT}.tar.gz"
    if not archive.is_file():
        what = f"{DEVKIT}.tar.gz (from {SITE}) or its unpacked folder"
        raise SourceError(f"{tree.where}: val/ is flat, so its labels are needed: place {what} there.")
    kit = open_tree(archive)
    return kit, below(kit, _TRUTH)


def _synsets(meta: bytes, kit: Tree) -> dict[str, str]:
    """ILSVRC2012_ID as written in the ground truth -> WordNet id, from meta.mat (a MATLAB 5 file)."""
    from scipy.io import loadmat

    try:
        rows: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    except Exception as error:  # scipy raises nearly any type on a damaged file
        raise SourceError(f"{kit.where}: '{_META}' cannot be read ({error}).") from None
