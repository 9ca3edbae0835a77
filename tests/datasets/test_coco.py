"""COCO's JSON, as its authors and as labelling tools lay it out."""

import json
from pathlib import Path
from typing import Any

import pytest

from devkits import Thing, instances
from epsd.datasets.coco import Coco
from epsd.voc.annotations import read_index
from epsd.voc.scenes import VocError, VocIndex
from pictures import hash_of, picture, write, zipped

CAT: Thing = ("cat", (2, 2, 20, 12))
CROWD: Thing = ("dog", (5, 5, 30, 20), 1)
TRAIN: dict[str, list[Thing]] = {"1": [CAT, CROWD], "2": [("dog", (3, 3, 9, 9))], "3": []}


def read(root: Path, **settings: Any) -> VocIndex:
    kit = Coco(root=str(root), **settings)
    return read_index(kit(root.parent / "out", seed=0), **kit.reading)


def official(**changes: Any) -> dict[str, bytes]:
    """annotations/instances_<split>2017.json, and the pictures in folders beside it."""
    files = {
        f"annotations/captions_{split}2017.json": b'{"images": [], "annotations": []}' for split in ("train", "val")
    }
    for split, content in (("train", TRAIN), ("val", {"4": [CAT]})):
        rows = instances(content) | (changes if split == "train" else {})
        files[f"annotations/instances_{split}2017.json"] = json.dumps(rows).encode()
        files |= {f"{split}2017/{name}.jpg": picture(hash_of(name), (40, 30), "JPEG") for name in content}
    return files


def test_the_official_layout(tmp_path: Path) -> None:
    index = read(write(tmp_path / "coco", official()), test=["instances_val2017.json"], validation=[])
    assert [scene.id for scene in index.scenes["train"]] == ["1", "2", "3"]
    assert [scene.id for scene in index.scenes["test"]] == ["4"]
    first = index.scenes["train"][0]
    assert first.boxes.tolist() == [[1, 1, 20, 12], [4, 4, 30, 20]]
    assert first.difficult.tolist() == [False, True], "a crowd is neither learnt nor scored"
    assert index.notes == ["pictures without a box kept as background: 1"]


def test_archives_beside_each_other_as_they_are_published(tmp_path: Path) -> None:
    files = official()
    (tmp_path / "coco").mkdir()
    for folder in ("annotations", "train2017", "val2017"):
        zipped(tmp_path / f"coco/{folder}.zip", {n: c for n, c in files.items() if n.startswith(folder)})
    index = read(tmp_path / "coco", test=["annotations/instances_val2017.json"], validation=[])
    assert [scene.image.read_bytes() for scene in index.scenes["test"]] == [files["val2017/4.jpg"]]


def test_one_file_and_its_pictures_somewhere(tmp_path: Path) -> None:
    content = {f"{number}": [CAT] for number in range(10)}
    files = {f"images/default/{name}.jpg": picture(hash_of(name), (40, 30), "JPEG") for name in content}
    files["annotations/instances_default.json"] = json.dumps(instances(content, folder="C:\\data\\")).encode()
    index = read(write(tmp_path / "cvat", files))
    assert {split: len(scenes) for split, scenes in index.scenes.items()} == {"train": 7, "validation": 1, "test": 2}


def test_a_polygon_without_bbox_gets_its_box_and_unused_categories_go(tmp_path: Path) -> None:
    rows = instances(TRAIN)
    del rows["annotations"][0]["bbox"]
    rows["annotations"][0]["segmentation"] = [[3, 4, 9, 5, 5, 11], [2, 6, 4, 8, 3, 7]]
    rows["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    index = read(write(tmp_path / "coco", official(**rows)), test=["instances_val2017.json"], validation=[])
    assert index.scenes["train"][0].boxes[0].tolist() == [2, 4, 9, 11]
    assert index.class_names == ["cat", "dog"]
    assert "boxes drawn around polygons: 1" in index.notes
    assert "classes without a training object, so left out: pets" in index.notes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 77}, r"instances_train2017\.json: annotation 0 has no image 77 to be of"),
        ({"category_id": 5}, r"annotation 0 has no category 5 to be of"),
        ({"image_id": [1]}, r"annotation 0 has no image \[1\] to be of"),
        ({"category_id": {"a": 1}}, r"annotation 0 has no category \{'a': 1\} to be of"),
        ({"bbox": [1, 2, 3]}, r"instances_train2017\.json, 1\.jpg: annotation 0 has neither a bbox of four numbers"),
        ({"bbox": [1, 2, "x", 4]}, r"annotation 0 has neither a bbox of four numbers nor a polygon"),
        ({"bbox": [1, 2, 0, 4]}, r"2017\.json, 1\.jpg: the box of object 1 \(cat: .*\) has no area\. voc\.bad_boxes"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = instances(TRAIN)
    rows["annotations"][0] |= change
    with pytest.raises(VocError, match=message) as told:
        read(write(tmp_path / "coco", official(**rows)))
    assert "\n" not in str(told.value)


def test_bad_files_are_named(tmp_path: Path) -> None:
    files = official()
    name = "annotations/instances_train2017.json"
    with pytest.raises(VocError, match=rf"{name}: not a readable JSON file"):
        read(write(tmp_path / "a", files | {name: b"{"}))
    with pytest.raises(
        VocError, match=r"voc\.test: unknown 'instances_vall2017\.json'\. Did you mean '.*val2017.json'"
    ):
        read(write(tmp_path / "b", files), test=["instances_vall2017.json"])
    with pytest.raises(VocError, match=r"which file is to be learnt\? Set voc\.train"):
        read(write(tmp_path / "c", {"a.json": files[name], "b.json": files[name]}))
    with pytest.raises(VocError, match=r"no picture '1', .*train2017\.json names it.*voc\.unreadable"):
        read(write(tmp_path / "d", {path: content for path, content in files.items() if path != "train2017/1.jpg"}))
    stated = instances(TRAIN)
    for row in stated["images"]:
        row["width"], row["height"] = 80, 60
    with pytest.raises(VocError, match=r"\.jpg: states a size of 80x60, the picture has 40x30"):
        read(write(tmp_path / "e", official(**stated)))
