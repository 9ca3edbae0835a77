import gc
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from epsd.data.prepared import Prepared
from epsd.datasets import DATASETS
from epsd.files.archives import open_tree
from epsd.files.images import Shortage
from epsd.files.layouts import Labelled, Reading, Source, SourceError, folder_source
from epsd.preparing.splits import carved, limited
from epsd.preparing.tally import Tally
from epsd.preparing.write import prepare, summary, written_arrays
from epsd.project import artifacts
from epsd.project.artifacts import ArtifactError
from epsd.registry import choose
from pictures import classes, picture, tarred, write, zipped


def arrays(count: int = 40, size: int = 6, channels: int = 1, seed: int = 0, **splits: int) -> Source:
    """Random images of 2 classes, alternating; further splits of the given counts."""
    random = np.random.default_rng(seed)
    made = {
        split: Labelled(random.integers(0, 256, (n, channels, size, size), dtype=np.uint8), np.arange(n) % 2)
        for split, n in {"train": count, **splits}.items()
    }
    return Source("random", ["a", "b"], made)


def positions(splits: dict[str, Labelled], source: Source) -> dict[str, list[int]]:
    """Where in the source's train each image came from."""
    where = {image.tobytes(): i for i, image in enumerate(source.splits["train"].images)}
    return {split: [where[image.tobytes()] for image in labelled.images] for split, labelled in splits.items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_missing_splits_are_carved_by_class_without_overlap() -> None:
    source = arrays(100)
    found = positions(carved(source, 0.1, 0.2, seed=3), source)
    assert {split: len(part) for split, part in found.items()} == {"train": 70, "validation": 10, "test": 20}
    assert sorted(chain(*found.values())) == list(range(100))
    for split, part in carved(source, 0.1, 0.2, seed=3).items():
        assert np.bincount(part.labels).tolist() == [len(part) // 2] * 2, split


def test_the_carving_depends_on_the_seed_alone() -> None:
    source = arrays(100)
    assert positions(carved(source, 0.1, 0.2, 3), source) == positions(carved(source, 0.1, 0.2, 3), source)
    assert positions(carved(source, 0.1, 0.2, 3), source) != positions(carved(source, 0.1, 0.2, 4), source)


def test_splits_that_are_there_stay() -> None:
    source = arrays(40, test=10)
    splits = carved(source, 0.1, 0.2, 0)
    assert splits["test"] is source.splits["test"]
    assert [len(splits[split]) for split in ("train", "validation")] == [36, 4]
    brought = arrays(40, validation=10)
    assert carved(brought, 0.1, 0.5, 0)["validation"] is brought.splits["validation"]


def test_no_share_no_validation() -> None:
    assert set(carved(arrays(40), 0.0, 0.2, 0)) == {"train", "test"}


@pytest.mark.parametrize(
    ("count", "validation", "test", "message"),
    [
        (40, 0.1, 0.0, "data.test must be above 0"),
        (40, 0.5, 0.5, r"leave nothing of train \(0.5 \+ 0.5\)"),
        (
            4,
            0.1,
            0.2,
            r"class 'a' has 2 image\(s\) in train: too few to hold out data.test 0.2 and data.validation 0.1",
        ),
    ],
)
def test_shares_that_cannot_be_are_named(count: int, validation: float, test: float, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        carved(arrays(count), validation, test, 0)


def test_limit_is_per_class_and_split() -> None:
    source = arrays(100)
    splits = limited(carved(source, 0.1, 0.2, 0), 3, seed=0)
    assert {split: np.bincount(part.labels).tolist() for split, part in splits.items()} == {
        split: [3, 3] for split in splits
    }
    again = limited(carved(source, 0.1, 0.2, 0), 3, seed=0)
    assert positions(splits, source) == positions(again, source)
    assert positions(splits, source) != positions(limited(carved(source, 0.1, 0.2, 0), 3, seed=1), source)
    kept = positions(splits, source)["train"]
    assert kept == sorted(kept)
    assert [len(part) for part in limited(carved(source, 0.1, 0.2, 0), 1000, 0).values()] == [70, 10, 20]


def test_tally_gives_the_mean_and_std_of_all_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 5, 7), dtype=np.uint8)
    tally = Tally()
    tally.add(images[:20])
    tally.add(images[20:])
    mean, std = tally.mean_std()
    assert np.allclose(mean, (images / 255).mean((0, 2, 3)), atol=1e-7)
    assert np.allclose(std, (images / 255).std((0, 2, 3)), atol=1e-7)
    flat = Tally()
    flat.add(np.full((2, 1, 3, 3), 7, dtype=np.uint8))
    assert flat.mean_std()[1] == [1.0]


def peak(work: Callable[[], object]) -> int:
    """Most bytes that `work` held at once beyond what was there."""
    gc.collect()
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def test_counting_pixels_takes_no_memory_to_speak_of() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2000, 3, 64, 64), dtype=np.uint8)
    tally = Tally()
    assert peak(lambda: tally.add(images)) < 12e6 < images.nbytes
    assert np.allclose(tally.mean_std()[0], images.mean((0, 2, 3)) / 255, atol=1e-7)
    assert tally.histogram is not None and tally.histogram.sum() == images.size


