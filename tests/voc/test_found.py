"""Devkits as they are found: what labelling tools, Windows and people make of Pascal VOC's layout."""

import codecs
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from devkits import Thing, xml
from epsd.datasets.devkit import Devkit
from epsd.files.layouts import SourceError
from epsd.voc.annotations import read_index
from epsd.voc.scenes import VocError, VocIndex
from pictures import hash_of, picture, write, zipped

CAT: Thing = ("cat", (2, 2, 20, 12))
DOG: Thing = ("dog", (5, 5, 30, 20))


def read(root: Path, seed: int = 0, **settings: Any) -> VocIndex:
    kit = Devkit(root=str(root), **settings)
    return read_index(kit(root.parent / "out", seed=0), seed=seed, **kit.reading)


def ids(index: VocIndex) -> dict[str, list[str]]:
    return {split: [scene.id for scene in scenes] for split, scenes in index.scenes.items()}


def flat(things: Mapping[str, list[Thing]], folder: str = "", boxes: str | None = None) -> dict[str, bytes]:
    """Pictures and XML files, side by side or (`boxes`) in another folder."""
    files = {}
    for name, some in things.items():
        files[f"{folder}{name}.jpg"] = picture(hash_of(name), (40, 30), "JPEG")
        files[f"{folder if boxes is None else boxes}{name}.xml"] = xml(some)
    return files


def many(count: int = 20) -> dict[str, list[Thing]]:
    return {f"{number:02d}": [CAT] if number % 4 else [CAT, DOG] for number in range(count)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lists_of_windows_and_names_with_spaces_and_endings(tmp_path: Path, encoding: str, ending: str) -> None:
    top, files = "mine/", {}
    for number, name in enumerate(["IMG (0).JPEG", "b.jfif", "c d.PnG", "2020.01.02.jpg", "ü.TIFF", "z.jpg"]):
        form = {"PnG": "PNG", "TIFF": "TIFF"}.get(name.rpartition(".")[2], "JPEG")
        files[f"{top}JPEGImages/{name}"] = picture(number, (40, 30), form)
        files[f"{top}Annotations/{name.rpartition('.')[0]}.xml"] = xml([CAT])
    lines = ["IMG (0)", "b", "c d.PnG  1", "2020.01.02", "mine/JPEGImages/ü.TIFF", r"..\JPEGImages\z.jpg", ""]
    files |= {f"{top}ImageSets/Main/train.txt": ending.join(lines[:4]).encode(encoding)}
    files |= {f"{top}ImageSets/Main/test.txt": ending.join(lines[4:]).encode(encoding)}
    index = read(write(tmp_path / "root", files))
    assert index.scenes["validation"], "held out of train, as there is no list"
    assert sorted(ids(index)["train"] + ids(index)["validation"]) == ["2020.01.02", "IMG (0)", "b", "c d"]
    assert ids(index)["test"] == ["ü", "z"]


def test_a_mark_that_is_no_text_is_told(tmp_path: Path) -> None:
    files = {"ImageSets/Main/train.txt": codecs.BOM_UTF8 + b"\xff", "ImageSets/Main/test.txt": b"a"}
    with pytest.raises(VocError, match=r"'ImageSets/Main/train.txt' is not UTF-8 text"):
        read(write(tmp_path / "root", files))


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("folder", "boxes"),
    [
        ("", None),
        ("images/", "annotations/"),
        ("JPEGImages/", "Annotations/"),
        ("a/images/images/", "a/labels/xmls/"),
        ("photos of us/", "our boxes/"),
    ],
)
def test_without_lists_pictures_and_boxes_of_one_name_belong_together(
    tmp_path: Path, kind: str, folder: str, boxes: str | None
) -> None:
    files = flat(many(), folder, boxes)
    root = write(tmp_path / "root", files) if kind == "folder" else zipped(tmp_path / "root.zip", files)
    index = read(root)
    assert {split: len(scenes) for split, scenes in index.scenes.items()} == {"train": 14, "validation": 2, "test": 4}
    found = ids(index)
    assert sorted(chain(*found.values())) == list(many())
    assert "held out of train by seed: test, validation" in index.notes
    assert ids(read(root)) == found != ids(read(root, seed=1))
    assert {scene.image.is_file() for scenes in index.scenes.values() for scene in scenes} == {True}


def test_what_is_held_out_has_its_share_of_a_rare_class(tmp_path: Path) -> None:
    index = read(write(tmp_path / "root", flat(many(40))))
    shown = [bool((scene.labels == 1).any()) for scene in index.scenes["test"]]
    assert (len(shown), sum(shown)) == (8, 2), "one in four, as of all"


