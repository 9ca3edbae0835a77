from pathlib import Path

import pytest

from conftest import shared_file
from epsd.datasets.downloads import DownloadError
from epsd.datasets.tiny_imagenet import TinyImagenet
from epsd.files.layouts import Files, SourceError
from epsd.preparing.write import prepare
from epsd.types import EpsdError
from pictures import changed, picture, write, zipped

TOP = "tiny-imagenet-200/"
WNIDS = ["n02", "n01"]


def tree() -> dict[str, bytes]:
    """The original layout: two classes, one of four training images grey."""
    files = {"wnids.txt": "\n".join(WNIDS).encode(), "words.txt": b"n01\tfish\nn02\tbird\n"}
    for wnid in WNIDS:
        for i in range(4):
            mode = "L" if i == 3 else "RGB"
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = picture(i, 64, "JPEG", mode)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"x\t0\t0\t1\t1\n"
    rows = [(f"val_{i}.JPEG", WNIDS[i % 2]) for i in range(6)]
    files |= {f"val/images/{name}": picture(i, 64, "JPEG") for i, (name, _) in enumerate(rows)}
    files["val/val_annotations.txt"] = "".join(f"{name}\t{wnid}\t0\t0\t62\t62\n" for name, wnid in rows).encode()
    files["test/images/test_0.JPEG"] = picture(9, 64, "JPEG")
    return {TOP + name: content for name, content in files.items()}


@pytest.mark.parametrize("kind", ["folder", "inner", "zip"])
def test_the_original_layout(tmp_path: Path, kind: str) -> None:
    root = zipped(tmp_path / "t.zip", tree()) if kind == "zip" else write(tmp_path / "t", tree())
    source = TinyImagenet(root=str(root / TOP if kind == "inner" else root))()
    assert source.class_names == ["n01", "n02"]
    train, test = source.splits["train"], source.splits["test"]
    assert isinstance(train.images, Files) and isinstance(test.images, Files)
    assert [name.split("/")[-1].split("_")[0] for name in train.images.names] == ["n01"] * 4 + ["n02"] * 4
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert test.labels.tolist() == [1, 0, 1, 0, 1, 0]
    index = prepare(source, tmp_path / "out", validation=0.25)
    assert index["sizes"] == {"train": 6, "validation": 2, "test": 6}
    assert index["storage"] == "memory"
    assert index["image_shape"] == [3, 64, 64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wnids.txt": None}, "has no file 'wnids.txt'"),
        ({"val/val_annotations.txt": None}, "no file '.*val_annotations.txt'"),
        ({"val/val_annotations.txt": b"val_0.JPEG\n"}, "a line without a file and a class"),
        ({"val/val_annotations.txt": b"val_99.JPEG\tn01\n"}, "lists '.*val_99.JPEG', which is missing"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn07\n"}, "is of class 'n07', which is not in wnids.txt"),
        ({"wnids.txt": b"n01 n02 n03"}, "no image of .*: n03"),
        ({"wnids.txt": b"n01"}, "is of class 'n02', which is not in wnids.txt"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    files = changed(tree(), change, TOP)
    with pytest.raises(EpsdError, match=message) as error:
        TinyImagenet(root=str(write(tmp_path / "t", files)))()
    assert "\n" not in str(error.value)


def test_nothing_is_downloaded_without_consent(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"Place tiny-imagenet-200.zip .*dataset.download: true \(ImageNet's terms"):
        TinyImagenet(root=str(tmp_path / "none"))()


@pytest.mark.shared
def test_the_real_sample(tmp_path: Path) -> None:
    source = TinyImagenet(root=str(shared_file("datasets", "tiny-imagenet-sample.zip")))()
    assert {split: len(part) for split, part in source.splits.items()} == {"train": 2000, "test": 1000}
    index = prepare(source, tmp_path, limit=5)
    assert index["sizes"] == {"train": 100, "validation": 100, "test": 100}
    assert index["image_shape"] == [3, 64, 64]


def test_a_wrong_archive_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"x.zip: has no file 'wnids.txt'"):
        TinyImagenet(root=str(zipped(tmp_path / "x.zip", {"a.txt": b""})))()
