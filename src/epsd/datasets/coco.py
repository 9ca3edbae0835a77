"""Pictures with boxes in the JSON format of COCO: its own files, and those of Roboflow, CVAT, Label Studio and others.

T.-Y. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014; https://cocodataset.org/#format-data. Plain JSON
is read: pycocotools would read it no otherwise, and checks nothing of it.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from epsd.files.archives import Tree
from epsd.files.faults import Faults, few
from epsd.files.images import is_image
from epsd.files.layouts import SPLITS, Split
from epsd.project.runtime import located
from epsd.project.settings import Place
from epsd.registry import not_known, variant
from epsd.voc.entries import Annotation, BoxReading, BoxSource, Entry, annotation, looks_like, opened, split_of
from epsd.voc.scenes import VocError

Names = list[str]
Row = Mapping[str, Any]
_LISTS = ("images", "annotations", "categories")


@variant
class Coco(BoxReading):
    """`root`: a folder or archive (or a folder of archives) with pictures and files like `instances_train2017.json` or
    Roboflow's `train/_annotations.coco.json`, at any depth.

    A picture is looked for beside its file, then anywhere by its name. Objects are evaluated by the rules of Pascal VOC
    and by COCO's mAP, see `epsd.detection`: `iscrowd` counts as VOC's `difficult`, neither learnt nor scored. Objects
    without `bbox` get that of their polygon.

    Settings
    --------
    train, validation, test : names of JSON files; null: those whose name or folder tells of the split (train, val,
        valid, validation, test), of several those named instances. Splits without one are held out of train, by seed.
    class_names : in the order of the labels, others are left out; null: the categories that training objects have, in
        the file's order.
    classes : spellings that mean one class: `{helmet: [Helmet, hard-hat]}`.
    bad_boxes : a box without area or outside its picture is an "error", or is left out ("drop") and counted.
    empty : a picture without objects is kept as "background", as the format means it, or is an "error".
    unreadable : a picture that is missing or damaged, or whose annotation is, is an "error", or left out ("skip") and
        named.
    limit : [1, ...) pictures per split, drawn by seed; null: all.
    title : what runs and figures call the data set; null: the name of its folder or archive.
    """

    root: Place
    train: Names | None = Field(default=None, min_length=1)
    validation: Names | None = None
    test: Names | None = Field(default=None, min_length=1)
    empty: Literal["error", "background"] = "background"

    def __call__(self, folder: Path, *, seed: int, images: object = None, class_names: object = None) -> BoxSource:
        """The pictures by split. Those of archives will be kept below `folder`; folders are used in place.

        Raises ArchiveError: `root` is missing, damaged, or points outside itself. VocError: files that are missing,
        belong to no split, or cannot be used.
        """
        tree = opened(located(self.root))
        contents = _Contents(tree, self._candidates(tree))
        splits, others = self._files(tree, contents.names)
        found = {
            split: [entry for name in names for entry in contents.entries(name)] for split, names in splits.items()
        }
        order = [name for names in splits.values() for file in names for name in contents.categories(file).values()]
        contents.faults.check()
        notes = [f"annotations of no split, left out: {few(others)}"] if others else []
        return BoxSource(tree, folder, found, order, notes)

    def _candidates(self, tree: Tree) -> list[str]:
        """The JSON files that are read: COCO's own archive has captions and key points of the same pictures, too."""
        every = [name for name in tree.names if name.lower().endswith(".json")]
        instances = [name for name in every if PurePosixPath(name).name.startswith("instances")]
        return instances if instances and (self.train or self.validation or self.test) is None else every

    def _files(self, tree: Tree, there: Sequence[str]) -> tuple[dict[Split, list[str]], list[str]]:
        """Split -> its JSON files, and those of no split."""
        if not there:
            lacking = f"has no annotations in COCO's format (*.json with {', '.join(_LISTS)})."
            raise VocError(f"{tree.where}: {lacking}{looks_like(tree, 'coco')}")
        splits: dict[Split, list[str]] = {}
        for split in SPLITS:
            named: Names | None = getattr(self, split)
            if named is not None:
                splits[split] = [_file(name, there, f"voc.{split}") for name in named]
            elif told := [name for name in there if split_of(name) == split]:
                splits[split] = told
        others = [name for name in there if name not in {one for names in splits.values() for one in names}]
        if "train" not in splits and len(others) == 1:
            splits["train"], others = others, []
        if "train" not in splits:
            raise VocError(f"{tree.where}: which file is to be learnt? Set voc.train. It has: {few(there)}.")
        return splits, others


def _file(name: str, there: Sequence[str], key: str) -> str:
    """The one file of that name, or of a longer one that ends so."""
    fits = [one for one in there if one == name or one.endswith(f"/{name}")]
    if len(fits) == 1:
        return fits[0]
    raise VocError(f"{key}: {f'several are named {name}: {few(fits)}.' if fits else not_known(name, there)}")


