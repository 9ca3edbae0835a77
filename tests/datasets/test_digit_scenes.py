"""Scenes of digits: a genuine devkit, the split kept apart, boxes around the ink, the same every time."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from epsd.datasets import DEVKITS
from epsd.datasets.digit_scenes import CLASS_NAMES, INK, SETS, DigitScenes
from epsd.detection.average_precision import overlaps
from epsd.registry import ParamsError, choose
from epsd.voc.annotations import read_index, read_picture
from epsd.voc.scenes import VocIndex

FEW = {"train": 12, "validation": 4, "test": 6}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(folder: Path, *, images: object = None, class_names: list[str] = CLASS_NAMES, **settings: object) -> VocIndex:
    scenes = choose(DEVKITS, {"name": "digit_scenes", **FEW, **settings})
    sources = scenes(folder, seed=0, images=images, class_names=class_names)  # type: ignore[call-arg]
    return read_index(sources, **scenes.reading)


def pool(value: int, digit: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Five squares of one brightness and one label."""
    return np.full((5, 1, size, size), value, np.uint8), np.full(5, digit)


def test_reads_back_as_a_devkit(tmp_path: Path) -> None:
    index = read(tmp_path)
    assert {split: count["pictures"] for split, count in index.counts().items()} == FEW
    assert index.class_names == CLASS_NAMES
    lists = tmp_path / "VOCdigits/ImageSets/Main"
    assert {path.stem for path in lists.iterdir()} == {"train", "val", "trainval", "test"}
    both = [scene.id for split in ("train", "validation") for scene in index.scenes[split]]
    assert (lists / "trainval.txt").read_text().split() == both


def test_torchvision_reads_it_too(tmp_path: Path) -> None:
    from torchvision.datasets import VOCDetection

    index = read(tmp_path)
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdigits").rename(tmp_path / "VOCdevkit/VOC2007")
    theirs = VOCDetection(str(tmp_path), year="2007", image_set="test")
    names = [[o["name"] for o in target["annotation"]["object"]] for _, target in theirs]
    assert names == [[CLASS_NAMES[label] for label in scene.labels] for scene in index.scenes["test"]]


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        DigitScenes(**FEW)(tmp_path / name, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") != digests(tmp_path / "c")


def test_writes_anew(tmp_path: Path) -> None:
    DigitScenes(**FEW)(tmp_path, seed=0)
    DigitScenes(**FEW | {"train": 3})(tmp_path, seed=0)
    assert len(list((tmp_path / "VOCdigits/JPEGImages").iterdir())) == 3 + 4 + 6


def test_each_split_shows_only_its_own_digits(tmp_path: Path) -> None:
    images = {split: pool(250, digit) for digit, split in enumerate(SETS)}
    index = read(tmp_path, images=images, noise=0.0, clutter=0)
    for digit, split in enumerate(SETS):
        assert {int(label) for scene in index.scenes[split] for label in scene.labels} == {digit}


def marked(count: int, brightness: int) -> tuple[np.ndarray, np.ndarray]:
    """Squares of labels 0, 1, ... 9, 0, ..., each of a brightness of its own."""
    values = np.arange(brightness, brightness + count, dtype=np.uint8)
    return np.repeat(values, 64).reshape(count, 1, 8, 8), np.arange(count) % 10


@pytest.mark.parametrize("empty", [False, True])
def test_without_validation_digits_some_of_train_are_held_out(tmp_path: Path, empty: bool) -> None:
    from epsd.datasets.digit_scenes import _pools

    images = {"train": marked(80, 100), "test": marked(20, 200)} | ({"validation": marked(0, 0)} if empty else {})
    pools = _pools(images, seed=0)
    shown = {split: {int(digit.max()) for digit in digits} for split, (digits, _) in pools.items()}
    assert shown["train"] | shown["validation"] == set(range(100, 180)) and len(shown["validation"]) == 10
    assert not shown["train"] & shown["validation"]
    assert shown["test"] == set(range(200, 220))
    assert read(tmp_path, images=images).counts()["validation"]["pictures"] == 4
    assert len(_pools(images, seed=0, validation=False)["train"][1]) == 80
    assert read(tmp_path, images=images, validation=0).scenes["validation"] == []


def test_other_data_sets_are_not_pasted_as_digits(tmp_path: Path) -> None:
    images = {split: pool(250, 0) for split in SETS}
    index = read(tmp_path, images=images, class_names=["cat", "dog"])
    assert len({int(label) for scene in index.scenes["train"] for label in scene.labels}) > 1


def test_own_split_keeps_digits_apart() -> None:
    from epsd.datasets.digit_scenes import _pools

    pools = _pools(None, seed=3)
    assert sum(len(labels) for _, labels in pools.values()) == 1797
    seen = {split: {digit.tobytes() for digit in digits} for split, (digits, _) in pools.items()}
    assert not seen["train"] & seen["test"]


@pytest.mark.parametrize("size", [8, 16, 28])
def test_box_is_that_of_the_ink(tmp_path: Path, size: int) -> None:
    images = {split: pool(255, 7, size) for split in SETS}
    index = read(tmp_path, images=images, noise=0.0, clutter=0, difficult=0.0, objects=1, smallest=14, largest=14)
    for scene in index.scenes["train"]:
        left, top, right, bottom = (int(side) for side in scene.boxes[0])
        assert (right - left, bottom - top) == (14, 14)  # the whole square is ink
        pixels = np.asarray(Image.open(scene.image)).astype(int)
        assert pixels[top + 1 : bottom - 1, left + 1 : right - 1].min() > 2 * INK
        pixels[max(0, top - 2) : bottom + 2, max(0, left - 2) : right + 2] = 0
        assert pixels.max() < INK


def test_boxes_never_overlap_and_lie_inside(tmp_path: Path) -> None:
    index = read(tmp_path, train=40, objects=6)
    for scene in index.scenes["train"]:
        assert 1 <= len(scene.labels) <= 6
        assert (scene.boxes >= 0).all()
        assert (scene.boxes <= 64).all()
        shared = overlaps(scene.boxes, scene.boxes)
        assert shared[~np.eye(len(shared), dtype=bool)].max(initial=0) == 0


def test_difficult_digits_are_faint(tmp_path: Path) -> None:
    index = read(tmp_path, train=60, difficult=0.5, noise=0.0, clutter=0)
    peaks: dict[bool, list[int]] = {True: [], False: []}
    for scene in index.scenes["train"]:
        pixels = read_picture(scene, 1)[0]
        for (left, top, right, bottom), hard in zip(scene.boxes.astype(int), scene.difficult, strict=True):
            peaks[bool(hard)].append(int(pixels[top:bottom, left:right].max()))
    assert 0.3 < len(peaks[True]) / (len(peaks[True]) + len(peaks[False])) < 0.7
    assert max(peaks[True]) < min(peaks[False])


def test_no_validation_scenes(tmp_path: Path) -> None:
    assert read(tmp_path, validation=0).scenes["validation"] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smallest": 30, "largest": 20}, "smallest <= largest < canvas"),
        ({"largest": 64}, "smallest <= largest < canvas"),
        ({"train": 0}, "train"),
        ({"objects": 0}, "objects"),
        ({"difficult": 1.0}, "difficult"),
        ({"cavnas": 32}, "Did you mean 'canvas'"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        choose(DEVKITS, {"name": "digit_scenes", **settings}, "voc")
