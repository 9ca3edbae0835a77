"""Detection data sets as they are found: the pictures of a folder or archive by split, with what is said of them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from epsd.files.archives import Several, Tree, is_archive, open_tree
from epsd.files.images import is_image
from epsd.files.layouts import SPLIT_FOLDERS, Split
from epsd.project.settings import Count, Text
from epsd.registry import settings_of, variant
from epsd.voc.scenes import Floats

Strict = Literal["error", "background"]
Family = tuple[str, str]
"""What a picture and the file with its boxes have in common: see `family`."""

_KINDS = {
    *("images", "image", "imgs", "img", "jpegimages", "pictures", "pics", "photos"),
    *("annotations", "annotation", "annots", "xml", "xmls", "labels", "label"),
}
"""Names of folders, in lower case, that say what kind of file lies there and nothing of which picture it is."""
_ENDINGS = (".xml", ".txt", ".json")


class Annotation(NamedTuple):
    """What is said of one picture: n objects in order.

    `boxes` (n, 4), left, top, right, bottom as corners of pixels, or (`relative`) as shares of the sides of the picture
    as it is meant to be seen. `size`: the (width, height) that is stated, None where none is. `first`: the number of
    the first pixel where the file counts both ends of a box, 1 for VOC; 0: it gives corners. `swapped`: boxes whose
    corners were in the wrong order; `polygons`: those that were drawn around a polygon.
    """

    names: list[str]
    boxes: Floats
    difficult: npt.NDArray[np.bool_]
    size: tuple[int, int] | None = None
    first: int = 0
    relative: bool = False
    swapped: int = 0
    polygons: int = 0


def annotation(
    names: list[str], corners: Sequence[Sequence[float]], difficult: Sequence[bool], *, first: int = 0, **others: Any
) -> Annotation:
    """From corners as a file gives them, (n, 4): those in the wrong order are swapped back and counted."""
    given = np.asarray(corners, dtype=np.float64).reshape(-1, 2, 2)
    ends = np.sort(given, axis=1)
    ends[:, 0] -= first
    swapped = int((given[:, 0] > given[:, 1]).any(1).sum())
    flags = np.asarray(difficult, dtype=np.bool_)
    return Annotation(names, ends.reshape(-1, 4), flags, first=first, swapped=swapped, **others)


class Entry(NamedTuple):
    """A picture that a data set names.

    `image`: its file in the tree; None: there is none, though `listed` names it. `annotation`: None: nothing is said of
    it, or nothing that can be used (`fault`). `where`: the file that says it, or should, for messages.
    """

    id: str
    image: str | None
    annotation: Annotation | None
    where: str
    listed: str
    fault: str = ""


@dataclass(frozen=True)
class BoxSource:
    """A detection data set as found. Of `splits`, those that are missing are held out of "train".

    `folder`: below it the pictures out of an archive are kept. `order`: class names in the data set's own order; the
    others follow alphabetically. `notes`: what was left out already, in plain words.
    """

    tree: Tree
    folder: Path
    splits: Mapping[Split, Sequence[Entry]]
    order: Sequence[str] = ()
    notes: Sequence[str] = ()


@variant
class BoxReading:
    """Settings that all detection data sets of one's own have: see `epsd.voc.annotations.read_index`.

    title : what runs and figures call the data set; null: the name of its folder or archive.
    """

    title: Text | None = None
    class_names: list[str] | None = Field(default=None, min_length=1)
    classes: dict[str, list[str]] = Field(default_factory=dict)
    bad_boxes: Literal["error", "drop"] = "error"
    empty: Strict = "error"
    unreadable: Literal["error", "skip"] = "error"
    limit: Count | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """Settings for `epsd.voc.annotations.read_index`."""
        return {name: getattr(self, name) for name in settings_of(BoxReading) if name != "title"}


def opened(root: Path) -> Tree:
    """The folder or archive. A folder without pictures that holds archives, as they are published: all of these.

    Raises ArchiveError.
    """
    tree = open_tree(root)
    if not root.is_dir() or any(map(is_image, tree.names)):
        return tree
    archives = [root / name for name in tree.names if "/" not in name and is_archive(root / name)]
    return Several(root, [open_tree(path) for path in archives]) if archives else tree


_SIGNS = {"devkit": (".xml",), "yolo": ("data.yaml", "classes.txt", "obj.names"), "coco": (".json",)}
"""Name of a variant of `voc` -> how files end that it reads."""


def looks_like(tree: Tree, own: str) -> str:
    """A sentence for whoever chose `own`, which found nothing: what else the files may be; "": nothing known."""
    names = [name.lower() for name in tree.names]
    fits = [kind for kind, signs in _SIGNS.items() if kind != own and any(name.endswith(signs) for name in names)]
    return f" It looks like voc.name: {' or '.join(fits)}." if fits else ""


def stem(name: str) -> str:
    """The last part of a name, without the ending of a picture or of a file with boxes; other dots stay."""
    path = PurePosixPath(name)
    return path.stem if is_image(name) or path.suffix.lower() in _ENDINGS else path.name


def family(name: str) -> Family:
    """The folder, without the words that only say what kind of file lies there, and the stem.

    `train/images/a.jpg`, `images/train/a.png`, `train/labels/a.txt` and `train/a.xml` are all of ("train", "a").
    """
    return "/".join(part for part in PurePosixPath(name).parent.parts if part.casefold() not in _KINDS), stem(name)


def families(names: Iterable[str]) -> dict[Family, str]:
    """The first of the files of each family."""
    found: dict[Family, str] = {}
    for name in names:
        found.setdefault(family(name), name)
    return found


def partners(names: Sequence[str], pictures: Iterable[str]) -> dict[str, str]:
    """File with boxes -> its picture: of its family, or else the only one of its stem that has no other file and is of
    its split. Those without are left out.
    """
    by_family, by_stem = families(pictures), dict[str, list[str]]()
    found = {name: by_family[family(name)] for name in names if family(name) in by_family}
    for picture in set(by_family.values()) - set(found.values()):
        by_stem.setdefault(stem(picture), []).append(picture)
    for name in names:
        fits = by_stem.get(stem(name), []) if name not in found else []
        if len(fits) == 1 and _split_folder(name) == _split_folder(fits[0]):
            found[name] = fits[0]
    return found


def split_of(name: str) -> Split | None:
    """The split that a file's folders or its own name tell of: `valid/a.jpg`, `annotations/instances_val2017.json`."""
    for part in reversed(PurePosixPath(name.lower()).with_suffix("").parts):
        for word in re.findall(r"[a-z]+", part):
            if word in SPLIT_FOLDERS:
                return SPLIT_FOLDERS[word]
    return None


def by_folder(entries: Mapping[str, Entry]) -> tuple[dict[Split, list[Entry]], list[str]]:
    """Entries, by the name of a file of theirs, in the splits that its folders are named after; all are train where
    none is. Beside these, the files of no split.
    """
    of = {name: SPLIT_FOLDERS.get(_split_folder(name)) for name in entries}
    if not any(of.values()):
        return {"train": list(entries.values())}, []
    splits: dict[Split, list[Entry]] = {}
    for name, split in of.items():
        if split:
            splits.setdefault(split, []).append(entries[name])
    return splits, [name for name, split in of.items() if split is None]


def _split_folder(name: str) -> str:
    parts = PurePosixPath(name.lower()).parent.parts
    return next((part for part in reversed(parts) if part in SPLIT_FOLDERS), "")