def test_preparing_takes_little_more_memory_than_the_images(tmp_path: Path) -> None:
    source = arrays(3000, size=64, channels=3, test=10)
    train = source.splits["train"].images
    assert isinstance(train, np.ndarray)
    assert peak(lambda: prepare(source, tmp_path, validation=0.1)) < 1.4 * train.nbytes  # the splits, taken from train


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    source = arrays(60, channels=3)
    index = prepare(source, tmp_path, validation=0.2, test=0.2)
    assert index == artifacts.read_json(tmp_path / "data.json")
    assert index["sizes"] == {"train": 36, "validation": 12, "test": 12}
    assert index["per_class"]["test"] == {"a": 6, "b": 6}
    assert index["image_shape"] == [3, 6, 6]
    train = np.load(tmp_path / "train_images.npy", allow_pickle=False)
    assert np.allclose(index["mean"], (train / 255).mean((0, 2, 3)), atol=1e-7)
    for split, part in carved(source, 0.2, 0.2, 0).items():
        assert np.array_equal(np.load(tmp_path / f"{split}_images.npy", allow_pickle=False), part.images)
        assert np.array_equal(np.load(tmp_path / f"{split}_labels.npy", allow_pickle=False), part.labels)
        again = written_arrays(tmp_path, index)
        assert again is not None
        assert np.array_equal(again[split][0], part.images) and np.array_equal(again[split][1], part.labels)
    assert index["duplicates"] == index["left_out"] == []
    assert summary(index) == "36 train, 12 validation, 12 test images of 2 classes, 3x6x6"


def test_images_in_two_splits_and_those_over_the_limit_are_told(tmp_path: Path) -> None:
    source = arrays(40, validation=10, test=10)
    images = source.splits["train"].images
    for split, twins in (("test", images[[7, 3]]), ("validation", images[[3]])):
        held = source.splits[split].images
        assert isinstance(held, np.ndarray)
        held[4 : 4 + len(twins)] = twins
    index = prepare(source, tmp_path)
    found = ["1 of validation also in train, byte for byte (4 as 3)", "2 of test also in train, byte for byte (4 as 7)",
             "1 of test also in validation, byte for byte (5 as 4)"]  # fmt: skip
    assert index["duplicates"] == found
    assert summary(index).endswith("; ".join(["2 classes, 1x6x6", *found]))
    index = prepare(source, tmp_path, limit=2)
    assert index["left_out"] == ["48 by data.limit"]


