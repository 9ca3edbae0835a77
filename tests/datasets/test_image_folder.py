from pathlib import Path

import numpy as np
import pytest

from conftest import shared_file
from epsd.data.prepared import Prepared
from epsd.data.streaming import Augmentation
from epsd.datasets import DATASETS
from epsd.files.archives import ArchiveError
from epsd.files.layouts import SourceError
from epsd.preparing.write import prepare
from epsd.registry import ParamsError, choose
from epsd.types import BatchNeeds
from pictures import classes, write, zipped


def test_a_folder_and_a_zip_of_it_prepare_alike(tmp_path: Path) -> None:
    files = {f"mine/{name}": content for name, content in classes(8, splits=("train", "test")).items()}
    digests = []
    for root in (write(tmp_path / "tree", files), zipped(tmp_path / "tree.zip", files)):
        variant = choose(
            DATASETS, {"name": "image_folder", "root": str(root), "size": 16, "grayscale": True}, "dataset"
        )
        index = prepare(variant(), tmp_path / "out")
        digests.append(index["digest"])
        assert index["image_shape"] == [1, 16, 16]
        assert index["sizes"] == {"train": 14, "validation": 2, "test": 16}
    assert digests[0] == digests[1]


def test_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "tree", classes(2))
    assert choose(DATASETS, {"name": "image_folder", "root": "~/tree"})().class_names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "dataset.root"),
        ({"root": 3}, "dataset.root"),
        ({"root": "x", "size": 2}, "dataset.size"),
        ({"root": "x", "unreadable": "ignore"}, "dataset.unreadable"),
        ({"root": "x", "gray": True}, "Did you mean 'grayscale'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        choose(DATASETS, {"name": "image_folder", **settings}, "dataset")


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="nowhere: no such folder or archive"):
        choose(DATASETS, {"name": "image_folder", "root": str(tmp_path / "nowhere")})()


@pytest.mark.shared
def test_real_cifar10_photographs(tmp_path: Path) -> None:
    source = choose(DATASETS, {"name": "image_folder", "root": str(shared_file("datasets", "cifar10.zip"))})()
    assert source.class_names[0] == "airplane" and len(source.class_names) == 10
    assert {split: len(part) for split, part in source.splits.items()} == {"train": 50_000, "test": 10_000}
    index = prepare(source, tmp_path, limit=40)
    assert index["sizes"] == {"train": 400, "validation": 400, "test": 400}
    assert index["image_shape"] == [3, 32, 32]
    assert np.allclose(index["mean"], [0.4913, 0.4821, 0.4465], atol=0.03)  # of all 50,000
    data = Prepared.load(tmp_path)
    batches = data.batches("train", batch_size=64, augmentation=Augmentation(4, True), shuffle=True)
    batch = next(batches.epoch(0, BatchNeeds("same_class")))
    assert batch.partner is not None
    assert batch.images.shape == batch.partner.shape == (64, 3, 32, 32)


@pytest.mark.shared
def test_an_archive_of_another_layout_is_named() -> None:
    root = shared_file("datasets", "voc2007-sample.zip")
    with pytest.raises(SourceError, match=r"voc2007-sample.zip: "):
        choose(DATASETS, {"name": "image_folder", "root": str(root)})()
