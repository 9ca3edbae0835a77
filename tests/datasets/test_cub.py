from pathlib import Path

import pytest

from conftest import shared_file
from epsd.compute.devices import Machine
from epsd.data.prepared import Prepared
from epsd.data.streaming import Augmentation
from epsd.datasets.cub import Cub
from epsd.datasets.downloads import DownloadError
from epsd.files.layouts import Files
from epsd.preparing.write import prepare
from epsd.types import EpsdError
from pictures import changed, picture, tarred, write

TOP = "CUB_200_2011/"
CLASSES = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]


def tree(top: str = TOP) -> dict[str, bytes]:
    """The original layout: 2 classes of 6 photographs, the first 4 of each for training; numbered from 1."""
    names = [f"{folder}/{folder[4:]}_{i}.jpg" for folder in CLASSES for i in range(6)]
    files = {f"images/{name}": picture(i, (100, 80 + i), "JPEG") for i, name in enumerate(names)}
    files["images.txt"] = "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)).encode()
    files["image_class_labels.txt"] = "".join(f"{i + 1} {i // 6 + 1}\n" for i in range(12)).encode()
    files["train_test_split.txt"] = "".join(f"{i + 1} {int(i % 6 < 4)}\n" for i in range(12)).encode()
    files["classes.txt"] = "".join(f"{i} {name}\n" for i, name in enumerate(CLASSES, 1)).encode()
    return {top + name: content for name, content in files.items()} | {"attributes.txt": b"1 x\n"}


@pytest.mark.parametrize("kind", ["folder", "inner", "tgz"])
def test_the_original_layout(tmp_path: Path, kind: str) -> None:
    root = tarred(tmp_path / "c.tgz", tree()) if kind == "tgz" else write(tmp_path / "c", tree())
    source = Cub(root=str(root / TOP if kind == "inner" else root), size=72, resize=80)()
    assert source.class_names == CLASSES
    train, test = source.splits["train"], source.splits["test"]
    assert isinstance(train.images, Files) and isinstance(test.images, Files)
    assert train.labels.tolist() == [0] * 4 + [1] * 4
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert test.images.names[0].endswith("images/001.Black_footed_Albatross/Black_footed_Albatross_4.jpg")
    index = prepare(source, tmp_path / "out", validation=0.25)
    assert index["sizes"] == {"train": 6, "validation": 2, "test": 4}
    assert index["image_shape"] == [3, 72, 72]
    data = Prepared.load(tmp_path / "out", Machine(workers=1))
    batches = data.batches("train", batch_size=3, augmentation=Augmentation())
    assert [batch.images.shape for batch in batches.epoch(0)] == [(3, 3, 72, 72)] * 2


def test_another_top_folder_is_a_setting(tmp_path: Path) -> None:
    root = write(tmp_path / "c", tree("CUB_200_2010/"))
    with pytest.raises(EpsdError, match=r"has no file 'CUB_200_2011/images.txt'"):
        Cub(root=str(root))()
    assert Cub(root=str(root), top="CUB_200_2010")().class_names == CLASSES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_test_split.txt": None}, "no file 'CUB_200_2011/train_test_split.txt'"),
        ({"train_test_split.txt": b"1 1\n"}, "'train_test_split.txt' has no line for image 2"),
        ({"classes.txt": b"1\n"}, "classes.txt' has a line without two columns"),
        ({"classes.txt": b"1 a\n3 b\n"}, "is of class '2', which is not in classes.txt"),
        ({"classes.txt": b"1 a\n2 b\n3 c\n"}, "no image of .*: c"),
        ({"classes.txt": b"1 a\n2 A\n"}, "class names clash: A, a"),
        ({f"images/{CLASSES[0]}/Black_footed_Albatross_2.jpg": None}, "images.txt lists '.*_2.jpg', which is missing"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, change: dict[str, bytes | None], message: str) -> None:
    files = changed(tree(), change, TOP)
    with pytest.raises(EpsdError, match=message) as error:
        Cub(root=str(write(tmp_path / "c", files)))()
    assert "\n" not in str(error.value)


def test_nothing_is_downloaded_without_consent(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"Place CUB_200_2011.tgz .*\(non-commercial research"):
        Cub(root=str(tmp_path / "none"))()


@pytest.mark.shared
def test_the_real_sample_of_the_2010_edition(tmp_path: Path) -> None:
    source = Cub(root=str(shared_file("datasets", "cub200-2010-sample.zip")), top="CUB_200_2010")()
    assert {split: len(part) for split, part in source.splits.items()} == {"train": 150, "test": 144}
    index = prepare(source, tmp_path, limit=3)
    assert index["sizes"] == {"train": 30, "validation": 20, "test": 30}
    assert (index["storage"], index["image_shape"]) == ("files", [3, 224, 224])
    batch = next(Prepared.load(tmp_path).batches("train", batch_size=4, augmentation=Augmentation(0, True)).epoch(0))
    assert batch.images.shape == (4, 3, 224, 224)
    assert abs(float(batch.images.mean())) < 1.5
