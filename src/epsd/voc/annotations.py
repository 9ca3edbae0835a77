"""A detection data set as found becomes scenes: pictures and boxes are checked, what is wrong is named.

Boxes. Everything behind `epsd.voc.entries` uses corners of pixels, `[left, top, right, bottom]`: 0-based, right and
bottom exclusive, the convention of torchvision's detectors. The plain overlap of such boxes *is* the devkit's, whose
widths are `xmax - xmin + 1`; no "+ 1" appears below, and a test holds the two against each other.
"""

import contextlib
import hashlib
import io
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from epsd.files.archives import ArchiveError
from epsd.files.digests import digest
from epsd.files.duplicates import Marks, duplicates, mark
from epsd.files.faults import Faults, few
from epsd.files.images import ImageError, decode, named, orientation, pixels
from epsd.files.layouts import SPLITS, UNPACKED, Split
from epsd.files.regular import read_bytes, refused
from epsd.voc.class_names import Naming
from epsd.voc.entries import Annotation, BoxSource, Entry, annotation
from epsd.voc.held_out import held_out
from epsd.voc.scenes import Floats, Scene, VocError, VocIndex

EDGE = 0.05
"""Share of the picture's side by which a box may reach over its edge, and is clipped: a slip of the hand, a rounding.
What lies further outside is of another picture, or of another size of this one."""
_SLACK = 1.0
"""Pixels over the edge that are not counted as such: many tools count from 0 where VOC counts from 1, or round."""

Flags = npt.NDArray[np.bool_]
_UNREADABLE = "voc.unreadable: 'skip' leaves such pictures out."
OnBadBox = Literal["error", "drop"]
OnEmpty = Literal["error", "background"]
OnUnannotated = Literal["error", "skip", "background"]
OnUnreadable = Literal["error", "skip"]


def read_picture(scene: Scene, channels: int) -> npt.NDArray[np.uint8]:
    """The pixels of a scene, (channels, height, width): grey for 1 channel, RGB for 3.

    Raises VocError (missing, another than was prepared) or ImageError (damaged), naming the file.
    """
    with refused(VocError, scene.image, "read"):
        content = read_bytes(scene.image)
    if scene.digest and digest([content]) != scene.digest:
        raise VocError(f"{scene.image}: changed or damaged since prepare read it. Run prepare again.")
    return pixels(decode(content, str(scene.image), grayscale=channels == 1, upright=scene.upright))


class Rules(NamedTuple):
    """What is done about what is wrong: see `read_index`."""

    bad_boxes: OnBadBox = "error"
    empty: OnEmpty = "error"
    unannotated: OnUnannotated = "error"
    unreadable: OnUnreadable = "error"


