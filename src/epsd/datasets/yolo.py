"""Pictures with boxes in the text format of YOLO, as Ultralytics, Roboflow, CVAT and labelImg write it.

https://docs.ultralytics.com/datasets/detect: data.yaml names folders and classes; beside a folder `images` lies
`labels`, with a text file per picture and in it one line per object, `class x y width height`, all shares of the
picture's sides, or `class x y x y ...` for a polygon. Read here in plain Python: Ultralytics' own reader would bring
its whole package.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from epsd.files.archives import ArchiveError, Tree
from epsd.files.faults import Faults, few
from epsd.files.images import is_image
from epsd.files.layouts import Split
from epsd.project.params import as_tree
from epsd.project.runtime import located
from epsd.project.settings import Place, Text
from epsd.registry import variant
from epsd.voc.entries import (
    Annotation,
    BoxReading,
    BoxSource,
    Entry,
    annotation,
    by_folder,
    looks_like,
    opened,
    partners,
    stem,
)
from epsd.voc.scenes import VocError

_KEYS: dict[str, Split] = {"train": "train", "val": "validation", "valid": "validation", "test": "test"}
_LISTS = ("classes.txt", "obj.names", "names.txt")
"""Where labelImg, CVAT and Label Studio write the classes, one a line."""


@variant
class Yolo(BoxReading):
    """`root`: a folder or archive with data.yaml at any depth, or the data.yaml itself; or with `classes.txt`
    (labelImg) or `obj.names` (CVAT), pictures and text files of the same names, in folders named after the splits or in
    one.

    Paths in data.yaml are looked for inside `root`, whatever machine they were written on; splits without pictures
    there are held out of train, by seed: data.validation and data.test of it. Polygons (and turned boxes) become their
    bounding boxes, key points are passed over. Objects are evaluated by the rules of Pascal VOC.

    Settings
    --------
    data : name of the YAML file; null: the only one that names classes.
    class_names : in the order of the labels, others are left out; null: the classes that training objects have, in the
        order of data.yaml.
    classes : spellings that mean one class: `{helmet: [Helmet, hard-hat]}`.
    bad_boxes : a box without area or outside its picture is an "error", or is left out ("drop") and counted.
    empty : a picture without objects, or without a text file, is kept as "background", as the format means it, or is an
        "error".
    unreadable : a picture that is missing or damaged, or whose annotation is, is an "error", or left out ("skip") and
        named.
    limit : [1, ...) pictures per split, drawn by seed; null: all.
    title : what runs and figures call the data set; null: the name of its folder or archive.
    """

    root: Place
    data: Text | None = None
    empty: Literal["error", "background"] = "background"

    def __call__(self, folder: Path, *, seed: int, images: object = None, class_names: object = None) -> BoxSource:
        """The pictures by split. Those of archives will be kept below `folder`; folders are used in place.

        Raises ArchiveError: `root` is missing, damaged, or points outside itself. ParamsError: what is no YAML.
        VocError: no classes, no such folder.
        """
        root, data = located(self.root), self.data
        if root.suffix.lower() in (".yaml", ".yml"):
            root, data = root.parent, root.name
        tree = opened(root)
        about = _about(tree, data)
        names = _names(tree, *about) if about else _listed(tree)
        reader = _Reader(tree, names, "kpt_shape" in about[1] if about else False)
        splits, notes = _splits(tree, *about) if about else ({}, [])
        found = {split: [reader.entry(name) for name in pictures] for split, pictures in splits.items()}
        if not found:
            found, others = by_folder({name: reader.entry(name) for name in tree.names if is_image(name)})
            notes += [f"beside the split folders, left out: {few(others)}"] if others else []
        if not found.get("train"):
            raise VocError(f"{tree.where}: holds no training pictures.")
        return BoxSource(tree, folder, found, list(names.values()), notes)


About = tuple[str, Mapping[str, Any]]
"""Name of the YAML file, and its content."""


def _about(tree: Tree, data: str | None) -> About | None:
    """The YAML file of that name, or the only one that names classes; None: there is none."""
    files = [name for name in tree.names if name.lower().endswith((".yaml", ".yml"))]
    files = [name for name in files if PurePosixPath(name).name == "data.yaml"] or files if data is None else files
    if data is not None:
        files = [name for name in files if name == data or name.endswith(f"/{data}")]
        if not files:
            raise VocError(f"{tree.where}: has no file '{data}'.")
    read = [(name, as_tree(tree.text(name), tree.where / name)) for name in files]
    fits = [(name, content) for name, content in read if "names" in content]
    if len(fits) > 1:
        raise VocError(f"{tree.where}: which file is meant? Set voc.data. It has: {few([name for name, _ in fits])}.")
    return fits[0] if fits else None


def _names(tree: Tree, name: str, content: Mapping[str, Any]) -> dict[int, str]:
    """Number -> class, as data.yaml lists or maps them."""
    names = content["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        raise VocError(f"{tree.where}: {name}: 'names' is no list of classes, nor a mapping of numbers to them.")
    return {int(number): str(one).strip() for number, one in names.items()}


def _listed(tree: Tree) -> dict[int, str]:
    """Likewise of a text file with one class a line."""
    fits = [name for name in tree.names if PurePosixPath(name).name.lower() in _LISTS]
    if not fits:
        lacking = f"says nowhere what the classes are: it needs data.yaml, or {' or '.join(_LISTS)}."
        raise VocError(f"{tree.where}: {lacking}{looks_like(tree, 'yolo')}")
    return dict(enumerate(line.strip() for line in tree.text(fits[0]).rstrip().splitlines()))


def _splits(tree: Tree, name: str, content: Mapping[str, Any]) -> tuple[dict[Split, list[str]], list[str]]:
    """Split -> its pictures, by the folders and lists that data.yaml names ({}: it names none), and what is not there:
    Roboflow names a test folder that it did not write.
    """
    splits: dict[Split, list[str]] = {}
    absent = []
    for key, split in _KEYS.items():
        for place in _each(content.get(key)):
            if pictures := _pictures(tree, name, f"{content.get('path') or ''}/{place}"):
                splits[split] = splits.get(split, []) + pictures
            elif split == "train":
                raise VocError(
                    f"{tree.where}: {name} names '{place}', which is no folder of pictures there, nor a list."
                )
            else:
                absent.append(f"{name} names '{place}' for {split}, where no picture is")
    return splits, absent


def _each(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else [str(value)] if value else []


def _pictures(tree: Tree, name: str, place: str) -> list[str]:
    """The pictures of a folder, or of a text file that lists them; [] where neither is there."""
    for base in (PurePosixPath(name).parent, PurePosixPath()):
        for ending in _endings(place):
            found = f"{base / ending}"
            if found in tree.folders:
                return [one for one in tree.names if one.startswith(f"{found}/") and is_image(one)]
            if found.lower().endswith(".txt") and found in tree.names:
                return list(_from_list(tree, found))
    return []


def _from_list(tree: Tree, listed: str) -> Iterator[str]:
    """The pictures that the lines of a text file name."""
    there, faults = frozenset(tree.names), Faults(tree.where, VocError)
    bases = (PurePosixPath(), PurePosixPath(listed).parent)
    for line in filter(None, map(str.strip, tree.text(listed).splitlines())):
        places = (f"{base / ending}" for base in bases for ending in _endings(line))
        if found := next((place for place in places if place in there), None):
            yield found
        else:
            faults.add(f"{listed} lists '{line}', which is missing")
    faults.check()


def _endings(place: str) -> Iterator[PurePosixPath]:
    """A path as it may be written on another machine, shortened from its front: `/content/cells/train/images`, ..."""
    parts = [part for part in place.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        yield PurePosixPath(*parts[start:])


class _Reader:
    """Text files of a tree."""

    def __init__(self, tree: Tree, names: Mapping[int, str], key_points: bool) -> None:
        self._tree, self._names, self._key_points = tree, names, key_points
        texts = [name for name in tree.names if name.lower().endswith(".txt")]
        self._texts = {picture: name for name, picture in partners(texts, filter(is_image, tree.names)).items()}

    def entry(self, picture: str) -> Entry:
        """A picture with its objects; none where it has no text file."""
        text = self._texts.get(picture)
        said, fault = None, ""
        try:
            said = self._said(self._tree.text(text) if text else "")
        except VocError as error:
            fault = f"{text}: {error}"
        except ArchiveError as error:
            fault = str(error)
        return Entry(stem(picture), picture, said, text or picture, picture, fault)

    def _said(self, text: str) -> Annotation:
        names, corners, polygons = [], [], 0
        for number, line in enumerate(text.splitlines(), 1):
            if values := _values(line, number):
                label, *places = values
                if label not in self._names:
                    known = f"0 to {max(self._names, default=0)}"
                    raise VocError(f"line {number} is of class {label:g}, the classes are {known}")
                is_box = len(places) == 4 or self._key_points
                if not is_box and len(places) % 2:
                    raise VocError(f"line {number} has {len(values)} numbers: 5 make a box, 7, 9, ... a polygon")
                names.append(self._names[int(label)])
                corners.append(_box(places[:4]) if is_box else _around(places))
                polygons += not is_box
        return annotation(names, corners, [False] * len(names), relative=True, polygons=polygons)


def _values(line: str, number: int) -> list[float]:
    """The numbers of a line; [] of an empty one. Raises VocError where it is neither a box nor a polygon."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        values = [math.nan]
    if values and (len(values) < 5 or not all(map(math.isfinite, values))):
        raise VocError(f"line {number} is not 'class x y width height', nor a polygon ({line.strip()[:60]})")
    return values


def _box(places: Sequence[float]) -> list[float]:
    """Middle, width and height to corners."""
    x, y, width, height = places
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def _around(places: Sequence[float]) -> list[float]:
    """The corners of the box around a polygon."""
    return [min(places[::2]), min(places[1::2]), max(places[::2]), max(places[1::2])]
