import re
import runpy
from pathlib import Path

import pytest

from devkits import devkit
from epsd.data.prepared import Prepared
from epsd.pipeline.stage import describe
from epsd.project import artifacts
from epsd.project.params import override, parse, read_yaml
from epsd.voc.scenes import VocIndex
from pictures import classes, write, zipped

SMALL = {"voc.train": 6, "voc.validation": 2, "voc.test": 3, "data.limit": 10}


def prepared(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> str:
    """The stage's main in `folder`, with the project's params.yaml and these changes."""
    tree = read_yaml(root / "params.yaml")
    for dotted, value in {**SMALL, **changes}.items():
        override(tree, dotted, value)
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    line: str = runpy.run_path(str(root / "stages" / "prepare.py"))["main"](parse(tree), None)
    return line


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_data_sets_are_written_and_told_in_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = prepared(root, tmp_path, monkeypatch)
    assert line.startswith("100 train, 100 validation, 100 test images of 10 classes, 1x8x8; left out: 1,497 by ")
    assert "by data.limit; detection: 6 train, " in line
    assert "\n" not in line
    assert Prepared.load(artifacts.DATA).sizes["test"] == 100
    assert VocIndex.load(artifacts.VOC_INDEX).counts()["test"]["pictures"] == 3


def test_where_nothing_is_to_be_detected_both_stages_say_so_and_dvc_finds_its_files(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = prepared(root, tmp_path, monkeypatch, voc={"name": "none"})
    assert line.startswith("100 train") and "detection" not in line
    tree = read_yaml(root / "params.yaml")
    override(tree, "voc", {"name": "none"})
    detect = runpy.run_path(str(root / "stages" / "detect.py"))["main"]
    assert detect(parse(tree), None) == "nothing to do, as voc.name is none"
    shown = (root / "dvc.yaml").read_text().partition("\nmetrics:")[2]
    of_detect = set(re.findall(r"artifacts/detect/[\w.]+", shown))
    assert len(of_detect) == 2
    assert all(Path(path).exists() for path in of_detect)
    assert describe(parse(tree), "detect").startswith("nothing to detect")


def test_the_same_params_give_the_same_bytes_and_another_seed_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, seed in (("a", 0), ("b", 5), ("b", 0)):
        prepared(root, tmp_path / folder, monkeypatch, seed=seed)
        if seed:
            other = written(tmp_path / folder)
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert other != written(tmp_path / "a")


def test_a_page_of_each_data_set_is_drawn(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images that are kept as an array and of those that are streamed; the same bytes again."""
    from PIL import Image

    large = zipped(tmp_path / "large.zip", classes(12, size=80))
    changes = {"data.limit": None, "dataset": {"name": "image_folder", "root": str(large), "size": 72}}
    for folder, change in (("small", {}), ("large", changes), ("large", changes)):
        before = written(tmp_path / folder / artifacts.PREPARE)
        prepared(root, tmp_path / folder, monkeypatch, **change)
        for page in (artifacts.IMAGES_FIGURE, artifacts.SCENES_FIGURE):
            with Image.open(tmp_path / folder / page) as drawn:
                assert min(drawn.size) > 300 and len(drawn.convert("L").getcolors(1 << 20) or ()) > 50
    assert before == written(tmp_path / "large" / artifacts.PREPARE)
    assert artifacts.read_json(artifacts.DATA_INDEX)["storage"] == "files"


def test_own_images_from_a_zip(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "mine.zip", classes(10))
    line = prepared(root, tmp_path, monkeypatch, dataset={"name": "image_folder", "root": str(archive)})
    assert line.startswith("14 train, 2 validation, 4 test images of 2 classes, 3x12x12; ")


def test_what_is_left_out_or_there_twice_is_told(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = classes(14, splits=("train", "test"))
    files |= {f"train/cat/{i}.heic": b"..." for i in range(12)} | {
        "notes": b"",
        ".hidden": b"",
        "train/dog/x.png": b"no",
    }
    files |= {"test/dog/twin.png": files["train/cat/3.png"], "train/cat/3.png": files["train/cat/3.png"]}
    write(tmp_path / "mine", files)
    choice = {"name": "image_folder", "root": str(tmp_path / "mine"), "unreadable": "skip"}
    boxes = {"train": {"a": [("dog", (5, 5, 5, 9)), ("dog", (5, 5, 9, 9))], "c": [("dog", (2, 2, 9, 9))]},
             "test": {"b": [("dog", (1, 1, 9, 9))]}}  # fmt: skip
    scenes = devkit(boxes)
    scenes["VOCdevkit/VOC2007/JPEGImages/b.jpg"] = scenes["VOCdevkit/VOC2007/JPEGImages/a.jpg"]
    voc = {"name": "devkit", "root": str(write(tmp_path / "voc", scenes)), "bad_boxes": "drop"}
    voc |= {"train": ["train"], "test": ["test"]}
    changes = {"dataset": choice, "voc": voc, "data.limit": 20, "data.validation": 0.0}
    tree = read_yaml(root / "params.yaml")
    for dotted, value in changes.items():
        override(tree, dotted, value)
    monkeypatch.chdir(tmp_path)
    line = runpy.run_path(str(root / "stages" / "prepare.py"))["main"](parse(tree), None)
    left_out = "left out: 12 .heic, 1 without one (endings not read), 1 unreadable (train/dog/x.png)"
    twins = "1 of test also in train, byte for byte (test/dog/twin.png as train/cat/3.png)"
    assert f"3x12x12; {left_out}; {twins}; detection: 2 train, 0 validation, 1 test scenes" in line
    boxes_told = "boxes dropped: 1 (without area, or outside the picture)"
    assert line.endswith(f"of 1 classes; {boxes_told}; 1 of test also in train, byte for byte (b as a)")
    warned = capsys.readouterr().err.splitlines()
    assert warned[0] == f"prepare: {twins}: what was learnt is tested again." and "(b as a)" in warned[1]
    index = artifacts.read_json(artifacts.DATA_INDEX)
    assert index["left_out"] and index["duplicates"] == [twins]
