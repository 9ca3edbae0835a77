"""Train and validation dealt anew: the same images, the same counts, the test split untouched and unread."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.test_prepared import raw
from epsd.data.prepared import Prepared
from epsd.data.streaming import Augmentation
from epsd.files.archives import open_tree
from epsd.files.layouts import Reading, folder_source
from epsd.preparing.write import prepare
from epsd.tuning.resplit import resplit
from epsd.types import BatchNeeds
from pictures import classes, write
from preparing.test_write import arrays


@pytest.fixture(params=["memory", "files"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Prepared:
    out = tmp_path / "out"
    if request.param == "memory":
        prepare(arrays(60, channels=3), out, validation=0.2, test=0.2)
    else:
        source = folder_source(open_tree(write(tmp_path / "tree", classes(15, size=72))), Reading())
        prepare(source, out, validation=0.2, test=0.2)
    for path in out.glob("test*"):
        path.unlink()  # never read
    return Prepared.load(out)


def pairs(data: Prepared, split: str) -> list[tuple[bytes, int]]:
    """(pixels, label) of every image, as batches bring them."""
    return [
        (image.numpy().tobytes(), int(label))
        for batch in data.batches(split, batch_size=5).epoch(0)  # type: ignore[arg-type]
        for image, label in zip(raw(data, batch.images), batch.labels, strict=True)
    ]


def test_the_same_labelled_images_in_other_parts(data: Prepared) -> None:
    other = resplit(data, 3)
    before, after = ({split: pairs(of, split) for split in ("train", "validation")} for of in (data, other))
    assert sorted(before["train"] + before["validation"]) == sorted(after["train"] + after["validation"])
    assert sorted(before["validation"]) != sorted(after["validation"])
    assert not set(after["train"]) & set(after["validation"])
    assert other.sizes == data.sizes and other.digest != data.digest
    for split in ("train", "validation"):
        assert np.array_equal(np.bincount(other.labels(split)), np.bincount(data.labels(split)))
        assert len(after[split]) == data.sizes[split]


def test_the_seed_alone_decides(data: Prepared) -> None:
    assert pairs(resplit(data, 3), "validation") == pairs(resplit(data, 3), "validation")
    assert pairs(resplit(data, 3), "validation") != pairs(resplit(data, 4), "validation")


def test_training_batches_know_their_labels_and_partners(data: Prepared) -> None:
    other = resplit(data, 3)
    labels = torch.from_numpy(other.labels("train"))
    batches = other.batches("train", batch_size=4, shuffle=True, augmentation=Augmentation(1, True))
    for batch in batches.epoch(1, BatchNeeds("same_class")):
        assert torch.equal(labels[batch.indices], batch.labels)
        assert batch.partner is not None and batch.partner.shape == batch.images.shape


def test_a_validation_split_that_came_with_the_data_is_left(tmp_path: Path) -> None:
    tree = open_tree(write(tmp_path / "tree", classes(6, splits=("train", "val"))))
    prepare(folder_source(tree, Reading()), tmp_path / "out", test=0.2)
    data = Prepared.load(tmp_path / "out")
    assert resplit(data, 3) is data
