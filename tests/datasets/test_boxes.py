"""What every detection data set of one's own keeps, whatever its format: the same pictures give the same scenes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devkits import WRITERS, Thing
from epsd.datasets import DEVKITS
from epsd.registry import choose, settings_of
from epsd.types import EpsdError
from epsd.voc.annotations import read_index
from epsd.voc.scenes import VocError, VocIndex
from pictures import tarred, write, zipped

CAT: Thing = ("cat", (2, 2, 20, 12))
DOG: Thing = ("dog", (5, 5, 30, 20))
SETS: dict[str, dict[str, list[Thing]]] = {
    "train": {"a": [CAT, DOG], "b c": [DOG], "d.e": [("cat", (1, 1, 40, 30))]},
    "valid": {"f": [CAT]},
    "test": {"g": [DOG, CAT]},
}
ROOTED = [name for name, cls in DEVKITS.items() if "root" in settings_of(cls)]


def read(name: str, root: Path, seed: int = 0, **settings: Any) -> VocIndex:
    kit = choose(DEVKITS, {"name": name, "root": str(root), **settings}, "voc")
    return read_index(kit(root.parent / "out", seed=0), seed=seed, **kit.reading)


def test_every_variant_with_a_root_is_here() -> None:
    assert set(WRITERS) == set(ROOTED)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize("name", ROOTED)
def test_the_same_pictures_and_boxes_come_out(tmp_path: Path, name: str, kind: str) -> None:
    files = {f"cells/{path}": content for path, content in WRITERS[name](SETS).items()}
    make = {"folder": write, "zip": zipped, "tar": tarred}[kind]
    index = read(name, make(tmp_path / (f"cells.{kind}" if kind != "folder" else "cells"), files))
    assert index.class_names == ["cat", "dog"] and index.notes == []
    for split, folder in (("train", "train"), ("validation", "valid"), ("test", "test")):
        assert [scene.id for scene in index.scenes[split]] == list(SETS[folder])
        for scene, things in zip(index.scenes[split], SETS[folder].values(), strict=True):
            assert (scene.width, scene.height) == (40, 30) and scene.image.is_file()
            assert [index.class_names[label] for label in scene.labels] == [thing[0] for thing in things]
            corners = np.array([thing[1] for thing in things]) - [1, 1, 0, 0]
            assert np.allclose(scene.boxes, corners, atol=1e-6)
    index.save(tmp_path / "out" / "voc.json")
    assert VocIndex.load(tmp_path / "out" / "voc.json").digest == index.digest


@pytest.mark.parametrize("name", ROOTED)
def test_splits_that_are_missing_are_held_out_of_train(tmp_path: Path, name: str) -> None:
    things = {"train": {f"{number:02d}": [CAT] if number % 4 else [DOG] for number in range(20)}}
    root = write(tmp_path / "cells", WRITERS[name](things))
    index = read(name, root)
    assert {split: len(scenes) for split, scenes in index.scenes.items()} == {"train": 14, "validation": 2, "test": 4}
    assert index.notes == ["held out of train by seed: test, validation"]
    assert read(name, root).digest == index.digest != read(name, root, seed=1).digest
    assert "pictures left out by voc.limit: 10" in read(name, root, limit=4).notes


@pytest.mark.parametrize("name", ROOTED)
def test_settings_that_all_of_them_have(tmp_path: Path, name: str) -> None:
    files = WRITERS[name]({**SETS, "test": {"g": [DOG, ("cat", (5, 5, 70, 20))], "h": [DOG], "i": []}})
    files["test/h.jpg" if "test/h.jpg" in files else "test/images/h.jpg"] = b"no picture"
    root = zipped(tmp_path / "cells.zip", files)
    with pytest.raises(VocError, match=r"cells\.zip: .*voc\.bad_boxes.*h\.jpg: not an image.* voc\.unreadable") as told:
        read(name, root)
    assert "\n" not in str(told.value) and str(told.value).count("cells.zip") == 1
    settings = {"unreadable": "skip", "bad_boxes": "drop", "empty": "background"}
    index = read(name, root, **settings)
    assert [scene.id for scene in index.scenes["test"]] == ["g", "i"]
    assert "boxes dropped: 1 (without area, or outside the picture)" in index.notes
    assert f"unreadable pictures left out: {'test/h.jpg' if name != 'yolo' else 'test/images/h.jpg'}" in index.notes
    with pytest.raises(VocError, match=r"no boxes. voc\.empty: 'background'"):
        read(name, root, **settings | {"empty": "error"})
    assert read(name, root, **settings, class_names=["dog"]).class_names == ["dog"]
    assert read(name, root, **settings, classes={"pet": ["cat", "dog"]}).class_names == ["pet"]


@pytest.mark.parametrize("name", ROOTED)
def test_what_is_not_there_or_something_else_is_one_clear_line(tmp_path: Path, name: str) -> None:
    for root in (tmp_path / "nowhere", zipped(tmp_path / "other.zip", {"readme.txt": b"hello"})):
        with pytest.raises(EpsdError, match=f"{root}: ") as told:
            read(name, root)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ROOTED)
def test_files_of_another_format_are_recognised(tmp_path: Path, name: str) -> None:
    for other in set(ROOTED) - {name}:
        with pytest.raises(VocError, match=rf"It looks like voc\.name: {other}\."):
            read(name, write(tmp_path / other, WRITERS[other](SETS)))


@pytest.mark.parametrize("name", ROOTED)
def test_what_dvc_has_and_is_not_here_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "cells.zip.dvc").write_text("outs: []")
    with pytest.raises(
        EpsdError, match=r"cells\.zip: no such folder or archive\. DVC has it: `dvc pull .*cells\.zip\.dvc`"
    ):
        read(name, tmp_path / "cells.zip")


@pytest.mark.parametrize("name", ROOTED)
def test_an_annotation_that_cannot_be_used_is_told_with_all_others_or_left_out(tmp_path: Path, name: str) -> None:
    def bad(path: str, content: bytes) -> bytes:
        spoilt = {
            "xml": b"<annotation>",
            "txt": b"0 0.5 x",
            "json": content.replace(b'"bbox": [', b'"bbox": ["x", ', 1),
        }
        return spoilt.get(path.rpartition(".")[2], content)

    files = WRITERS[name]({**SETS, "train": {"a": [CAT], "b": [DOG], "c": [CAT]}})
    spoilt = {path: bad(path, content) for path, content in files.items() if "valid" in path or "/a." in path}
    root = write(tmp_path / "cells", {**files, **spoilt})
    with pytest.raises(VocError, match=r"cells: .*valid.*voc\.unreadable") as told:
        read(name, root)
    assert str(told.value).count("voc.unreadable") == 1 and str(told.value).count(";") == (0 if name == "coco" else 1)
    index = read(name, root, unreadable="skip")
    assert len(index.scenes["validation"]) == 0 and len(index.scenes["train"]) == (3 if name == "coco" else 2)
    assert any(
        note.startswith("annotations that cannot be read, with their pictures left out: ") for note in index.notes
    )