def test_folders_may_be_splits(tmp_path: Path) -> None:
    things = {split: {f"{split}{number}": [CAT] for number in range(2)} for split in ("train", "valid", "test")}
    beside: dict[str, bytes] = {}
    apart: dict[str, bytes] = {}
    for split, some in things.items():
        beside |= flat(some, f"{split}/")
        apart |= flat(some, f"images/{split}/", f"annotations/{split}/")
    for number, files in enumerate((beside, apart)):
        index = read(write(tmp_path / str(number), files))
        expected = {"train": "train", "validation": "valid", "test": "test"}
        assert ids(index) == {split: list(things[name]) for split, name in expected.items()}
        assert index.notes == []
    index = read(write(tmp_path / "loose", beside | flat({"x": [CAT]})))
    assert index.notes == ["beside the split folders, left out: x.xml"]
    del things["train"]
    with pytest.raises(VocError, match=r"annotations in test, validation, and none in a folder named train"):
        read(write(tmp_path / "none", {name: c for name, c in beside.items() if not name.startswith("train")}))


def test_a_missing_test_list_is_held_out_of_train_and_a_missing_val_list_too(tmp_path: Path) -> None:
    lists = {"ImageSets/Main/train.txt": "\n".join(many()).encode()}
    files = flat(many(), "JPEGImages/", "Annotations/")
    assert {split: len(some) for split, some in ids(read(write(tmp_path / "a", files | lists))).items()} == {
        "train": 14,
        "validation": 2,
        "test": 4,
    }
    lists = {"ImageSets/Main/default.txt": lists["ImageSets/Main/train.txt"], "ImageSets/Main/cat_x.txt": b"00 1"}
    index = read(write(tmp_path / "b", files | lists))
    assert len(index.scenes["test"]) == 4, "whatever the list is called"
    assert len(read(tmp_path / "b", train=["default"]).scenes["validation"]) == 0, "none was asked for"


@pytest.mark.parametrize("listed", [True, False])
def test_pictures_without_boxes_are_asked_about(tmp_path: Path, listed: bool) -> None:
    files = flat(many(), "JPEGImages/", "Annotations/")
    for number in range(5, 19):
        del files[f"Annotations/{number:02d}.xml"]
    if listed:
        files["ImageSets/Main/train.txt"] = "\n".join(many()).encode()
    root = write(tmp_path / "root", files)
    with pytest.raises(VocError, match=r"06\.xml: no such annotation; .*in all\)\. voc\.unannotated: ") as caught:
        read(root)
    assert str(caught.value).count(".xml") == 10 and "(14 in all)" in str(caught.value)
    index = read(root, unannotated="skip")
    assert sum(map(len, index.scenes.values())) == 6 and "pictures without annotation left out: 14" in index.notes
    index = read(root, unannotated="background")
    assert sum(map(len, index.scenes.values())) == 20
    assert "pictures without annotation kept as background: 14" in index.notes


def test_corners_are_mended_and_counted(tmp_path: Path) -> None:
    things: dict[str, list[Thing]] = {
        "train": [("cat", (20, 12, 2, 2)), ("cat", (30, 20, 42, 31)), ("cat", (0, 0, 40, 30))],
        "test": [CAT],
    }
    files = flat(things, "JPEGImages/", "Annotations/")
    files |= {f"ImageSets/Main/{name}.txt": name.encode() for name in things}
    index = read(write(tmp_path / "root", files), train=["train"])
    assert index.scenes["train"][0].boxes.tolist() == [[1, 1, 20, 12], [29, 19, 40, 30], [0, 0, 40, 30]]
    assert index.notes == ["boxes clipped at the edge: 1", "boxes with corners swapped back: 1"]


def test_all_bad_boxes_are_told_at_once_with_the_archive_and_the_key(tmp_path: Path) -> None:
    things: dict[str, list[Thing]] = {f"{number:02d}": [("cat", (5, 5, 5, 9)), DOG] for number in range(12)}
    things["12"] = [("dog", (5, 5, 60, 20)), ("dog", (5, 5, 9, 9))]
    root = zipped(tmp_path / "cells.zip", flat(things, "JPEGImages/", "Annotations/"))
    with pytest.raises(VocError) as caught:
        read(root)
    told = str(caught.value)
    assert told.startswith(f"{root}: Annotations/") and told.count(str(tmp_path)) == 1 and "\n" not in told
    assert told.count(".xml") == 10 and "(13 in all). voc.bad_boxes: 'drop' leaves" in told
    assert "the box of object 1 (cat: xmin 5, ymin 5, xmax 5, ymax 9) has no area" in told
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert read(root, bad_boxes="drop", empty="background").dropped == 13