def read_index(
    source: BoxSource,
    *,
    class_names: Sequence[str] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    bad_boxes: OnBadBox = "error",
    empty: OnEmpty = "error",
    unannotated: OnUnannotated = "error",
    unreadable: OnUnreadable = "error",
    limit: int | None = None,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.2,
) -> VocIndex:
    """Read and check every picture and annotation of a detection data set. Pictures out of an archive are kept below
    `source.folder`, anew; those of a folder stay where they are.

    Parameters
    ----------
    class_names : in the order of the labels; objects of other classes are left out and counted. None: those that the
        training annotations name, in the data set's order or alphabetically (which is VOC's own).
    classes : name -> spellings that mean it.
    bad_boxes : a box without area or outside its picture is an "error", or left out ("drop") and counted. Corners in
        the wrong order are swapped back; what reaches over the edge by less than EDGE is clipped; both are counted.
    empty : a picture without a box is an "error", or kept as "background".
    unannotated : a picture of which nothing is said is an "error", left out ("skip"), or kept as "background".
    unreadable : a picture that is missing or damaged, or whose annotation is, is an "error", or left out ("skip") and
        named.
    limit : pictures per split, drawn by `seed`; None: all.
    validation, test : shares of train that are held out by `seed`, where the source has no such split.

    Raises
    ------
    VocError : naming the files, all of a kind at once; also where a picture is in two splits, and where no object of
        the test split counts. SourceError : class names that differ in case only.
    """
    where = source.tree.where
    there, notes = _usable(source, unannotated, unreadable)
    every = held_out(there, validation, test, seed, where)
    naming = Naming.of(every, source, class_names, classes or {})
    listed = {split: _drawn(every.get(split, ()), limit, seed) for split in SPLITS}
    _disjoint(listed, where)
    reader = _Reader(source, naming, Rules(bad_boxes, empty, unannotated, unreadable))
    hasher = hashlib.sha256(repr(naming.names).encode())
    scenes: dict[str, list[Scene]] = {}
    marks: dict[str, Marks] = {}
    with _kept(source) as keep:
        for split, entries in listed.items():
            read = [one for entry in entries if (one := reader.read(entry, keep))]
            for scene, sha in read:
                hasher.update(sha + scene.boxes.tobytes() + scene.labels.tobytes() + scene.difficult.tobytes())
            scenes[split] = [scene for scene, _ in read]
            marks[split] = np.array([mark(sha) for _, sha in read], dtype=np.uint64)
        reader.faults.check()
        _check_countable(scenes, where)
    over = sum(map(len, every.values())) - sum(map(len, listed.values()))
    notes = [*source.notes, *notes, *naming.notes(listed), *reader.notes()]
    carved = ", ".join(split for split in every if split not in source.splits)
    notes += [f"held out of train by seed: {carved}"] if carved else []
    notes += [f"pictures left out by voc.limit: {over:,}"] if over else []
    identifiers = {split: [scene.id for scene in some] for split, some in scenes.items()}
    dropped = reader.tally["boxes dropped"]
    return VocIndex(naming.names, scenes, hasher.hexdigest(), dropped, notes + duplicates(marks, identifiers))


def _usable(
    source: BoxSource, unannotated: OnUnannotated, unreadable: OnUnreadable
) -> tuple[dict[Split, list[Entry]], list[str]]:
    """The pictures by split, without those whose annotation cannot be used or is asked for, and what was left out.

    Raises VocError naming all annotations that cannot be used, unless they are to be left out.
    """
    faults, every = Faults(source.tree.where, VocError), [one for some in source.splits.values() for one in some]
    spoilt = {one.where: one.fault for one in every if one.fault}
    if unreadable == "error":
        for fault in spoilt.values():
            faults.add(fault, _UNREADABLE)
        faults.check()
    bare = {one.where for one in every if one.annotation is None and not one.fault and unannotated == "skip"}
    notes = [f"annotations that cannot be read, with their pictures left out: {few(list(spoilt))}"] if spoilt else []
    notes += [f"pictures without annotation left out: {len(bare):,}"] if bare else []
    gone = bare | spoilt.keys()
    return {split: [one for one in some if one.where not in gone] for split, some in source.splits.items()}, notes


def _drawn(every: Sequence[Entry], limit: int | None, seed: int) -> Sequence[Entry]:
    """A seeded draw of `limit` pictures in the same order."""
    if limit is None or limit >= len(every):
        return every
    chosen = random.Random(seed).sample(range(len(every)), limit)
    return [every[position] for position in sorted(chosen)]


def _disjoint(listed: Mapping[Split, Sequence[Entry]], where: Path) -> None:
    files = {split: {entry.image or entry.where: entry.id for entry in entries} for split, entries in listed.items()}
    pairs: tuple[tuple[Split, Split], ...] = (("train", "test"), ("validation", "test"), ("train", "validation"))
    for split, other in pairs:
        shared = sorted(files[split][file] for file in files[split].keys() & files[other].keys())
        if shared:
            raise VocError(
                f"{where}: picture {shared[0]} ({len(shared)} in all) is both in {split} and in {other}; "
                f"choose lists that share none."
            )


