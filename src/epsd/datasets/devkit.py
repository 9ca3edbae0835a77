"""A devkit in Pascal VOC's layout: VOC 2007, 2012, both together, or one of your own."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from epsd.datasets.downloads import Published, fetch
from epsd.files.archives import ArchiveError, Tree, is_archive, open_tree, unpack
from epsd.files.layouts import UNPACKED
from epsd.project.runtime import located
from epsd.project.settings import Count, Place
from epsd.registry import variant

SITE = "http://host.robots.ox.ac.uk/pascal/VOC"
PUBLISHED = {
    "2007": Published(
        "VOCtrainval_06-Nov-2007.tar",
        f"{SITE}/voc2007/VOCtrainval_06-Nov-2007.tar",
        "md5:c52e279531787c972589f7e41ab4ae64",
    ),
    "2007-test": Published(
        "VOCtest_06-Nov-2007.tar", f"{SITE}/voc2007/VOCtest_06-Nov-2007.tar", "md5:b6e924de25625d8de591ea690078ad9f"
    ),
    "2012": Published(
        "VOCtrainval_11-May-2012.tar",
        f"{SITE}/voc2012/VOCtrainval_11-May-2012.tar",
        "md5:6cd6e144f989b92b3379bac3b3de84fd",
    ),
}
"""What the organisers publish (0.4, 0.4 and 1.9 GB). Addresses and checksums are those that torchvision uses."""

PARTS = ("ImageSets/Main/", "Annotations/", "JPEGImages/")


@variant
class Devkit:
    """Pictures with boxes, laid out as Everingham et al. published them (IJCV 88(2), 2010).

    A devkit folder holds `JPEGImages/<id>.jpg`, `Annotations/<id>.xml` and `ImageSets/Main/<set>.txt`, a list of ids.

    Settings
    --------
    root : a folder, .zip or .tar that holds devkit folders at any depth (VOCdevkit/VOC2007, VOCdevkit/VOC2012, ...), or
        a folder of such archives, as they are published (VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar, ...).
    train, validation, test : image sets, each `<devkit folder>/<set>`, or `<set>` alone where only one folder has it.
        VOC 07+12 -> 07 test: train [VOC2007/trainval, VOC2012/trainval], test [VOC2007/test].
    class_names : in the order of the labels; null: the names in the training annotations, alphabetically.
    bad_boxes : a box without area or outside its picture is an "error", or is left out ("drop") and counted.
    empty : a picture without boxes is an "error", or is kept as "background".
    limit : [1, ...) pictures per split, drawn by seed; null: all.
    download : which of "2007", "2007-test", "2012" to fetch into the folder `root` where they are not there yet. It
        accepts the terms: the pictures are from flickr, whose terms of use hold.
    """

    root: Place
    train: list[str] = Field(default_factory=lambda: ["VOC2007/trainval"], min_length=1)
    validation: list[str] = Field(default_factory=list)
    test: list[str] = Field(default_factory=lambda: ["VOC2007/test"], min_length=1)
    class_names: list[str] | None = None
    bad_boxes: Literal["error", "drop"] = "error"
    empty: Literal["error", "background"] = "error"
    limit: Count | None = None
    download: list[Literal["2007", "2007-test", "2012"]] = Field(default_factory=list)

    @property
    def reading(self) -> dict[str, Any]:
        """Settings for `epsd.voc.annotations.read_index`."""
        return {
            "class_names": self.class_names,
            "bad_boxes": self.bad_boxes,
            "empty": self.empty,
            "limit": self.limit,
        }

    def __call__(
        self, folder: Path, *, seed: int, images: object = None, class_names: object = None
    ) -> dict[str, list[tuple[Path, str]]]:
        """Split -> (devkit folder, image set) pairs. Archives are unpacked below `folder`, into a folder that is made
        anew; folders are used in place.

        `seed`, `images`, `class_names` (of the classification stage) have no part in it.

        Raises ArchiveError: `root` is missing, damaged, points outside itself, or lacks an image set. DownloadError:
        see `epsd.datasets.downloads.fetch`.
        """
        root = located(self.root)
        for part in self.download:
            _fetched(root, part)
        if not root.exists():
            names = ", ".join(published.name for published in PUBLISHED.values())
            raise ArchiveError(
                f"{root}: no such folder or archive. For Pascal VOC place {names} there, or set voc.download; "
                "for a devkit of your own, set voc.root to its folder or archive."
            )
        found = list(_devkits(root, folder))
        return {
            split: [_find(found, name, self.root) for name in getattr(self, split)]
            for split in ("train", "validation", "test")
        }


def _fetched(root: Path, part: str) -> None:
    """The published archive of one part in `root`, unless that part lies there unpacked."""
    year, _, split = part.partition("-")
    if not any(root.glob(f"**/VOC{year}/ImageSets/Main/{split or 'trainval'}.txt")):
        fetch(PUBLISHED[part], root)


def _devkits(root: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Every (devkit folder, image set) below `root`, once its archives are unpacked."""
    tree = open_tree(root)
    if not root.is_dir():
        tree = _unpacked([tree], folder)
    elif not any(_is_set(name) for name in tree.names):
        archives = [root / name for name in tree.names if "/" not in name and is_archive(root / name)]
        tree = _unpacked([open_tree(path) for path in archives], folder) if archives else tree
    for name in filter(_is_set, tree.names):
        path = tree.where / name
        yield path.parents[2], path.stem


def _unpacked(trees: Sequence[Tree], folder: Path) -> Tree:
    """What is needed of the archives, in a fresh folder of its own: beside it may lie what another variant has left."""
    target = folder / UNPACKED
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unpacking.", dir=folder) as temporary:
        fresh = Path(temporary) / UNPACKED
        fresh.mkdir()
        for tree in trees:
            unpack(tree, [name for name in tree.names if any(part in f"/{name}" for part in PARTS)], fresh)
        shutil.rmtree(target, ignore_errors=True)
        fresh.rename(target)
    return open_tree(target)


def _is_set(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix == ".txt" and f"/{path.parent}".endswith("/ImageSets/Main")


def _find(found: Sequence[tuple[Path, str]], wanted: str, root: str) -> tuple[Path, str]:
    """The one devkit folder that ends in the wanted path and has the wanted set."""
    *parents, name = PurePosixPath(wanted).parts
    depth = len(parts) if (parts := tuple(parents)) else 0
    fits = [(path, one) for path, one in found if one == name and path.parts[len(path.parts) - depth :] == parts]
    if len(fits) == 1:
        return fits[0]
    have = ", ".join(sorted(f"{path.name}/{one}" for path, one in found if "_" not in one)) or "(none)"
    fault = "has no" if not fits else "has more than one"
    raise ArchiveError(f"{root}: {fault} image set '{wanted}' (ImageSets/Main/{name}.txt). It has: {have}.")