def test_kinds_of_faults_are_told_one_after_another(tmp_path: Path) -> None:
    files = flat(many()) | {"03.jpg": b"no picture", "04.xml": xml([])}
    with pytest.raises(VocError, match=r"03\.jpg: not an image.*voc\.unreadable") as caught:
        read(write(tmp_path / "root", files))
    assert "04.xml: no boxes. voc.empty" in str(caught.value)
    index = read(tmp_path / "root", unreadable="skip", empty="background")
    assert "unreadable pictures left out: 03.jpg" in index.notes
    assert "pictures without a box kept as background: 1" in index.notes


@pytest.mark.parametrize(
    "polygon",
    [
        "<polygon><x1>3</x1><y1>4</y1><x2>9</x2><y2>5</y2><x3>5</x3><y3>11</y3></polygon>",  # Roboflow
        "<polygon><pt><x>3</x><y>4</y></pt><pt><x>9</x><y>5</y></pt><pt><x>5</x><y>11</y></pt></polygon>",  # LabelMe
    ],
)
def test_a_polygon_becomes_its_bounding_box(tmp_path: Path, polygon: str) -> None:
    only = f"<annotation><object><name>cat</name>{polygon}</object></annotation>".encode()
    files = flat(many(3)) | {f"{number:02d}.xml": only for number in range(3)}
    index = read(write(tmp_path / "root", files))
    assert index.scenes["train"][0].boxes.tolist() == [[2, 3, 9, 11]]
    assert "boxes drawn around polygons: 3" in index.notes
    bad = only.replace(b"<y", b"<z").replace(b"</y", b"</z")
    with pytest.raises(VocError, match="object 1 has no bndbox, and a polygon without points"):
        read(write(tmp_path / "bad", flat(many(3)) | {"01.xml": bad}))


def test_some_of_the_classes(tmp_path: Path) -> None:
    root = write(tmp_path / "root", flat(many()))
    index = read(root, class_names=["dog"])
    assert (index.class_names, sum(count["objects"] for count in index.counts().values())) == (["dog"], 5)
    assert "objects of other classes than voc.class_names left out: 20 cat" in index.notes
    assert sum(map(len, index.scenes.values())) == 20, "pictures that show none of them are background"
    assert "classes without a training object: zebra" in read(root, class_names=["cat", "dog", "zebra"]).notes
    with pytest.raises(VocError, match=r"voc\.class_names: unknown 'dogs'\. Did you mean 'dog'\? Valid: cat, dog"):
        read(root, class_names=["cat", "dogs"])
    with pytest.raises(VocError, match=r"voc\.class_names: unknown 'zebra'\. Valid: cat, dog"):
        read(root, class_names=["zebra"])


def test_spellings_are_merged(tmp_path: Path) -> None:
    names = ["helmet", "Helmet", "hard-hat", "head"]
    things: dict[str, list[Thing]] = {f"{n:02d}": [(names[n % 4], (2, 2, 20, 12))] for n in range(20)}
    root = write(tmp_path / "root", flat(things))
    with pytest.raises(SourceError, match=r"class names clash: Helmet, helmet .*voc\.classes: \{name"):
        read(root)
    with pytest.raises(SourceError, match=r"class names clash: Helmet, helmet"):
        read(root, class_names=["helmet"])
    index = read(root, classes={"helmet": ["Helmet", "hard-hat"]})
    assert index.class_names == ["head", "helmet"]
    assert sum(int((scene.labels == 1).sum()) for some in index.scenes.values() for scene in some) == 15
    with pytest.raises(VocError, match=r"voc\.classes: unknown 'hardhat'\. Did you mean 'hard-hat'"):
        read(root, classes={"helmet": ["Helmet", "hardhat"]})
    with pytest.raises(VocError, match=r"'head' is a spelling of both 'helmet' and 'x'"):
        read(root, classes={"helmet": ["Helmet", "head"], "x": ["head"]})


def test_a_class_that_only_test_shows_says_what_to_do(tmp_path: Path) -> None:
    files = flat({"a": [CAT]}, "train/") | flat({"b": [CAT, ("cats", (1, 1, 9, 9))]}, "test/")
    told = r"test/b\.xml: unknown class 'cats'\. Did you mean 'cat'\? Known .* cat\. voc\.class_names: .*voc\.classes"
    with pytest.raises(VocError, match=told):
        read(write(tmp_path / "root", files | flat({"v": [CAT]}, "val/")))
