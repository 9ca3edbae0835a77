"""Reading devkits: what is there is checked, what is wrong is named."""

import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import shared_file
from devkits import devkit, xml
from epsd.detection.average_precision import (
    Detections,
    ap_area,
    curve,
)
from epsd.files.archives import ArchiveError, open_tree
from epsd.files.images import EXIF_ORIENTATION
from epsd.files.layouts import SourceError
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.voc.annotations import read_index, read_picture
from epsd.voc.devkits import Sets, from_sets, read_annotation
from epsd.voc.entries import BoxSource
from epsd.voc.scenes import VocError, VocIndex
from pictures import write

CAT, DOG = 0, 1
GOOD = {
    "train": {"000001": [("cat", (1, 1, 40, 30)), ("dog", (5, 6, 7, 9), 1)], "000002": [("dog", (2, 2, 20, 12))]},
    "val": {"000003": [("cat", (3, 3, 9, 9))]},
    "test": {"000004": [("cat", (3, 3, 9, 9)), ("cat", (10, 10, 20, 20), 0)]},
}
FOLDER = "VOCdevkit/VOC2007/"


SETS: Sets = {"train": [(FOLDER, "train")], "validation": [(FOLDER, "val")], "test": [(FOLDER, "test")]}


def sources(root: Path, **sets: list[tuple[str, str]]) -> BoxSource:
    return from_sets(open_tree(root), {**SETS, **sets}, root / "out")  # type: ignore[dict-item]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path, devkit(GOOD))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_reads_what_the_devkit_says(root: Path) -> None:
    index = read_index(sources(root))
    assert index.class_names == ["cat", "dog"]
    first = index.scenes["train"][0]
    assert (first.width, first.height) == (40, 30)
    assert first.boxes.tolist() == [[0, 0, 40, 30], [4, 5, 7, 9]]  # 1-based and inclusive -> corners of pixels
    assert first.labels.tolist() == [0, 1]
    assert first.difficult.tolist() == [False, True]
    assert index.counts() == {
        "train": {"pictures": 2, "objects": 3, "difficult": 1},
        "validation": {"pictures": 1, "objects": 1, "difficult": 0},
        "test": {"pictures": 1, "objects": 2, "difficult": 0},
    }


