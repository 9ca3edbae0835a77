"""A devkit in Pascal VOC's layout: VOC 2007, 2012, both together, or one of your own."""

from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from epsd.datasets.downloads import Published, fetch
from epsd.files.archives import ArchiveError, Tree, absent
from epsd.files.faults import few
from epsd.files.layouts import SPLITS, Split
from epsd.project.runtime import located
from epsd.project.settings import Place
from epsd.registry import variant
from epsd.voc.devkits import LISTS, Sets, from_pairs, from_sets, image_sets
from epsd.voc.entries import BoxReading, BoxSource, opened

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

USUAL: dict[Split, tuple[str, ...]] = {
    "train": ("trainval", "train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Names of lists, the first of which that is there is taken where none is named."""

Names = list[str]


@variant
class Devkit(BoxReading):
    """Pictures with boxes in one XML file each, as Everingham et al. published them (IJCV 88(2), 2010) and as labelling
    tools write them.

    A devkit folder holds `JPEGImages/<id>.jpg`, `Annotations/<id>.xml` and `ImageSets/Main/<set>.txt`, a list of ids.
    Without lists, pictures and XML files of one name belong together, in one folder or in two, and folders named train,
    valid and test are splits.

    Settings
    --------
    root : a folder, .zip or .tar that holds devkit folders at any depth (VOCdevkit/VOC2007, VOCdevkit/VOC2012, ...), or
        a folder of such archives, as they are published (VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar, ...).
    train, validation, test : image sets, each `<devkit folder>/<set>`, or `<set>` alone where only one folder has it.
        VOC 07+12 -> 07 test: train [VOC2007/trainval, VOC2012/trainval], test [VOC2007/test]. null: of every devkit
        folder the list trainval (or train), test, and val beside train (none beside trainval, which holds it, nor where
        `train` is named). Splits without a list are held out of train, by seed: data.validation and data.test of it.
    class_names : in the order of the labels, others are left out; null: the names in the training annotations,
        alphabetically.
    classes : spellings that mean one class: `{helmet: [Helmet, hard-hat]}`.
    bad_boxes : a box without area or outside its picture is an "error", or is left out ("drop") and counted.
    empty : a picture without boxes is an "error", or is kept as "background".
    unannotated : a picture without XML file is an "error", is left out ("skip"), or kept as "background".
    unreadable : a picture that is missing or damaged, or whose annotation is, is an "error", or left out ("skip") and
        named.
    limit : [1, ...) pictures per split, drawn by seed; null: all.
    title : what runs and figures call the data set; null: the name of its folder or archive.
    download : which of "2007", "2007-test", "2012" to fetch into the folder `root` where they are not there yet. It
        accepts the terms: the pictures are from flickr, whose terms of use hold.
    """

    root: Place
    train: Names | None = Field(default=None, min_length=1)
    validation: Names | None = None
    test: Names | None = Field(default=None, min_length=1)
    unannotated: Literal["error", "skip", "background"] = "error"
    download: list[Literal["2007", "2007-test", "2012"]] = Field(default_factory=list)

    @property
    def reading(self) -> dict[str, Any]:
        """Settings for `epsd.voc.annotations.read_index`."""
        return {**super().reading, "unannotated": self.unannotated}

    def __call__(self, folder: Path, *, seed: int, images: object = None, class_names: object = None) -> BoxSource:
        """The pictures by split. Those of archives will be kept below `folder`; folders are used in place.

        `seed`, `images`, `class_names` (of the classification stage) have no part in it.

        Raises ArchiveError: `root` is missing, damaged, points outside itself, or lacks an image set. DownloadError:
        see `epsd.datasets.downloads.fetch`. VocError: lists and annotations that cannot be used.
        """
        root = located(self.root)
        for part in self.download:
            _fetched(root, part)
        if not root.exists():
            names = ", ".join(published.name for published in PUBLISHED.values())
            raise ArchiveError(
                f"{absent(root)} For Pascal VOC place {names} there, or set voc.download; "
                "for a devkit of your own, set voc.root to its folder or archive."
            )
        tree = opened(root)
        found = list(image_sets(tree))
        if not found and (self.train or self.validation or self.test) is None:
            return from_pairs(tree, folder)
        return from_sets(tree, self._sets(tree, found), folder)

    def _sets(self, tree: Tree, found: Sequence[tuple[str, str]]) -> Sets:
        """The lists of each split; a split that has none, and is asked for, is missing."""
        sets: dict[Split, list[tuple[str, str]]] = {}
        for split in SPLITS:
            named: Names | None = getattr(self, split)
            if named is not None:
                sets[split] = [_find(found, name, tree) for name in named]
            elif usual := _usual(found, split):
                sets[split] = usual
        if "train" not in sets:
            sets["train"] = [_only(found, tree)]
        if self.validation is None and (self.train is not None or sets["train"][0][1] == "trainval"):
            sets["validation"] = []
        return sets


def _fetched(root: Path, part: str) -> None:
    """The published archive of one part in `root`, unless that part lies there unpacked."""
    year, _, split = part.partition("-")
    if not any(root.glob(f"**/VOC{year}/{LISTS}{split or 'trainval'}.txt")):
        fetch(PUBLISHED[part], root)


def _usual(found: Sequence[tuple[str, str]], split: Split) -> list[tuple[str, str]]:
    """The lists of that split in every devkit folder that has one."""
    have = {one for _, one in found}
    name = next((name for name in USUAL[split] if name in have), None)
    return [(folder, one) for folder, one in found if one == name]


def _only(found: Sequence[tuple[str, str]], tree: Tree) -> tuple[str, str]:
    """The list that is there, whatever its name: of those that are no other split, and of no single class."""
    others = {name for split in ("validation", "test") for name in USUAL[split]}
    fits = [one for one in found if one[1] not in others and "_" not in one[1]]
    if len(fits) == 1:
        return fits[0]
    raise ArchiveError(f"{tree.where}: which list is to be learnt? Set voc.train. It has: {_have(found)}.")


def _find(found: Sequence[tuple[str, str]], wanted: str, tree: Tree) -> tuple[str, str]:
    """The one devkit folder that ends in the wanted path and has the wanted set."""
    place = PurePosixPath(wanted)
    above = () if place.parent == PurePosixPath() else place.parent.parts
    fits = [
        (at, one) for at, one in found if one == place.name and (not above or _parts(at, tree)[-len(above) :] == above)
    ]
    if len(fits) == 1:
        return fits[0]
    fault = "has no" if not fits else "has more than one"
    raise ArchiveError(f"{tree.where}: {fault} image set '{wanted}' ({LISTS}{place.name}.txt). It has: {_have(found)}.")


def _parts(folder: str, tree: Tree) -> tuple[str, ...]:
    """Of a devkit folder's path, which may be the root itself."""
    return (*tree.where.parts, *PurePosixPath(folder).parts)


def _have(found: Iterable[tuple[str, str]]) -> str:
    names = sorted(f"{PurePosixPath(at).name}/{one}".lstrip("/") for at, one in found if "_" not in one)
    return few(names) or "(none)"
