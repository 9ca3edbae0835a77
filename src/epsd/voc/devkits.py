"""Pascal VOC's layout, and what labelling tools make of it: lists of pictures and one XML file for each.

A VOC annotation counts pixels from 1 and includes both ends: `xmin` 1, `xmax` 10 is ten pixels wide.
"""

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from epsd.files.archives import ArchiveError, Tree
from epsd.files.faults import Faults, few
from epsd.files.images import is_image
from epsd.files.layouts import Split
from epsd.types import EpsdError
from epsd.voc.entries import (
    Annotation,
    BoxSource,
    Entry,
    Family,
    annotation,
    by_folder,
    families,
    family,
    looks_like,
    partners,
)
from epsd.voc.scenes import VocError

Sets = Mapping[Split, Sequence[tuple[str, str]]]
"""Split -> its image sets, each the folder of a devkit in the tree ("" or ending in a slash) and the name of a list."""

LISTS = "ImageSets/Main/"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = {"": False, "0": False, "false": False, "1": True, "true": True}
_FLAG_COLUMN = re.compile(r"\s+[-+]?[01]$")
"""Of the lists of one class: whether the picture shows it."""


def image_sets(tree: Tree) -> Iterator[tuple[str, str]]:
    """(devkit folder, image set) of every list in the tree."""
    for name in tree.names:
        folder, found, last = f"/{name}".rpartition(f"/{LISTS}")
        if found and "/" not in last and last.endswith(".txt"):
            yield f"{folder}/".lstrip("/"), last.removesuffix(".txt")


def from_sets(tree: Tree, sets: Sets, folder: Path, notes: Sequence[str] = ()) -> BoxSource:
    """The pictures that image sets list, in their order, each once.

    Raises VocError naming every list that cannot be used.
    """
    reader = _Reader(tree)
    splits = {
        split: list({entry.where: entry for one in some for entry in reader.listed(*one)}.values())
        for split, some in sets.items()
    }
    reader.faults.check()
    return BoxSource(tree, folder, splits, notes=notes)


def from_pairs(tree: Tree, folder: Path) -> BoxSource:
    """Pictures and annotations of one stem, wherever they lie, where there is no list. Folders may be named after
    splits (train, valid, test); those that are missing are held out of train.

    Raises VocError where there is no annotation, or none to learn from.
    """
    reader = _Reader(tree)
    pictures = [name for name in tree.names if is_image(name)]
    xmls = [name for name in tree.names if name.lower().endswith(".xml")]
    paired = partners(xmls, pictures)
    found = {xml: reader.entry(family(xml)[1], paired.get(xml), xml, xml) for xml in xmls}
    for name in sorted(set(pictures) - set(paired.values())):
        found[name] = Entry(family(name)[1], name, None, str(PurePosixPath(name).with_suffix(".xml")), name)
    if not xmls:
        lacking = f"has neither lists of pictures ({LISTS}*.txt) nor annotations (*.xml)."
        raise VocError(f"{tree.where}: {lacking}{looks_like(tree, 'devkit')}")
    splits, others = by_folder(found)
    if "train" not in splits:
        raise VocError(f"{tree.where}: has annotations in {', '.join(splits)}, and none in a folder named train.")
    notes = [f"beside the split folders, left out: {few(others)}"] if others else []
    return BoxSource(tree, folder, splits, notes=notes)


@dataclass
class _Reader:
    """The files of a tree by family, and what is wrong with them."""

    tree: Tree
    faults: Faults = field(init=False)

    def __post_init__(self) -> None:
        self.faults = Faults(self.tree.where, VocError)
        names = self.tree.names
        self._pictures = families(name for name in names if is_image(name))
        self._xmls = families(name for name in names if name.lower().endswith(".xml"))
        self._known = self._pictures.keys() | self._xmls.keys()

    def listed(self, base: str, image_set: str) -> Iterator[Entry]:
        """The pictures of one list."""
        listed = f"{base}{LISTS}{image_set}.txt"
        try:
            lines = [line.strip() for line in self.tree.text(listed).splitlines() if line.strip()]
        except EpsdError as error:
            self.faults.add(error)
            return
        if not lines:
            self.faults.add(f"{listed}: lists no picture")
        for line in lines:
            key = found_as(line, base, self._known)
            xml = self._xmls.get(key, f"{base}Annotations/{key[1]}.xml")
            yield self.entry(key[1], self._pictures.get(key), xml, listed, there=key in self._xmls)

    def entry(self, identifier: str, image: str | None, xml: str, listed: str, there: bool = True) -> Entry:
        """A picture with what its annotation says, where there is one and it can be used."""
        said, fault = None, ""
        try:
            said = read_annotation(self.tree.read(xml)) if there else None
        except VocError as error:
            fault = f"{xml}: {error}"
        except ArchiveError as error:
            fault = str(error)
        return Entry(identifier, image, said, xml, listed, fault)


def found_as(line: str, base: str, known: Collection[Family]) -> Family:
    """Of which files a line of a list is the name: as it stands (names have spaces, folders and endings), without the
    second column of a list of one class, or by its first column.
    """
    text = line.replace("\\", "/")
    spellings = [_FLAG_COLUMN.sub("", text), text, text.split()[0]]
    for spelling in dict.fromkeys([text, *spellings]):
        for place in (f"{base}{spelling}", f"{base}{PurePosixPath(spelling).name}"):
            if (key := family(place)) in known:
                return key
    return family(f"{base}{spellings[0]}")


def read_annotation(content: bytes) -> Annotation:
    """The objects of one XML file, boxes as corners of pixels. Raises VocError saying what is wrong."""
    try:
        top = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last: an unknown encoding
        raise VocError(f"not a readable XML file ({error})") from None
    size, stated = top.find("size"), None
    if size is not None:
        width, height = (int(_number(size.find(key), f"size/{key}")) for key in ("width", "height"))
        stated = (width, height) if width and height else None
    objects = top.findall("object")
    names = [(node.findtext("name") or "").strip() for node in objects]
    if "" in names:
        raise VocError(f"object {names.index('') + 1} has no name")
    boxes = [_box(node, number) for number, node in enumerate(objects, 1)]
    difficult = [_flag(node.find("difficult")) for node in objects]
    polygons = sum(node.find("bndbox") is None for node in objects)
    return annotation(names, boxes, difficult, first=1, size=stated, polygons=polygons)


def _box(node: ElementTree.Element, number: int) -> list[float]:
    """The corners as they are written; those around its polygon where an object has no bndbox."""
    if (box := node.find("bndbox")) is not None:
        return [_number(box.find(key), f"{key} in bndbox of object {number}") for key in _CORNERS]
    if (polygon := node.find("polygon")) is None:
        raise VocError(f"object {number} has no bndbox")
    across, down = (
        [_number(point, f"{point.tag} in polygon of object {number}") for point in polygon.iter() if is_of(point.tag)]
        for is_of in (re.compile(r"x\d*").fullmatch, re.compile(r"y\d*").fullmatch)
    )
    if not across or not down:
        raise VocError(f"object {number} has no bndbox, and a polygon without points")
    return [min(across), min(down), max(across), max(down)]


def _number(node: ElementTree.Element | None, what: str) -> float:
    try:
        value = float(node.text or "") if node is not None else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        given = "missing" if node is None else f"'{node.text}'"
        raise VocError(f"{what} is {given}, expected a number")
    return value


def _flag(node: ElementTree.Element | None) -> bool:
    text = "" if node is None else (node.text or "").strip()
    if text.lower() not in _FLAGS:
        raise VocError(f"difficult is '{text}', expected 0 or 1")
    return _FLAGS[text.lower()]