def _check_countable(scenes: Mapping[str, Sequence[Scene]], where: Path) -> None:
    if not scenes["train"]:
        raise VocError(f"{where}: no training picture is left.")
    if all(scene.difficult.all() for scene in scenes["test"]):
        reason = "all are flagged difficult" if any(len(scene.labels) for scene in scenes["test"]) else "there is none"
        raise VocError(f"{where}: the test split holds no object that counts ({reason}), so nothing could be scored.")


Keep = Callable[[str, bytes], Path]
"""Name in the tree, and content, of a picture -> where it lies from now on."""


@contextlib.contextmanager
def _kept(source: BoxSource) -> Iterator[Keep]:
    """Where pictures stay. Those of an archive go to a fresh folder, which takes its place when the block ends well:
    beside it may lie what another variant has left.
    """
    if source.tree.lasting and source.tree.where.is_dir():
        root = source.tree.where.resolve()
        yield lambda name, content: root / name
        return
    target = (source.folder / UNPACKED).resolve()
    with refused(VocError, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking.", dir=target.parent) as temporary:
            fresh = Path(temporary) / UNPACKED
            fresh.mkdir()

            def keep(name: str, content: bytes) -> Path:
                path = fresh / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                return target / name

            yield keep
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)


class _Picture(NamedTuple):
    """A picture that was decoded to its last row: (width, height) as stored, EXIF orientation, and its file."""

    size: tuple[int, int]
    orientation: int
    content: bytes

    def upright(self, said: Annotation) -> bool:
        """Whether the boxes are meant on the picture as its EXIF orientation shows it: where its size is stated so, and
        where no size is stated but shares of it.
        """
        stated = self.size[::-1] == said.size != self.size
        return (self.orientation >= 5 and stated) or (self.orientation > 1 and said.relative)