def test_reads_what_torchvision_reads(root: Path) -> None:
    from torchvision.datasets import VOCDetection

    index = read_index(sources(root))
    theirs = VOCDetection(str(root), year="2007", image_set="train")
    for mine, (picture, target) in zip(index.scenes["train"], theirs, strict=True):
        boxes = [
            [float(o["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax")] for o in target["annotation"]["object"]
        ]
        assert (mine.boxes + np.array([1, 1, 0, 0])).tolist() == boxes
        assert np.array_equal(read_picture(mine, 3), np.asarray(picture).transpose(2, 0, 1))


def test_index_survives_saving_and_moving(root: Path) -> None:
    index = read_index(sources(root))
    index.save(root / "voc.json")
    moved = root.parent / "elsewhere"
    shutil.move(root, moved)
    again = VocIndex.load(moved / "voc.json")
    assert (again.class_names, again.digest, again.counts()) == (index.class_names, index.digest, index.counts())
    for before, after in zip(index.scenes["train"], again.scenes["train"], strict=True):
        assert np.array_equal(before.boxes, after.boxes)
        assert np.array_equal(before.difficult, after.difficult)
        assert read_picture(after, 1).shape == (1, 30, 40)


def test_index_of_something_else_is_refused(tmp_path: Path) -> None:
    artifacts.write_json(tmp_path / "voc.json", {"class_names": []})
    with pytest.raises(VocError, match=r"voc\.json: not an index"):
        VocIndex.load(tmp_path / "voc.json")
    with pytest.raises(ArtifactError, match=r"none\.json: missing"):
        VocIndex.load(tmp_path / "none.json")


def test_digest_follows_boxes_and_pictures(root: Path) -> None:
    before = read_index(sources(root)).digest
    assert read_index(sources(root)).digest == before
    (root / FOLDER / "Annotations/000002.xml").write_bytes(xml([("dog", (2, 2, 20, 13))]))
    assert read_index(sources(root)).digest != before


def test_limit_draws_by_seed_and_keeps_the_order(tmp_path: Path) -> None:
    many = {f"{n:02d}": [("cat", (1, 1, 9, 9))] for n in range(20)}
    root = write(tmp_path, devkit({"train": many, "val": GOOD["val"], "test": GOOD["test"]}))
    drawn = [[s.id for s in read_index(sources(root), limit=5, seed=seed).scenes["train"]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 5
    assert drawn[0] == sorted(drawn[0])


def test_two_years_make_one_split(root: Path) -> None:
    more = {"train": {"2008_000001": [("bird", (1, 1, 9, 9))]}}
    write(root, devkit(more, prefix="VOCdevkit/VOC2012"))
    index = read_index(sources(root, train=[(FOLDER, "train"), ("VOCdevkit/VOC2012/", "train")]))
    assert [s.id for s in index.scenes["train"]] == ["000001", "000002", "2008_000001"]
    assert index.class_names == ["bird", "cat", "dog"]


def test_second_column_of_a_class_file_is_no_id(root: Path) -> None:
    (root / FOLDER / "ImageSets/Main/cat_train.txt").write_text("000001  1\n000002 -1\n")
    assert [entry.id for entry in sources(root, train=[(FOLDER, "cat_train")]).splits["train"]] == ["000001", "000002"]


def _damage(root: Path, name: str, content: bytes | None) -> None:
    path = root / FOLDER / name
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Annotations/000002.xml", None, r"000002\.xml: no such annotation"),
        ("Annotations/000002.xml", b"<annotation><object>", r"000002\.xml: not a readable XML"),
        ("Annotations/000002.xml", xml([]), r"000002\.xml: no boxes.*'background'"),
        (
            "Annotations/000002.xml",
            xml([("dog", (5, 5, 5, 9))]),
            r"000002\.xml: the box of object 1 \(dog.*has no area",
        ),
        ("Annotations/000002.xml", xml([("dog", (5, 5, 50, 9))]), r"000002\.xml: .*outside the picture of 40x30"),
        ("Annotations/000002.xml", xml([("dog", (-5, 5, 9, 9))]), r"000002\.xml: .*outside"),
        (
            "Annotations/000004.xml",
            xml([("cow", (5, 5, 8, 9))]),
            r"000004\.xml: unknown class 'cow'.*cat, dog.*class_names",
        ),
        ("Annotations/000002.xml", xml([("", (5, 5, 8, 9))]), r"000002\.xml: object 1 has no name"),
        ("Annotations/000002.xml", xml([("dog", ("a", 5, 8, 9))]), r"000002\.xml: xmin in bndbox of object 1 is 'a'"),  # type: ignore[list-item]
        ("Annotations/000002.xml", xml([("dog", ("nan", 5, 8, 9))]), r"000002\.xml: xmin.*'nan'"),  # type: ignore[list-item]
        (
            "Annotations/000002.xml",
            b"<annotation><object><name>dog</name></object></annotation>",
            r"000002\.xml: object 1 has no bndbox",
        ),
        (
            "Annotations/000002.xml",
            xml([("dog", (5, 5, 8, 9))]).replace(b"<bndbox>", b"<difficult>Unspecified</difficult><bndbox>"),
            r"000002\.xml: difficult is 'Unspecified', expected 0 or 1",
        ),
        (
            "Annotations/000002.xml",
            b"<annotation><size><width>80</width><height>60</height></size></annotation>",
            r"000002\.xml: states a size of 80x60, the picture has 40x30",
        ),
        ("Annotations/000002.xml", b'<?xml version="1.0" encoding="foo-8"?><a/>', r"000002\.xml: not a readable XML"),
        ("JPEGImages/000002.jpg", None, r"no picture '000002', .*train\.txt names it.*unreadable"),
        ("JPEGImages/000002.jpg", b"no picture", r"000002\.jpg: not an image"),
        ("ImageSets/Main/train.txt", None, r"has no file '.*train\.txt'"),
        ("ImageSets/Main/train.txt", b"\n", r"train\.txt: lists no picture"),
        ("ImageSets/Main/test.txt", b"000001\n", r"000001 \(1 in all\) is both in train and in test"),
        ("ImageSets/Main/val.txt", b"000001\n", r"000001 \(1 in all\) is both in train and in validation"),
    ],
)
def test_bad_devkit_is_named(root: Path, name: str, content: bytes | None, message: str) -> None:
    _damage(root, name, content)
    with pytest.raises((VocError, ArchiveError), match=message) as caught:
        read_index(sources(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "flag"), [("1", True), (" True ", True), ("0", False), ("false", False), ("", False)])
def test_what_is_flagged_difficult(text: str, flag: bool) -> None:
    content = xml([("dog", (5, 5, 8, 9))]).replace(b"<bndbox>", f"<difficult>{text}</difficult><bndbox>".encode())
    assert read_annotation(content).difficult.tolist() == [flag]


def test_a_test_split_needs_an_object_that_counts(root: Path) -> None:
    for path in (root / FOLDER / "Annotations").glob("*.xml"):
        content = path.read_bytes().replace(b"<difficult>0</difficult>", b"")
        path.write_bytes(content.replace(b"<bndbox>", b"<difficult>1</difficult><bndbox>"))
    with pytest.raises(VocError, match=r"the test split holds no object that counts"):
        read_index(sources(root))


def test_truncated_picture_is_named(root: Path) -> None:
    path = root / FOLDER / "JPEGImages/000002.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(VocError, match=r"000002\.jpg: cannot be read as an image"):
        read_index(sources(root))


def test_empty_picture_can_stay_as_background(root: Path) -> None:
    _damage(root, "Annotations/000002.xml", xml([]))
    index = read_index(sources(root), empty="background")
    assert index.scenes["train"][1].boxes.shape == (0, 4)


def test_bad_boxes_can_be_dropped_and_are_counted(root: Path) -> None:
    bad = [("dog", (5, 5, 5, 9)), ("cat", (2, 3, 8, 9)), ("dog", (5, 5, 500, 9))]
    _damage(root, "Annotations/000002.xml", xml(bad))
    index = read_index(sources(root), bad_boxes="drop")
    assert index.dropped == 2
    assert index.notes[0] == "boxes dropped: 2 (without area, or outside the picture)"
    assert "pictures left out by voc.limit: 1" in read_index(sources(root), bad_boxes="drop", limit=1).notes
    assert index.scenes["train"][1].boxes.tolist() == [[1, 2, 8, 9]]
    assert index.scenes["train"][1].labels.tolist() == [CAT]


def test_boxes_counted_from_zero_are_clipped(root: Path) -> None:
    _damage(root, "Annotations/000002.xml", xml([("dog", (0, 0, 40, 30))]))
    assert read_index(sources(root)).scenes["train"][1].boxes.tolist() == [[0, 0, 40, 30]]


def test_repeated_class_name_and_missing_splits(root: Path) -> None:
    for name in ("cat", "CAT"):
        with pytest.raises(SourceError, match=f"voc.class_names: class names clash: .*{name}"):
            read_index(sources(root), class_names=["cat", "dog", name])
    _damage(root, "Annotations/000002.xml", xml([("Dog", (5, 5, 9, 9)), ("dog", (1, 1, 9, 9))]))
    with pytest.raises(SourceError, match=r"class names clash: Dog, dog \(upper and lower case"):
        read_index(sources(root))
    with pytest.raises(VocError, match=r"the test split holds no object that counts \(there is none\)"):
        read_index(sources(root, test=[]), classes={"dog": ["Dog"]})


def test_exif_turns_the_picture_only_where_the_boxes_mean_it(root: Path) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (40, 30), "red").save(stream, "JPEG", exif=exif)
    _damage(root, "JPEGImages/000002.jpg", stream.getvalue())
    stored = read_index(sources(root)).scenes["train"][1]
    assert (stored.width, stored.height) == (40, 30)
    assert read_picture(stored, 3).shape == (3, 30, 40)
    _damage(root, "Annotations/000002.xml", xml([("dog", (2, 2, 20, 40))], size=(30, 40)))
    turned = read_index(sources(root)).scenes["train"][1]
    assert (turned.width, turned.height) == (30, 40)
    assert read_picture(turned, 3).shape == (3, 40, 30)


