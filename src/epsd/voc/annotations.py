"""Pascal VOC layout: annotations to boxes, the index of artifacts/voc, and average precision as the devkit counts it.

Boxes. A VOC annotation counts pixels from 1 and includes both ends: `xmin` 1, `xmax` 10 is ten pixels wide. Everything
behind `read_annotation` uses corners of pixels instead, `[xmin - 1, ymin - 1, xmax, ymax]`: 0-based, right and bottom
exclusive, the convention of torchvision's detectors. The plain overlap of such boxes *is* the devkit's, whose widths
are `xmax - xmin + 1`; no "+ 1" appears below, and a test holds the two against each other.
"""

import dataclasses
import hashlib
import io
import math
import operator
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from epsd.files.digests import digest
from epsd.files.images import decode, named, pixels
from epsd.files.regular import read_bytes
from epsd.project import artifacts
from epsd.types import EpsdError

Floats = npt.NDArray[np.float64]
Sources = Mapping[str, Sequence[tuple[Path, str]]]
"""Split -> its image sets, each a devkit folder (holding JPEGImages, Annotations, ImageSets) and a set's name."""

SPLITS = ("train", "validation", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG", ".bmp")
EXIF_ORIENTATION = 0x0112


class VocError(EpsdError):
    """A devkit file that is missing, damaged or inconsistent; the message names it."""


@dataclasses.dataclass(frozen=True)
class Scene:
    """One annotated picture of `width` x `height` pixels, n objects.

    `boxes` (n, 4) float64, left, top, right, bottom as corners of pixels; `labels` (n,) int64, positions in the class
    names; `difficult` (n,) bool: objects that neither training nor the official scores count. `upright`: the boxes
    refer to the picture as its EXIF orientation shows it, not to the pixels as stored. `digest`: of the picture's file
    (`epsd.files.digests`); "": not known.
    """

    id: str
    image: Path
    width: int
    height: int
    boxes: Floats
    labels: npt.NDArray[np.int64]
    difficult: npt.NDArray[np.bool_]
    upright: bool = False
    digest: str = ""

    def to_json(self, base: Path) -> dict[str, Any]:
        """Plain values; the image path relative to `base` where it lies below it."""
        below = self.image.is_relative_to(base)
        return {
            "id": self.id,
            "image": str(self.image.relative_to(base) if below else self.image),
            "size": [self.width, self.height],
            "boxes": self.boxes.tolist(),
            "labels": self.labels.tolist(),
            "difficult": self.difficult.tolist(),
            "upright": self.upright,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], base: Path) -> Self:
        """What `to_json` gave. Raises KeyError, TypeError, ValueError or IndexError for anything else."""
        scene = cls(
            id=content["id"],
            image=base / content["image"],
            width=content["size"][0],
            height=content["size"][1],
            boxes=np.asarray(content["boxes"], dtype=np.float64).reshape(-1, 4),
            labels=np.asarray([operator.index(label) for label in content["labels"]], dtype=np.int64),
            difficult=np.asarray(content["difficult"], dtype=np.bool_),
            upright=content["upright"],
            digest=content["digest"],
        )
        scene.check()
        return scene

    def check(self) -> None:
        """Raises ValueError where boxes do not lie inside the picture, or do not go with labels and flags."""
        low, high = self.boxes[:, :2], self.boxes[:, 2:]
        inside = (low >= 0).all() and (low < high).all() and (high <= [self.width, self.height]).all()
        if not (inside and len(self.boxes) == len(self.labels) == len(self.difficult)):
            raise ValueError(f"scene '{self.id}' has boxes outside its picture, or without label or flag")
        if not (isinstance(self.id, str) and isinstance(self.digest, str)):
            raise TypeError(f"scene '{self.id}' has an id or digest that is no text")