def test_the_same_input_gives_the_same_bytes_and_old_files_go(tmp_path: Path) -> None:
    prepare(arrays(40), tmp_path / "a")
    prepare(arrays(40, seed=1, validation=30), tmp_path / "b", seed=5)
    prepare(arrays(40), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    prepare(arrays(40), tmp_path / "b", validation=0)
    assert not (tmp_path / "b" / "validation_images.npy").exists()


@pytest.mark.parametrize("change", ["pixel", "label", "name"])
def test_the_digest_follows_every_change(tmp_path: Path, change: str) -> None:
    source = arrays(40, test=10)
    before = prepare(source, tmp_path)["digest"]
    labelled = source.splits["train"]
    assert isinstance(labelled.images, np.ndarray)
    if change == "pixel":
        labelled.images[3, 0, 0, 0] ^= 1
    elif change == "label":
        labelled.labels[3] ^= 1
    else:
        source.class_names[0] = "c"
    assert prepare(source, tmp_path)["digest"] != before


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_files_up_to_64_pixels_become_arrays(tmp_path: Path, kind: str) -> None:
    files = classes(8, size=64)
    made = {"folder": write, "zip": zipped, "tar": tarred}[kind](tmp_path / f"tree.{kind}", files)
    index = prepare(folder_source(open_tree(made), Reading()), tmp_path / "out")
    assert index["storage"] == "memory"
    assert set(files_of(tmp_path / "out")) == {"data.json"} | {
        f"{split}_{what}.npy" for split in index["sizes"] for what in ("images", "labels")
    }


def test_images_are_the_same_from_folder_zip_and_tar(tmp_path: Path) -> None:
    files = classes(6)
    trees = [
        write(tmp_path / "tree", files),
        zipped(tmp_path / "tree.zip", dict(reversed(files.items()))),
        tarred(tmp_path / "tree.tar.gz", dict(reversed(files.items()))),
    ]
    digests = {prepare(folder_source(open_tree(tree), Reading()), tmp_path / "out")["digest"] for tree in trees}
    assert len(digests) == 1


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_larger_files_become_an_index(tmp_path: Path, kind: str) -> None:
    files = classes(6, size=80)
    path = tmp_path / f"tree.{kind}"
    made = write(path, files) if kind == "folder" else (zipped if kind == "zip" else tarred)(path, files)
    index = prepare(folder_source(open_tree(made), Reading()), tmp_path / "out")
    assert index["storage"] == "files"
    assert index["image_shape"] == [3, 80, 80]
    listed = [json.loads((tmp_path / "out" / f"{split}_files.json").read_text())["files"] for split in index["sizes"]]
    assert sorted(chain(*listed)) == sorted(files)
    copied = {name.removeprefix("unpacked/") for name in files_of(tmp_path / "out") if name.startswith("unpacked/")}
    assert copied == (set(files) if kind == "tar.gz" else set())
    assert not list((tmp_path / "out").glob("*_images.npy"))
    batch = next(Prepared.load(tmp_path / "out").batches("train", batch_size=4).epoch(0))
    assert batch.images.shape == (4, 3, 80, 80)


def test_going_from_files_to_arrays_leaves_nothing_behind(tmp_path: Path) -> None:
    big = folder_source(open_tree(tarred(tmp_path / "big.tar", classes(6, size=80))), Reading())
    prepare(big, tmp_path / "out")
    prepare(arrays(40), tmp_path / "out")
    prepare(arrays(40), tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("size", [12, 80])
def test_a_damaged_image_is_named_or_skipped_and_counted(tmp_path: Path, size: int) -> None:
    root = write(
        tmp_path / "tree", classes(8, size=size) | {"cat/bad.png": picture(1, size)[:-40], "dog/bad.png": b"no"}
    )
    with pytest.raises(SourceError, match=r"tree: (cat|dog)/bad.png: .*; (cat|dog)/bad.png: .* dataset\.unreadable"):
        prepare(folder_source(open_tree(root), Reading()), tmp_path / "out", seed=1)
    assert not (tmp_path / "out" / "data.json").exists()
    index = prepare(folder_source(open_tree(root), Reading(unreadable="skip")), tmp_path / "out")
    assert sorted(chain(*index["skipped"].values())) == ["cat/bad.png", "dog/bad.png"]
    assert sum(index["sizes"].values()) == 16
    assert re.search(r"; left out: 2 unreadable \((cat|dog)/bad.png, (cat|dog)/bad.png\)$", summary(index))
    data = Prepared.load(tmp_path / "out")
    for split, count in index["sizes"].items():
        assert sum(len(batch.labels) for batch in data.batches(split, batch_size=5).epoch(0)) == count


def test_all_damaged_images_are_told_at_once_with_the_archive(tmp_path: Path) -> None:
    files = classes(16, size=12) | {f"cat/bad{number:02d}.png": b"no" for number in range(23)}
    root = zipped(tmp_path / "photos.zip", files)
    with pytest.raises(SourceError) as told:
        prepare(folder_source(open_tree(root), Reading()), tmp_path / "out")
    line = str(told.value)
    assert line.startswith(f"{root}: cat/bad") and line.count(".zip") == 1 and line.count("not an image") == 10
    assert line.endswith("... (23 in all). dataset.unreadable: 'skip' leaves such images out.") and "\n" not in line


@pytest.mark.parametrize("size", [12, 80])
def test_a_link_to_nothing_and_a_damaged_entry_are_skipped_too(tmp_path: Path, size: int) -> None:
    files = classes(8, size=size)
    root = write(tmp_path / "tree", files)
    (root / "cat" / "gone.png").symlink_to("nowhere.png")
    archive = zipped(tmp_path / "tree.zip", files | {"cat/gone.png": b"x" * 500})
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"x" * 500, b"y" * 500))
    for tree in map(open_tree, (root, archive)):
        with pytest.raises(SourceError, match=r"'cat/gone.png' cannot be read"):
            prepare(folder_source(tree, Reading()), tmp_path / "out")
        index = prepare(folder_source(tree, Reading(unreadable="skip")), tmp_path / "out")
        assert list(chain(*index["skipped"].values())) == ["cat/gone.png"]
        assert sum(index["sizes"].values()) == 16


