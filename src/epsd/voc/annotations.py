"""Pascal VOC layout: annotations to boxes, read and checked.

Boxes. A VOC annotation counts pixels from 1 and includes both ends: `xmin` 1, `xmax` 10 is ten pixels wide. Everything
behind `read_annotation` uses corners of pixels instead, `[xmin - 1, ymin - 1, xmax, ymax]`: 0-based, right and bottom
exclusive, the convention of torchvision's detectors. The plain overlap of such boxes *is* the devkit's, whose widths
are `xmax - xmin + 1`; no "+ 1" appears below, and a test holds the two against each other.
"""

import hashlib
import io
import math
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from epsd.files.digests import digest
from epsd.files.duplicates import Marks, duplicates, mark
from epsd.files.images import decode, named, orientation, pixels
from epsd.files.layouts import check_spelling
from epsd.files.regular import read_bytes, refused
from epsd.voc.scenes import SPLITS, Floats, Scene, VocError, VocIndex

Sources = Mapping[str, Sequence[tuple[Path, str]]]
"""Split -> its image sets, each a devkit folder (holding JPEGImages, Annotations, ImageSets) and a set's name."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp")


class Annotation(NamedTuple):
    """One XML file: the size it states (None where it states none), and its objects in order."""

    size: tuple[int, int] | None
    names: list[str]
    boxes: Floats
    difficult: npt.NDArray[np.bool_]


def _number(node: ElementTree.Element | None, path: Path, what: str) -> float:
    try:
        value = float(node.text or "") if node is not None else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        given = "missing" if node is None else f"'{node.text}'"
        raise VocError(f"{path}: {what} is {given}, expected a number.")
    return value


def _box(node: ElementTree.Element, path: Path, number: int) -> list[float]:
    where = f"bndbox of object {number}"
    box = node.find("bndbox")
    if box is None:
        raise VocError(f"{path}: object {number} has no bndbox.")
    left, top, right, bottom = (_number(box.find(key), path, f"{key} in {where}") for key in _CORNERS)
    return [left - 1, top - 1, right, bottom]


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _flag(node: ElementTree.Element | None, path: Path) -> bool:
    text = "" if node is None else (node.text or "").strip()
    if text.lower() not in _FLAGS:
        raise VocError(f"{path}: difficult is '{text}', expected 0 or 1.")
    return _FLAGS[text.lower()]


_FLAGS = {"": False, "0": False, "false": False, "1": True, "true": True}


def read_annotation(path: Path) -> Annotation:
    """Objects of one annotation file; boxes (n, 4) as corners of pixels. Raises VocError naming the file."""
    try:
        top = ElementTree.fromstring(read_bytes(path))
    except FileNotFoundError:
        raise VocError(f"{path}: no such annotation.") from None
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # the last: an unknown encoding
        raise VocError(f"{path}: not a readable XML file ({error}).") from None
    size, stated = top.find("size"), None
    if size is not None:
        width, height = (int(_number(size.find(key), path, f"size/{key}")) for key in ("width", "height"))
        stated = (width, height)
    objects = top.findall("object")
    names = [(node.findtext("name") or "").strip() for node in objects]
    if "" in names:
        raise VocError(f"{path}: object {names.index('') + 1} has no name.")
    boxes = [_box(node, path, number) for number, node in enumerate(objects, 1)]
    difficult = [_flag(node.find("difficult"), path) for node in objects]
    return Annotation(stated, names, np.asarray(boxes, dtype=np.float64).reshape(-1, 4), np.asarray(difficult, bool))


def read_image_set(folder: Path, name: str) -> list[str]:
    """The ids that `ImageSets/Main/<name>.txt` lists, in its order (its first column: per-class files have two)."""
    sets = folder / "ImageSets" / "Main"
    path = sets / f"{name}.txt"
    try:
        ids = [line.split()[0] for line in read_bytes(path).decode("utf-8").splitlines() if line.strip()]
    except (FileNotFoundError, NotADirectoryError):
        found = sorted(p.stem for p in sets.glob("*.txt") if "_" not in p.stem)
        raise VocError(f"{path}: no such image set. Found there: {', '.join(found) or '(none)'}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise VocError(f"{path}: cannot be read ({error}).") from None
    if not ids:
        raise VocError(f"{path}: lists no picture.")
    return ids


def find_image(folder: Path, identifier: str) -> Path:
    """`JPEGImages/<id>` with whatever usual ending it has. Raises VocError when there is none."""
    images = folder / "JPEGImages"
    path = next((p for p in (images / f"{identifier}{suffix}" for suffix in SUFFIXES) if p.is_file()), None)
    if path is None:
        raise VocError(f"{images / identifier}.jpg: no such picture, though an image set lists it.")
    return path


def _probe(path: Path) -> tuple[tuple[int, int], int, bytes]:
    """(width, height) as stored, EXIF orientation, and the content of a picture that was decoded to its last row."""
    from PIL import Image

    content = _content(path)
    with named(str(path)), Image.open(io.BytesIO(content)) as image:
        image.load()
        return image.size, orientation(image), content


def _content(path: Path) -> bytes:
    with refused(VocError, path, "read"):
        return read_bytes(path)


def read_picture(scene: Scene, channels: int) -> npt.NDArray[np.uint8]:
    """The pixels of a scene, (channels, height, width): grey for 1 channel, RGB for 3.

    Raises VocError (missing, another than was prepared) or ImageError (damaged), naming the file.
    """
    content = _content(scene.image)
    if scene.digest and digest([content]) != scene.digest:
        raise VocError(f"{scene.image}: changed or damaged since prepare read it. Run prepare again.")
    return pixels(decode(content, str(scene.image), grayscale=channels == 1, upright=scene.upright))


OnBadBox = Literal["error", "drop"]

OnEmpty = Literal["error", "background"]


def _sound(found: Annotation, path: Path, size: tuple[int, int], bad_boxes: OnBadBox) -> npt.NDArray[np.bool_]:
    """Which boxes have an area and lie inside the picture (one pixel of slack: many tools count from 0)."""
    (width, height), boxes = size, found.boxes
    flat = (boxes[:, 2] - boxes[:, 0] <= 1) | (boxes[:, 3] - boxes[:, 1] <= 1)
    outside = (boxes[:, :2] < -1).any(1) | (boxes[:, 2] > width + 1) | (boxes[:, 3] > height + 1)
    bad = np.flatnonzero(flat | outside)
    if len(bad) and bad_boxes == "error":
        number = int(bad[0])
        left, top, right, bottom = boxes[number] + [1, 1, 0, 0]
        fault = "has no area" if flat[number] else f"lies outside the picture of {width}x{height}"
        corners = f"xmin {left:g}, ymin {top:g}, xmax {right:g}, ymax {bottom:g}"
        raise VocError(f"{path}: the box of object {number + 1} ({found.names[number]}: {corners}) {fault}.")
    return ~(flat | outside)


def read_scene(
    folder: Path, identifier: str, numbers: Mapping[str, int], bad_boxes: OnBadBox = "error", empty: OnEmpty = "error"
) -> tuple[Scene, int, bytes]:
    """One picture of a devkit, checked against its annotation.

    Returns the scene, how many boxes were dropped, and the picture's SHA-256. Raises ImageError: a damaged picture.
    VocError: no picture, no or damaged XML; a class outside `numbers`; a stated size that is not the picture's; a box
    without area or outside the picture (unless `bad_boxes` is "drop"); no box (unless `empty` is "background").
    """
    path = folder / "Annotations" / f"{identifier}.xml"
    found = read_annotation(path)
    unknown = [name for name in found.names if name not in numbers]
    if unknown:
        raise VocError(f"{path}: unknown class '{unknown[0]}'. Known: {', '.join(numbers)}.")
    image = find_image(folder, identifier)
    (width, height), orientation, content = _probe(image)
    if found.size not in (None, (0, 0), (width, height), (height, width)):
        raise VocError(
            f"{path}: states a size of {found.size[0]}x{found.size[1]}, the picture has {width}x{height}: its boxes "
            "may be those of another. Mend it, or take out its <size> if they fit."
        )
    upright = orientation >= 5 and found.size == (height, width) != (width, height)
    width, height = (height, width) if upright else (width, height)
    keep = _sound(found, path, (width, height), bad_boxes)
    if not keep.any() and empty == "error":
        raise VocError(f"{path}: no boxes. Set voc.empty to 'background' to keep such pictures as background.")
    boxes = np.clip(found.boxes[keep], 0, [width, height, width, height])
    labels = np.asarray([numbers[name] for name in found.names], dtype=np.int64)[keep]
    scene = Scene(identifier, image, width, height, boxes, labels, found.difficult[keep], upright, digest([content]))
    return scene, int((~keep).sum()), hashlib.sha256(content).digest()


def find_class_names(sources: Sequence[tuple[Path, str]]) -> list[str]:
    """The classes that annotations of these image sets name, in alphabetical order (which is VOC's own)."""
    names: set[str] = set()
    for folder, image_set in sources:
        for identifier in read_image_set(folder, image_set):
            names.update(read_annotation(folder / "Annotations" / f"{identifier}.xml").names)
    if not names:
        raise VocError(f"{sources[0][0] if sources else 'voc'}: no annotation names a class.")
    check_spelling(sorted(names), str(sources[0][0]))
    return sorted(names)


def _listed(sources: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """(folder, id) of every picture of a split once."""
    return list(dict.fromkeys((folder, i) for folder, name in sources for i in read_image_set(folder, name)))


def _drawn(every: list[tuple[Path, str]], limit: int | None, seed: int) -> list[tuple[Path, str]]:
    """A seeded draw of `limit` pictures in the same order."""
    if limit is None or limit >= len(every):
        return every
    chosen = random.Random(seed).sample(range(len(every)), limit)
    return [every[position] for position in sorted(chosen)]


def _disjoint(listed: Mapping[str, list[tuple[Path, str]]]) -> None:
    for split, other in (("train", "test"), ("validation", "test"), ("train", "validation")):
        shared = set(listed.get(split, ())).intersection(listed.get(other, ()))
        if shared:
            folder, identifier = min(shared)
            raise VocError(
                f"{folder}: picture {identifier} ({len(shared)} in all) is both in {split} and in {other}; "
                f"choose image sets that share none."
            )


def read_index(
    sources: Sources,
    *,
    class_names: Sequence[str] | None = None,
    bad_boxes: OnBadBox = "error",
    empty: OnEmpty = "error",
    limit: int | None = None,
    seed: int = 0,
) -> VocIndex:
    """Read and check every picture and annotation of a devkit (or several).

    Parameters
    ----------
    sources : split -> image sets. "train" and "test" must not be empty; "validation" may.
    class_names : in the order of the labels; None: what the training annotations name, alphabetically.
    bad_boxes : a box without area or outside its picture is an "error", or left out ("drop") and counted.
    empty : a picture without a box is an "error", or kept as "background".
    limit : pictures per split, drawn by `seed`; None: all.

    Raises
    ------
    VocError : naming the file; also where a picture is in two splits, and where no object of the test split counts.
    """
    for split in ("train", "test"):
        if not sources.get(split):
            raise VocError(f"voc.{split}: names no image set.")
    names = list(class_names) if class_names is not None else find_class_names(sources["train"])
    numbers = {name: number for number, name in enumerate(names)}
    check_spelling(names, "voc.class_names")
    every = {split: _listed(sources.get(split, ())) for split in SPLITS}
    listed = {split: _drawn(pictures, limit, seed) for split, pictures in every.items()}
    _disjoint(listed)
    hasher, dropped = hashlib.sha256(repr(names).encode()), 0
    scenes: dict[str, list[Scene]] = {}
    marks: dict[str, Marks] = {}
    for split, pictures in listed.items():
        scenes[split], marks[split] = [], np.zeros(len(pictures), dtype=np.uint64)
        for folder, identifier in pictures:
            scene, lost, sha = read_scene(folder.resolve(), identifier, numbers, bad_boxes, empty)
            hasher.update(sha + scene.boxes.tobytes() + scene.labels.tobytes() + scene.difficult.tobytes())
            marks[split][len(scenes[split])] = mark(sha)
            scenes[split].append(scene)
            dropped += lost
    if all(scene.difficult.all() for scene in scenes["test"]):
        raise VocError("voc.test: holds no object that counts (all are flagged difficult), so nothing could be scored.")
    over = sum(map(len, every.values())) - sum(map(len, listed.values()))
    notes = [f"boxes dropped: {dropped:,} (without area, or outside the picture)"] if dropped else []
    notes += [f"pictures left out by voc.limit: {over:,}"] if over else []
    identifiers = {split: [identifier for _, identifier in pictures] for split, pictures in listed.items()}
    return VocIndex(names, scenes, hasher.hexdigest(), dropped, notes + duplicates(marks, identifiers))