class _Contents:
    """The JSON files of a tree that are in COCO's format, and what is wrong with them."""

    def __init__(self, tree: Tree, candidates: Iterable[str]) -> None:
        self.faults = Faults(tree.where, VocError)
        self._pictures: dict[str, list[str]] = {}
        for name in filter(is_image, tree.names):
            self._pictures.setdefault(PurePosixPath(name).name, []).append(name)
        self._read = dict(self._instances(tree, candidates))
        self.faults.check()
        self.names = list(self._read)

    def _instances(self, tree: Tree, candidates: Iterable[str]) -> Iterator[tuple[str, Row]]:
        for name in candidates:
            try:
                content = json.loads(tree.text(name))
            except (ValueError, RecursionError) as error:
                self.faults.add(f"{name}: not a readable JSON file ({error})")
                continue
            if isinstance(content, dict) and all(_rows(content.get(key)) is not None for key in _LISTS):
                yield name, content

    def categories(self, file: str) -> dict[Any, str]:
        """Id -> name."""
        return {_id(row): str(row.get("name", "")).strip() for row in self._read[file]["categories"]}

    def entries(self, file: str) -> Iterator[Entry]:
        """Every picture of one file, each with its objects."""
        content, names = self._read[file], self.categories(file)
        objects: dict[Any, list[Row]] = {_id(row): [] for row in content["images"]}
        for row in content["annotations"]:
            image, category = _id(row, "image_id"), _id(row, "category_id")
            if image not in objects:
                self.faults.add(f"{file}: annotation {row.get('id')} has no image {image} to be of")
            elif category not in names:
                self.faults.add(f"{file}: annotation {row.get('id')} has no category {category} to be of")
            else:
                objects[image].append(row)
        for row in content["images"]:
            name = str(row.get("file_name", "")).replace("\\", "/")
            where = f"{file}, {name or 'an image without file_name'}"
            said, fault = None, ""
            try:
                said = _said(row, objects[_id(row)], names)
            except VocError as error:
                fault = f"{where}: {error}"
            yield Entry(PurePosixPath(name).stem, self._picture(name, file), said, where, file, fault)

    def _picture(self, name: str, file: str) -> str | None:
        """The file of that name: beside the JSON file, or the only one that ends so, of its split, or anywhere."""
        same = self._pictures.get(PurePosixPath(name).name, [])
        beside = f"{PurePosixPath(file).parent / name}"
        fits = [one for one in same if one == beside] or [one for one in same if f"/{one}".endswith(f"/{name}")] or same
        if len(fits) > 1:
            fits = [one for one in fits if split_of(one) == split_of(file)]
        return fits[0] if fits else None


def _said(row: Row, objects: Sequence[Row], names: Mapping[Any, str]) -> Annotation:
    """What is said of one image. Raises VocError for an object without a box."""
    labels, corners, crowds, polygons = [], [], [], 0
    for one in objects:
        box = _numbers(one.get("bbox"), 4)
        found = [box[0], box[1], box[0] + box[2], box[1] + box[3]] if box else _around(one.get("segmentation"))
        if not found:
            raise VocError(f"annotation {one.get('id')} has neither a bbox of four numbers nor a polygon")
        labels.append(names[_id(one, "category_id")])
        corners.append(found)
        crowds.append(bool(one.get("iscrowd")))
        polygons += not box
    size = _numbers([row.get("width"), row.get("height")], 2)
    stated = (int(size[0]), int(size[1])) if size and all(size) else None
    return annotation(labels, corners, crowds, size=stated, polygons=polygons)


def _id(row: Row, key: str = "id") -> Any:
    """A number or a text; whatever else stands there, as text, so that it can be looked up."""
    value = row.get(key)
    return value if isinstance(value, int | str) else repr(value)


def _rows(value: object) -> list[Row] | None:
    """A list of mappings; None for anything else."""
    return value if isinstance(value, list) and all(isinstance(row, dict) for row in value) else None


def _numbers(value: object, count: int | None = None) -> list[float]:
    """A list of so many finite numbers; [] for anything else."""
    if not isinstance(value, list) or (count is not None and len(value) != count):
        return []
    sound = all(isinstance(one, int | float) and math.isfinite(one) for one in value)
    return [float(one) for one in value] if sound else []


def _around(segmentation: object) -> list[float]:
    """The corners of the box around polygons, each x, y, x, y, ...; [] where there are none."""
    polygons: Iterable[object] = segmentation if isinstance(segmentation, list) else []
    points = [number for polygon in polygons for number in _numbers(polygon)]
    across, down = points[::2], points[1::2]
    return [min(across), min(down), max(across), max(down)] if down else []
