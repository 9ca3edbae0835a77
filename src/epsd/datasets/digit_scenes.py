"""Scenes composed of handwritten digits, written as a genuine Pascal VOC devkit: no download, real ink."""

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from epsd.files.archives import open_tree
from epsd.files.layouts import SPLITS
from epsd.project.artifacts import writing
from epsd.project.settings import Count, Natural, Share
from epsd.registry import ParamsError, variant
from epsd.voc.devkits import Sets, from_sets
from epsd.voc.entries import BoxSource

Pixels = npt.NDArray[np.uint8]
Pool = tuple[Pixels, npt.NDArray[np.int64]]
"""Digits (N, H, W) or (N, 1, H, W), 0 to 255, bright on dark, and their labels (N,)."""

FOLDER = "VOCdigits"
CLASS_NAMES = [str(digit) for digit in range(10)]
SETS = {"train": "train", "validation": "val", "test": "test"}
INK = 64  # a pixel at least this bright (of 255, at full contrast) belongs to the digit's box
FAINT = (0.15, 0.3)  # contrast of a difficult digit
TRIES = 50  # places tried before a scene stays with fewer digits
HELD_OUT = 1 / 8  # share of train's digits for the validation scenes where no others are there: as in the own split


class Thing(NamedTuple):
    """One object as VOC writes it: name, (xmin, ymin, xmax, ymax) from 1 and inclusive, difficult."""

    name: str
    box: tuple[int, int, int, int]
    difficult: bool


@variant
class DigitScenes:
    """The 1,797 digits of scikit-learn (Alpaydin and Kaynak, UCI 1998), enlarged and strewn over noisy canvases.

    Train scenes show only training digits, test scenes only test digits: the very split of the classification stage,
    when that is about the same digits; otherwise a split of its own, by seed. Where that stage holds out no validation
    digits (`data.validation: 0`), validation scenes show an eighth of its training digits, which train scenes then do
    not show. Deterministic.

    Settings
    --------
    train, validation, test : scenes per split.
    canvas : side of a scene in pixels.
    objects : most digits in a scene; each has 1 to this many.
    smallest, largest : side in pixels to which the digits are enlarged; the box is that of the ink, a bit smaller.
    noise : standard deviation of the background noise, as a share of full brightness.
    clutter : strokes that are no digit, per scene.
    difficult : share of objects drawn so faintly that they are flagged `difficult`: neither learnt nor scored.
    """

    train: Count = 300
    validation: Natural = 50
    test: Count = 100
    canvas: Annotated[int, Field(ge=16, le=4096)] = 64
    objects: Annotated[int, Field(ge=1, le=100)] = 4
    smallest: Annotated[int, Field(ge=8, le=4096)] = 14
    largest: Annotated[int, Field(ge=8, le=4096)] = 28
    noise: Annotated[float, Field(ge=0, le=1)] = 0.05
    clutter: Natural = 2
    difficult: Share = 0.03

    def __post_init__(self) -> None:
        if self.smallest > self.largest or self.largest >= self.canvas:
            raise ParamsError(
                f"voc (digit_scenes): smallest <= largest < canvas must hold, "
                f"given {self.smallest}, {self.largest}, {self.canvas}."
            )

    @property
    def reading(self) -> dict[str, Any]:
        """Settings for `epsd.voc.annotations.read_index`."""
        return {"class_names": CLASS_NAMES}

    def __call__(
        self,
        folder: Path,
        *,
        seed: int,
        images: Mapping[str, Pool] | None = None,
        class_names: Sequence[str] = CLASS_NAMES,
    ) -> BoxSource:
        """Write the devkit below `folder` (what was there goes), and find it there.

        `images`: split -> images (N, 1, H, W) or (N, H, W) uint8 and labels (N,), the classification stage's
        (validation may be missing), and its `class_names`: used where they are grey digits "0" to "9".
        """
        pools = _pools(images if list(class_names) == CLASS_NAMES else None, seed, bool(self.validation))
        home = folder / FOLDER
        shutil.rmtree(home, ignore_errors=True)
        with writing(home):
            for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
                (home / part).mkdir(parents=True)
            listed = {split: self._write(home, split, pools, seed) for split in SETS}
            listed["trainval"] = listed["train"] + listed["validation"]
            for split, ids in listed.items():
                text = "".join(f"{identifier}\n" for identifier in ids)
                (home / "ImageSets" / "Main" / f"{SETS.get(split, split)}.txt").write_text(text, encoding="utf-8")
        sets: Sets = {split: [("", SETS[split])] if listed[split] else [] for split in SPLITS}
        return from_sets(open_tree(home), sets, folder)

    def _write(self, home: Path, split: str, pools: Mapping[str, Pool], seed: int) -> list[str]:
        from PIL import Image

        ids = [f"{SETS[split]}_{number:05d}" for number in range(getattr(self, split))]
        for number, identifier in enumerate(ids):
            pixels, things = self.compose(pools[split], np.random.default_rng([seed, list(SETS).index(split), number]))
            Image.fromarray(pixels).save(home / "JPEGImages" / f"{identifier}.jpg", quality=95)
            text = annotation(f"{identifier}.jpg", self.canvas, things)
            (home / "Annotations" / f"{identifier}.xml").write_text(text, encoding="utf-8")
        return ids

    def compose(self, pool: Pool, rng: np.random.Generator) -> tuple[Pixels, list[Thing]]:
        """One scene: pixels (canvas, canvas) uint8, and the digits in it."""
        scene = rng.normal(0.1, self.noise, (self.canvas, self.canvas)).clip(0, 1)
        for _ in range(self.clutter):
            _stroke(scene, rng)
        things: list[Thing] = []
        taken = np.zeros((0, 4))
        for _ in range(int(rng.integers(1, self.objects + 1))):
            chosen = int(rng.integers(len(pool[1])))
            side = int(rng.integers(self.smallest, self.largest + 1))
            ink = _enlarged(pool[0][chosen], side)
            box = _bounds(ink >= INK / 255)
            place = _place(box, side, self.canvas, taken, rng)
            if place is None:
                continue
            difficult = bool(rng.random() < self.difficult)
            contrast = rng.uniform(*FAINT) if difficult else rng.uniform(0.7, 1.0)
            left, top = place
            region = scene[top : top + side, left : left + side]
            np.maximum(region, ink * contrast, out=region)
            corners = box + np.array([left, top, left, top])
            taken = np.vstack([taken, corners])
            xmin, ymin, xmax, ymax = (int(corner) for corner in corners + np.array([1, 1, 0, 0]))
            things.append(Thing(CLASS_NAMES[int(pool[1][chosen])], (xmin, ymin, xmax, ymax), difficult))
        return np.rint(scene * 255).astype(np.uint8), things