@dataclasses.dataclass(frozen=True)
class VocIndex:
    """What artifacts/voc/voc.json holds: class names, and the scenes of "train", "validation" and "test".

    `digest`: SHA-256 over pictures and boxes. `dropped`: boxes left out because they were degenerate, by request.
    """

    class_names: list[str]
    scenes: dict[str, list[Scene]]
    digest: str
    dropped: int = 0

    def save(self, path: Path) -> None:
        """Write the index. Pictures below its folder are named relative to it, so that the folder can be moved."""
        base = path.parent.resolve()
        artifacts.write_json(
            path,
            {
                "class_names": self.class_names,
                "counts": self.counts(),
                "digest": self.digest,
                "dropped": self.dropped,
                "scenes": {split: [scene.to_json(base) for scene in scenes] for split, scenes in self.scenes.items()},
            },
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Raises ArtifactError, DamagedFile (see `read_json`) or VocError naming the file."""
        content, base = artifacts.read_json(path), path.parent.resolve()
        try:
            scenes = {s: [Scene.from_json(scene, base) for scene in some] for s, some in content["scenes"].items()}
            known = cls(content["class_names"], scenes, content["digest"], content["dropped"])
            known.check()
            return known
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise VocError(f"{path}: not an index of this project ({error!r}).") from None

    def check(self) -> None:
        """Raises KeyError for a split that is missing, ValueError for a label outside the classes."""
        numbers = range(len(self.class_names))
        for split in SPLITS:
            for scene in self.scenes[split]:
                if not set(scene.labels.tolist()) <= set(numbers):
                    raise ValueError(f"scene '{scene.id}' has a label outside the {len(numbers)} classes")

    def counts(self) -> dict[str, dict[str, int]]:
        """Per split: pictures, objects, of them difficult."""
        return {
            split: {
                "pictures": len(scenes),
                "objects": sum(len(scene.labels) for scene in scenes),
                "difficult": sum(int(scene.difficult.sum()) for scene in scenes),
            }
            for split, scenes in self.scenes.items()
        }


# --- reading ----------------------------------------------------------------------------------------------------------


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
        return image.size, int(image.getexif().get(EXIF_ORIENTATION, 1)), content


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise VocError(f"{path}: cannot be read ({error.strerror or error}).") from None


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
    return sorted(names)


def _listed(sources: Sequence[tuple[Path, str]], limit: int | None, seed: int) -> list[tuple[Path, str]]:
    """(folder, id) of every picture of a split once; a seeded draw of `limit` of them in the same order."""
    every = list(dict.fromkeys((folder, i) for folder, name in sources for i in read_image_set(folder, name)))
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
    if len(numbers) < len(names):
        raise VocError(f"voc.class_names: '{max(names, key=names.count)}' is there twice.")
    listed = {split: _listed(sources.get(split, ()), limit, seed) for split in SPLITS}
    _disjoint(listed)
    hasher, dropped = hashlib.sha256(repr(names).encode()), 0
    scenes: dict[str, list[Scene]] = {}
    for split, pictures in listed.items():
        scenes[split] = []
        for folder, identifier in pictures:
            scene, lost, sha = read_scene(folder.resolve(), identifier, numbers, bad_boxes, empty)
            hasher.update(sha + scene.boxes.tobytes() + scene.labels.tobytes() + scene.difficult.tobytes())
            scenes[split].append(scene)
            dropped += lost
    if all(scene.difficult.all() for scene in scenes["test"]):
        raise VocError("voc.test: holds no object that counts (all are flagged difficult), so nothing could be scored.")
    return VocIndex(names, scenes, hasher.hexdigest(), dropped)


# --- average precision ------------------------------------------------------------------------------------------------


class Detections(NamedTuple):
    """What a detector found in one picture: `boxes` (n, 4) corners of pixels, `scores` (n,), `labels` (n,)."""

    boxes: Floats
    scores: Floats
    labels: npt.NDArray[np.int64]


class Curve(NamedTuple):
    """One class on a split: detections in descending order of score, each a hit, a miss, or ignored (left out here).

    `recall`, `precision` (m,) after each counted detection; `objects`: how many there are to find (not difficult).
    """

    recall: Floats
    precision: Floats
    objects: int


def overlaps(some: Floats, others: Floats) -> Floats:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4) in corners of pixels.

    Equal to the devkit's on its own inclusive pixel numbers, where it adds 1 to each width and height.
    """
    low = np.maximum(some[:, None, :2], others[None, :, :2])
    high = np.minimum(some[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (some, others)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    result: Floats = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return result


HIT, MISS, IGNORED = 1, 0, -1
NOTHING = -1


class Verdicts(NamedTuple):
    """For each detection of a class in a picture: HIT, MISS or IGNORED, and the object it hit, or NOTHING (n,).

    Objects are positions in the scene.
    """

    kinds: npt.NDArray[np.int64]
    objects: npt.NDArray[np.int64]


def judge(found: Detections, scene: Scene, label: int, threshold: float = 0.5) -> Verdicts:
    """What each detection of class `label` in one picture is worth, in the order given (best first).

    The devkit's rule (VOCevaldet.m): a detection goes to the object of its class that it overlaps most; below
    `threshold` it is a miss; at a difficult object it is ignored; the first at an object is the hit, later ones
    are misses, even where another object would have been free.
    """
    mine = found.labels == label
    theirs = np.flatnonzero(scene.labels == label)
    verdicts = Verdicts(np.full(int(mine.sum()), MISS), np.full(int(mine.sum()), NOTHING))
    if not len(theirs) or not mine.any():
        return verdicts
    overlap = overlaps(found.boxes[mine], scene.boxes[theirs])
    taken: set[int] = set()
    for position, best in enumerate(overlap.argmax(1)):
        if overlap[position, best] < threshold:
            continue
        target = int(theirs[best])
        if scene.difficult[target]:
            verdicts.kinds[position] = IGNORED
        elif target not in taken:
            verdicts.kinds[position], verdicts.objects[position] = HIT, target
            taken.add(target)
    return verdicts


def curve(found: Sequence[Detections], scenes: Sequence[Scene], label: int, threshold: float = 0.5) -> Curve:
    """Precision and recall of one class over a split. `found[i]` belongs to `scenes[i]`."""
    scores, verdicts = [np.zeros(0)], [np.zeros(0, dtype=np.int64)]
    for one, scene in zip(found, scenes, strict=True):
        order = np.argsort(-one.scores, kind="stable")
        ranked = Detections(one.boxes[order], one.scores[order], one.labels[order])
        scores.append(ranked.scores[ranked.labels == label])
        verdicts.append(judge(ranked, scene, label, threshold).kinds)
    every = np.concatenate(verdicts)[np.argsort(-np.concatenate(scores), kind="stable")]
    counted = every[every != IGNORED]
    objects = sum(int(((scene.labels == label) & ~scene.difficult).sum()) for scene in scenes)
    hits = np.cumsum(counted == HIT)
    return Curve(hits / max(objects, 1), hits / np.arange(1, len(hits) + 1), objects)


# MATLAB's 0:0.1:1, bit for bit: it counts up to the middle and down from the end, so that its 0.3 is 3 * 0.1, a
# little above 0.3, while its 0.6 and 0.7 are the plain numbers (numpy's arange differs there).
_ELEVEN = [step * 0.1 for step in range(6)] + [1 - (10 - step) * 0.1 for step in range(6, 11)]


def ap_11point(one: Curve) -> float:
    """Average precision as VOC 2007 counts it: mean over recall 0, 0.1, ... 1 of the best precision at or beyond it.

    NaN where there is nothing to find.
    """
    if one.objects == 0:
        return math.nan
    best = [one.precision[one.recall >= recall].max(initial=0.0) for recall in _ELEVEN]
    return float(sum(best) / 11)


def ap_area(one: Curve) -> float:
    """Average precision as VOC 2010 and later count it: area under the precision made monotonically decreasing.

    NaN where there is nothing to find.
    """
    if one.objects == 0:
        return math.nan
    recall = np.concatenate([[0.0], one.recall, [1.0]])
    precision = np.concatenate([[0.0], one.precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))