def test_grey_and_colour(root: Path) -> None:
    one = read_index(sources(root)).scenes["train"][0]
    assert read_picture(one, 1).shape == (1, 30, 40)
    assert read_picture(one, 3).dtype == np.uint8


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_pictures_of_voc_2007(tmp_path: Path) -> None:
    from epsd.datasets.devkit import Devkit

    devkit = Devkit(
        root=str(shared_file("datasets", "voc2007-sample.zip")),
        train=["VOC2007/train"],
        validation=["VOC2007/val"],
        limit=20,
    )
    sets = devkit(tmp_path, seed=0)
    index = read_index(sets, seed=0, **devkit.reading)
    assert len(index.class_names) == 20
    assert index.class_names[:3] == ["aeroplane", "bicycle", "bird"]
    assert {split: count["pictures"] for split, count in index.counts().items()} == {
        "train": 20,
        "validation": 20,
        "test": 20,
    }
    assert len(sets.splits["test"]) == 300
    perfect = [Detections(s.boxes, np.ones(len(s.labels)), s.labels) for s in index.scenes["test"]]
    scores = [ap_area(curve(perfect, index.scenes["test"], label)) for label in range(20)]
    there = [score for score in scores if not math.isnan(score)]
    assert len(there) > 10
    assert there == pytest.approx([1.0] * len(there), abs=1e-12)