def _pools(images: Mapping[str, Pool] | None, seed: int, validation: bool = True) -> dict[str, Pool]:
    """Digits by split: the classification stage's where it is about them, else scikit-learn's, split here.

    `validation`: whether validation scenes are wanted, for which digits are held out of train where there are none.
    """
    pools = {split: pool for split, pool in (images or {}).items() if len(pool[1])}
    if {"train", "test"} <= set(pools) and all(_are_digits(pool[0]) for pool in pools.values()):
        if validation and "validation" not in pools:
            pools |= _held_out(pools["train"], seed)
        return {split: (pixels.reshape(-1, *pixels.shape[-2:]), labels) for split, (pixels, labels) in pools.items()}
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng([seed, len(SETS)]).permutation(len(pixels))
    parts = np.split(order, [int(0.7 * len(order)), int(0.8 * len(order))])
    return {split: (pixels[part], bunch.target[part].astype(np.int64)) for split, part in zip(SETS, parts, strict=True)}


def _held_out(train: Pool, seed: int) -> dict[str, Pool]:
    """The digits of train in two parts, drawn by `seed`: what train keeps, and what validation gets."""
    order = np.random.default_rng([seed, len(SETS)]).permutation(len(train[1]))
    count = max(1, round(HELD_OUT * len(order)))
    parts = {"validation": np.sort(order[:count]), "train": np.sort(order[count:])}
    return {split: (train[0][part], train[1][part]) for split, part in parts.items()}


def _are_digits(images: Pixels) -> bool:
    return (images.ndim == 3 or images.shape[1] == 1) and bool(images.shape[-1] == images.shape[-2])


def _enlarged(digit: Pixels, side: int) -> npt.NDArray[np.float64]:
    """(H, W) uint8 -> (side, side) in [0, 1], bicubic."""
    from PIL import Image

    return np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64) / 255


def _bounds(ink: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Corners of pixels (left, top, right, bottom) of what is True; the whole square where hardly anything is."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    if len(rows) < 3 or len(columns) < 3:
        return np.array([0, 0, ink.shape[1], ink.shape[0]])
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def _place(
    box: npt.NDArray[np.int64], side: int, canvas: int, taken: npt.NDArray[np.float64], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Left and top of the enlarged digit so that its box touches no other; None when no place was found."""
    for _ in range(TRIES):
        left, top = (int(value) for value in rng.integers(0, canvas - side + 1, 2))
        corners = box + np.array([left, top, left, top])
        low = np.maximum(corners[:2], taken[:, :2])
        high = np.minimum(corners[2:], taken[:, 2:])
        if not ((high - low) > 0).all(1).any():
            return left, top
    return None


def _stroke(scene: npt.NDArray[np.float64], rng: np.random.Generator) -> None:
    """A short straight line of any direction and brightness, in place."""
    start, angle = rng.uniform(0, scene.shape[0], 2), rng.uniform(0, 2 * np.pi)
    along = np.arange(0, rng.uniform(4, 12), 0.5)[:, None]
    path = np.rint(start + along * [np.cos(angle), np.sin(angle)]).astype(int)
    inside = path[((path >= 0) & (path < scene.shape[0])).all(1)]
    scene[inside[:, 0], inside[:, 1]] = rng.uniform(0.3, 0.8)


def annotation(name: str, canvas: int, things: Sequence[Thing]) -> str:
    """One VOC annotation file as text."""
    top = ElementTree.Element("annotation")
    _children(top, folder=FOLDER, filename=name)
    _children(ElementTree.SubElement(top, "size"), width=canvas, height=canvas, depth=1)
    _children(top, segmented=0)
    for thing in things:
        node = ElementTree.SubElement(top, "object")
        _children(node, name=thing.name, pose="Unspecified", truncated=0, difficult=int(thing.difficult))
        xmin, ymin, xmax, ymax = thing.box
        _children(ElementTree.SubElement(node, "bndbox"), xmin=xmin, ymin=ymin, xmax=xmax, ymax=ymax)
    ElementTree.indent(top, space="\t")
    return ElementTree.tostring(top, encoding="unicode") + "\n"


def _children(parent: ElementTree.Element, **values: object) -> None:
    for tag, value in values.items():
        ElementTree.SubElement(parent, tag).text = str(value)
