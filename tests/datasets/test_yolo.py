"""YOLO's text files, as Ultralytics, Roboflow, CVAT and labelImg lay them out."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from devkits import Thing, lines, yolo
from epsd.datasets.yolo import Yolo
from epsd.files.images import EXIF_ORIENTATION
from epsd.registry import ParamsError
from epsd.voc.annotations import read_index
from epsd.voc.scenes import VocError, VocIndex
from pictures import hash_of, picture, write, zipped

CAT: Thing = ("cat", (2, 2, 20, 12))
DOG: Thing = ("dog", (5, 5, 30, 20))
SETS: dict[str, dict[str, list[Thing]]] = {
    "train": {"a": [CAT], "b": [DOG]},
    "valid": {"c": [CAT]},
    "test": {"d": [DOG]},
}


def read(root: Path, **settings: Any) -> VocIndex:
    kit = Yolo(root=str(root), **settings)
    return read_index(kit(root.parent / "out", seed=0), **kit.reading)


def counts(index: VocIndex) -> list[int]:
    return [len(index.scenes[split]) for split in ("train", "validation", "test")]


def jpeg(name: str) -> bytes:
    return picture(hash_of(name), (40, 30), "JPEG")


@pytest.mark.parametrize(
    "text",
    [
        "path: ../datasets/cells\ntrain: images/train\nval: images/val\ntest:\nnames: {0: cat, 1: dog}",
        "path: /home/somebody/cells\ntrain: [images/train]\nval: images/val\nnames: [cat, dog]",
        "train: C:\\data\\cells\\images\\train\nval: ./images/val\nnames: [cat, dog]",
        "train: train.txt\nval: images/val\nnames: [cat, dog]",
    ],
)
def test_paths_of_other_machines_and_lists(tmp_path: Path, text: str) -> None:
    files = {"cells.yaml": text.encode(), "train.txt": b"./images/train/0.jpg\r\n/there/images/train/1.jpg\n"}
    files["train.txt"] += b"images/train/2.jpg\nimages/train/3.jpg\n"
    for split, count in (("train", 4), ("val", 1)):
        for number in range(count):
            files[f"images/{split}/{number}.jpg"] = jpeg(f"{split}{number}")
            files[f"labels/{split}/{number}.txt"] = lines([CAT, DOG])
    root = write(tmp_path / "cells", files)
    index = read(root)
    assert counts(index) == [3, 1, 1] and index.class_names == ["cat", "dog"]
    assert index.notes == ["held out of train by seed: test"]
    assert read(root / "cells.yaml").digest == index.digest == read(root, data="cells.yaml").digest


def test_what_labelimg_and_cvat_write(tmp_path: Path) -> None:
    files = {f"{n}.jpg": jpeg(f"{n}") for n in range(10)} | {f"{n}.txt": lines([DOG]) for n in range(9)}
    index = read(write(tmp_path / "labelimg", files | {"classes.txt": b"cat\r\ndog\r\n"}))
    assert counts(index) == [7, 1, 2] and index.class_names == ["dog"]
    assert "classes without a training object, so left out: cat" in index.notes
    assert "pictures without a box kept as background: 1" in index.notes, "no text file: nothing is there"
    inner = {f"obj_train_data/{name}": content for name, content in files.items()}
    inner |= {"obj.names": b"cat\ndog\n", "obj.data": b"classes = 2\ntrain = data/train.txt\n", "train.txt": b""}
    assert counts(read(zipped(tmp_path / "cvat.zip", inner))) == [7, 1, 2]


def test_a_test_folder_that_roboflow_names_and_does_not_write(tmp_path: Path) -> None:
    things = {"train": {f"{n}": [CAT] for n in range(8)}, "valid": SETS["valid"], "test": {}}
    index = read(zipped(tmp_path / "cells.zip", yolo(things)))
    assert counts(index) == [6, 1, 2]
    assert any("names '../test/images' for test, where no picture is" in note for note in index.notes)


def test_polygons_and_key_points(tmp_path: Path) -> None:
    files = yolo(SETS)
    files["train/labels/a.txt"] = b"0 0.1 0.2 0.5 0.3 0.3 0.8\n1 .1 .1 .3 .1 .3 .3 .1 .3\n"
    index = read(write(tmp_path / "a", files))
    assert index.scenes["train"][0].boxes.tolist() == [[4, 6, 20, 24], [4, 3, 12, 9]]
    assert index.notes == ["boxes drawn around polygons: 2"]
    files["data.yaml"] += b"kpt_shape: [2, 3]\n"
    files["train/labels/a.txt"] = b"0 0.5 0.5 0.5 0.2  0.4 0.4 2 0.6 0.6 1\n"
    assert read(write(tmp_path / "b", files)).scenes["train"][0].boxes.tolist() == [[10, 12, 30, 18]]


def test_boxes_are_meant_on_the_picture_as_it_is_seen(tmp_path: Path) -> None:
    stream, exif = io.BytesIO(), Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (40, 30), "red").save(stream, "JPEG", exif=exif)
    files = yolo(SETS) | {"train/images/a.jpg": stream.getvalue(), "train/labels/a.txt": b"0 0.5 0.5 1 0.5"}
    scene = read(write(tmp_path / "a", files)).scenes["train"][0]
    assert (scene.width, scene.height, scene.upright) == (30, 40, True)
    assert scene.boxes.tolist() == [[0, 10, 30, 30]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"0 0.5 0.5 0.2", r"a\.txt: line 1 is not 'class x y width height', nor a polygon"),
        (b"\n0 a 0.5 0.2 0.1", r"a\.txt: line 2 is not 'class"),
        (b"0 nan 0.5 0.2 0.1", r"a\.txt: line 1 is not 'class"),
        (b"0 0.5 0.5 0.2 0.1 0.9", r"a\.txt: line 1 has 6 numbers: 5 make a box"),
        (b"2 0.5 0.5 0.2 0.1", r"a\.txt: line 1 is of class 2, the classes are 0 to 1"),
        (b"0 0.5 0.5 0.2 0", r"a\.txt: the box of object 1 \(cat: .* has no area\. voc\.bad_boxes"),
        (b"0 12 10 8 8", r"a\.txt: the box of object 1 .* lies outside the picture of 40x30"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    with pytest.raises(VocError, match=message) as told:
        read(zipped(tmp_path / "cells.zip", yolo(SETS) | {"train/labels/a.txt": line}))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.yaml": None}, r"says nowhere what the classes are: it needs data\.yaml, or classes\.txt or obj\.names"),
        ({"data.yaml": b"train: train/images\nnames: cat"}, r"data\.yaml: 'names' is no list of classes"),
        ({"data.yaml": b"train: nowhere\nnames: [cat, dog]"}, r"data\.yaml names 'nowhere', which is no folder"),
        (
            {"data.yaml": b"train: a.txt\nnames: [cat, dog]", "a.txt": b"x.jpg"},
            r"a\.txt lists 'x\.jpg', which is missing",
        ),
        ({"data.yaml": b"names: [cat\n"}, r"data\.yaml: not valid YAML"),
        (
            {"data.yaml": None, "a.yaml": b"names: [cat]", "b.yaml": b"names: [cat]"},
            r"which file is meant\? Set voc\.data",
        ),
    ],
)
def test_bad_sets_are_named(tmp_path: Path, changes: dict[str, bytes | None], message: str) -> None:
    files = {name: content for name, content in {**yolo(SETS), **changes}.items() if content is not None}
    with pytest.raises((VocError, ParamsError), match=message) as told:
        read(write(tmp_path / "cells", files))
    assert "\n" not in str(told.value)