@pytest.mark.parametrize("short", [(Image.Image, "load", MemoryError()), (Path, "read_bytes", OSError(24, "too many"))])
def test_a_shortage_skips_no_image(tmp_path: Path, short: tuple[type, str, Exception]) -> None:
    kind, name, error = short
    source = folder_source(open_tree(write(tmp_path / "tree", classes(8))), Reading(size=12, unreadable="skip"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Shortage, match=r"/\d\.png"):
        patch.setattr(kind, name, Mock(side_effect=error))
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out" / "data.json").exists()


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("size", [12, 80])
def test_a_file_name_that_is_no_text_is_prepared(tmp_path: Path, kind: str, size: int) -> None:
    files = classes(8, size=size) | {os.fsdecode(b"cat/caf\xe9.png"): picture(1, size)}
    made = write(tmp_path / "tree", files) if kind == "folder" else tarred(tmp_path / "tree.tar", files)
    index = prepare(folder_source(open_tree(made), Reading()), tmp_path / "out")
    assert sum(index["sizes"].values()) == 17
    if index["storage"] == "files":
        listed = [
            json.loads((tmp_path / "out" / f"{split}_files.json").read_text())["files"] for split in index["sizes"]
        ]
        assert sorted(chain(*listed)) == sorted(files)


def test_skipping_a_whole_class_is_an_error(tmp_path: Path) -> None:
    bad = {f"cat/{i}.png": b"no" for i in range(8)}
    root = write(tmp_path / "tree", classes(8) | bad)
    with pytest.raises(SourceError, match=r"without its unreadable images: no image of .*: cat"):
        prepare(folder_source(open_tree(root), Reading(unreadable="skip")), tmp_path / "out")


@pytest.mark.parametrize("usual", [12, 80])
def test_images_of_two_sizes_are_named_and_a_size_brings_them_together(tmp_path: Path, usual: int) -> None:
    root = write(tmp_path / "tree", classes(8, size=usual) | {"cat/wide.png": picture(1, (30, 20))})
    with pytest.raises(SourceError, match=rf"wide.png is 30x20 pixels, others are {usual}x{usual}. Set dataset.size"):
        prepare(folder_source(open_tree(root), Reading()), tmp_path / "out")
    index = prepare(folder_source(open_tree(root), Reading(size=16)), tmp_path / "out")
    assert index["image_shape"] == [3, 16, 16]


def test_grayscale_gives_one_channel(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", classes(8))
    index = prepare(folder_source(open_tree(root), Reading(grayscale=True)), tmp_path / "out")
    assert index["image_shape"] == [1, 12, 12]
    assert len(index["mean"]) == 1


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactError, match="file: cannot be written"):
        prepare(arrays(40), tmp_path / "file")


def test_many_images_come_with_a_bar_and_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder_source(open_tree(write(tmp_path / "tree", classes(20))), Reading())
    quiet = prepare(source, tmp_path / "out")
    monkeypatch.setattr("epsd.preparing.decoding._WORTH_A_BAR", 1)
    monkeypatch.setattr("epsd.preparing.decoding._AHEAD", 3)
    monkeypatch.delenv("EPSD_QUIET", raising=False)
    assert prepare(source, tmp_path / "out") == quiet


def test_some_of_the_classes(tmp_path: Path) -> None:
    """In the order of the source, whatever is asked first; the images are those of the whole set."""
    whole = choose(DATASETS, {"name": "digits"})()
    index = prepare(whole, tmp_path, validation=0.2, test=0.2, classes=["7", "3", "5"])
    assert index["class_names"] == ["3", "5", "7"] and index["settings"]["classes"] == ["7", "3", "5"]
    data = Prepared.load(tmp_path)
    mine = {
        (image.tobytes(), data.class_names[label])
        for split in ("train", "validation", "test")
        for image, label in zip(data.images(split), data.labels(split), strict=True)
    }  # type: ignore[arg-type]
    train = whole.splits["train"]
    theirs = {
        (image.tobytes(), whole.class_names[label]) for image, label in zip(train.images, train.labels, strict=True)
    }
    assert mine == {pair for pair in theirs if pair[1] in "357"}
    with pytest.raises(SourceError, match=r"data\.classes: unknown 'cat'\. Valid: 0, 1, "):
        prepare(whole, tmp_path, classes=["3", "cat"])
