import io
from pathlib import Path

import numpy as np
import pytest

from epsd.datasets.imagenet import DEVKIT, Imagenet
from epsd.files.layouts import Files, SourceError
from epsd.preparing.write import prepare
from epsd.types import EpsdError
from pictures import picture, tarred, write

SYNSETS = ["n01440764", "n01443537"]
TRUTH = [490, 361, 490, 361]  # ILSVRC2012_ID of each validation image, in the order of their numbers
KIT = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"


def meta() -> bytes:
    """meta.mat as the development kit has it: one struct per synset, also of inner nodes that no image shows."""
    from scipy.io import savemat

    rows = np.zeros(3, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for i, row in enumerate([(361, SYNSETS[0], "tench"), (490, SYNSETS[1], "goldfish"), (1001, "n00001740", "entity")]):
        rows[i] = row
    stream = io.BytesIO()
    savemat(stream, {"synsets": rows.reshape(-1, 1)})
    return stream.getvalue()


def train() -> dict[str, bytes]:
    return {f"train/{s}/{s}_{i}.JPEG": picture(i, (90, 70), "JPEG") for s in SYNSETS for i in range(4)}


def flat() -> dict[str, bytes]:
    return {f"val/ILSVRC2012_val_{i:08d}.JPEG": picture(i, 80, "JPEG") for i in range(1, 5)}


def kit() -> dict[str, bytes]:
    return {KIT: "".join(f"{i}\n" for i in TRUTH).encode(), f"{DEVKIT}/data/meta.mat": meta()}


def test_a_folder_per_synset(tmp_path: Path) -> None:
    val = {f"val/{s}/ILSVRC2012_val_{i:08d}.JPEG": picture(i, 80, "JPEG") for i, s in enumerate(SYNSETS)}
    source = Imagenet(root=str(write(tmp_path / "i", train() | val)), size=72, resize=80)()
    assert source.class_names == SYNSETS
    assert source.splits["train"].labels.tolist() == [0] * 4 + [1] * 4
    assert source.splits["test"].labels.tolist() == [0, 1]
    index = prepare(source, tmp_path / "out", validation=0.25)
    assert index["sizes"] == {"train": 6, "validation": 2, "test": 2}
    assert (index["storage"], index["image_shape"]) == ("files", [3, 72, 72])


@pytest.mark.parametrize("packed", [False, True])
def test_flat_validation_images_are_labelled_by_the_development_kit(tmp_path: Path, packed: bool) -> None:
    root = write(tmp_path / "i", train() | flat() | ({} if packed else kit()))
    if packed:
        tarred(root / f"{DEVKIT}.tar.gz", kit())
    test = Imagenet(root=str(root))().splits["test"]
    assert isinstance(test.images, Files)
    assert [name[-6] for name in test.images.names] == ["1", "2", "3", "4"]
    assert test.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "nothing there. Unpack ILSVRC2012_img_train.tar"),
        (flat(), "has no images in 'train/'. Unpack"),
        (train(), "has no images in 'val/'. Unpack"),
        (train() | flat(), f"val/ is flat, .* place {DEVKIT}.tar.gz"),
        (train() | flat() | {KIT: b"490\n361\n"}, "has no file '.*meta.mat'"),
        (train() | flat() | kit() | {KIT: b"490\n361\n"}, "'val/ILSVRC2012_val_00000003.JPEG' has no line"),
        (train() | flat() | kit() | {KIT: b"1001\n" * 4}, "is of class 'n00001740', which has no folder below train/"),
        (train() | flat() | kit() | {f"{DEVKIT}/data/meta.mat": b"no"}, "'data/meta.mat' cannot be read"),
        (train() | {"val/n07/1.JPEG": b""}, "'val/n07/1.JPEG' is of class 'n07', which has no folder"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(EpsdError, match=message) as error:
        Imagenet(root=str(write(tmp_path / "i", files)))()
    assert "\n" not in str(error.value)


def test_val_that_is_a_link_to_train_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "i", train())
    (root / "val").symlink_to("train")
    with pytest.raises(SourceError, match=f"'val/{SYNSETS[0]}' and 'train/{SYNSETS[0]}' are the same folder"):
        Imagenet(root=str(root))()


def test_an_empty_synset_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "i", train() | flat() | kit())
    (root / "train" / "n09").mkdir()
    with pytest.raises(SourceError, match="n09"):
        Imagenet(root=str(root))()
