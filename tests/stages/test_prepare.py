import runpy
from pathlib import Path

import pytest

from epsd.data.prepared import Prepared
from epsd.project import artifacts
from epsd.project.params import override, parse, read_yaml
from epsd.voc.annotations import VocIndex
from pictures import classes, zipped

SMALL = {"voc.train": 6, "voc.validation": 2, "voc.test": 3, "data.limit": 10}


def prepared(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> str:
    """The stage's main in `folder`, with the project's params.yaml and these changes."""
    tree = read_yaml(root / "params.yaml")
    for dotted, value in {**SMALL, **changes}.items():
        override(tree, dotted, value)
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    line: str = runpy.run_path(str(root / "stages" / "prepare.py"))["main"](parse(tree))
    return line


def written(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_both_data_sets_are_written_and_told_in_one_line(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = prepared(root, tmp_path, monkeypatch)
    assert line.startswith("100 train, 100 validation, 100 test images of 10 classes, 1x8x8; detection: 6 train, ")
    assert "\n" not in line
    assert Prepared.load(artifacts.DATA).sizes["test"] == 100
    assert VocIndex.load(artifacts.VOC_INDEX).counts()["test"]["pictures"] == 3


def test_the_same_params_give_the_same_bytes_and_another_seed_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, seed in (("a", 0), ("b", 5), ("b", 0)):
        prepared(root, tmp_path / folder, monkeypatch, seed=seed)
        if seed:
            other = written(tmp_path / folder)
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert other != written(tmp_path / "a")


def test_own_images_from_a_zip(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "mine.zip", classes(10))
    line = prepared(root, tmp_path, monkeypatch, dataset={"name": "image_folder", "root": str(archive)})
    assert line.startswith("14 train, 2 validation, 4 test images of 2 classes, 3x12x12; ")