@dataclass
class _Reader:
    """From entries to scenes. What is wrong, and what was done about it, is gathered."""

    source: BoxSource
    naming: Naming
    rules: Rules
    tally: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.faults = Faults(self.source.tree.where, VocError)

    def read(self, entry: Entry, keep: Keep) -> tuple[Scene, bytes] | None:
        """The scene and the picture's SHA-256; None where it is left out, or something is wrong with it."""
        said = self._said(entry)
        picture = self._picture(entry) if said else None
        if said is None or picture is None or entry.image is None or not self._is_of(said, picture, entry):
            return None
        upright = picture.upright(said)
        width, height = picture.size[::-1] if upright and picture.orientation >= 5 else picture.size
        labels = self._labels(said, entry)
        boxes, sound = self._boxes(said, (width, height), labels >= 0, entry)
        bad = self.rules.bad_boxes == "error" and sound.sum() < (labels >= 0).sum()
        if bad or (not sound.any() and (labels >= 0).all() and not self._may_be_empty(entry)):
            return None
        sha = hashlib.sha256(picture.content).digest()
        path = keep(entry.image, picture.content)
        told = boxes[sound], labels[sound], said.difficult[sound]
        return Scene(entry.id, path, width, height, *told, upright, digest([picture.content])), sha

    def _said(self, entry: Entry) -> Annotation | None:
        if entry.annotation is not None:
            return entry.annotation
        if self.rules.unannotated == "error":
            way_out = "voc.unannotated: 'background' keeps such pictures as showing nothing, 'skip' leaves them out."
            self.faults.add(f"{entry.where}: no such annotation", way_out)
            return None
        self.tally["pictures without annotation kept as background"] += 1
        return _NOTHING

    def _picture(self, entry: Entry) -> _Picture | None:
        try:
            if entry.image is None:
                raise ArchiveError(
                    f"no picture '{entry.id}', with any ending read here, though {entry.listed} names it"
                )
            return self._decoded(entry.image)
        except (ArchiveError, ImageError) as error:
            if self.rules.unreadable == "error":
                self.faults.add(error, _UNREADABLE)
            self.lost.append(entry.image or entry.id)
            return None

    def _decoded(self, name: str) -> _Picture:
        from PIL import Image

        content = self.source.tree.read(name)
        with named(f"{self.source.tree.where}: {name}"), Image.open(io.BytesIO(content)) as image:
            image.load()
            return _Picture(image.size, orientation(image), content)

    def _is_of(self, said: Annotation, picture: _Picture, entry: Entry) -> bool:
        """Whether the size that is stated is the picture's, in either orientation."""
        width, height = picture.size
        if said.size in (None, (width, height), (height, width)):
            return True
        way_out = "The boxes may be those of another picture: mend them, or take out the stated size if they fit."
        stated = f"{said.size[0]}x{said.size[1]}" if said.size else ""
        self.faults.add(f"{entry.where}: states a size of {stated}, the picture has {width}x{height}", way_out)
        return False

    def _labels(self, said: Annotation, entry: Entry) -> npt.NDArray[np.int64]:
        """(n,), -1: left out."""
        labels = [self.naming.label(name) for name in said.names]
        if unknown := [name for name, label in zip(said.names, labels, strict=True) if label is None]:
            self.faults.add(f"{entry.where}: unknown class '{unknown[0]}'", self.naming.way_out(unknown[0]))
        return np.array([-1 if label is None else label for label in labels], dtype=np.int64)

    def _boxes(self, said: Annotation, size: tuple[int, int], wanted: Flags, entry: Entry) -> tuple[Floats, Flags]:
        """(n, 4) inside the picture, and which of them are to be kept: (n,), wanted, with an area, not far outside."""
        sides = np.array([*size, *size], dtype=np.float64)
        boxes = said.boxes * sides if said.relative else said.boxes
        inside = np.clip(boxes, 0, sides)
        over = np.abs(boxes - inside)
        thin = np.hstack([boxes[:, 2:] - boxes[:, :2] <= said.first, inside[:, 2:] <= inside[:, :2]])
        outside = np.any(over > np.maximum(_SLACK, EDGE * sides), axis=1)
        flat = np.any(thin, axis=1)
        bad = wanted & (flat | outside)
        if bad.any() and self.rules.bad_boxes == "error":
            for number in np.flatnonzero(bad):
                fault = f"lies outside the picture of {size[0]}x{size[1]}" if outside[number] else "has no area"
                corners = boxes[number] + [said.first, said.first, 0, 0]
                told = ", ".join(f"{key} {corner:g}" for key, corner in zip(_CORNERS, corners, strict=True))
                told = f"{entry.where}: the box of object {number + 1} ({said.names[number]}: {told}) {fault}"
                self.faults.add(told, "voc.bad_boxes: 'drop' leaves such boxes out.")
        self.tally["boxes dropped"] += int(bad.sum())
        self.tally["boxes clipped at the edge"] += int((wanted & ~bad & (over > _SLACK).any(1)).sum())
        self.tally["boxes with corners swapped back"] += said.swapped
        self.tally["boxes drawn around polygons"] += said.polygons
        return inside, wanted & ~bad

    def _may_be_empty(self, entry: Entry) -> bool:
        if entry.annotation is None:
            return True  # told already
        if self.rules.empty == "background":
            self.tally["pictures without a box kept as background"] += 1
            return True
        self.faults.add(f"{entry.where}: no boxes", "voc.empty: 'background' keeps such pictures as background.")
        return False

    def notes(self) -> list[str]:
        """What was done, in plain words."""
        remarks = {"boxes dropped": " (without area, or outside the picture)"}
        told = [f"{what}: {count:,}{remarks.get(what, '')}" for what, count in self.tally.items() if count]
        return told + ([f"unreadable pictures left out: {few(self.lost)}"] if self.lost else [])


_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_NOTHING = annotation([], [], [])
