import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from epsd.files.archives import open_tree
from epsd.files.layouts import Files, Labelled, Reading, Source, SourceError, below, folder_source
from pictures import classes, picture, tarred, write, zipped


def read(root: Path) -> Source:
    return folder_source(open_tree(root), Reading())


def names(source: Source) -> dict[str, list[str]]:
    found = {}
    for split, labelled in source.splits.items():
        assert isinstance(labelled.images, Files)
        found[split] = labelled.images.names
    return found


@pytest.mark.parametrize("top", ["", "photos/", "cifar10/"])
@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_split_class_image(tmp_path: Path, top: str, kind: str) -> None:
    files = {f"{top}{name}": content for name, content in classes(2, splits=("train", "test")).items()}
    files[f"{top}train/readme.txt"] = b"ignored"
    if kind == "folder":
        root = write(tmp_path / "tree", files)
    else:
        root = (zipped if kind == "zip" else tarred)(tmp_path / f"tree.{kind}", files)
    source = read(root)
    assert source.class_names == ["cat", "dog"]
    assert list(source.splits) == ["test", "train"]
    assert names(source)["train"] == [f"{top}train/{name}/{i}.png" for name in ("cat", "dog") for i in (0, 1)]
    assert source.splits["test"].labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("folder", ["val", "valid", "Validation"])
def test_validation_goes_by_several_names(tmp_path: Path, folder: str) -> None:
    source = read(write(tmp_path / "tree", classes(1, splits=("Train", folder))))
    assert set(source.splits) == {"train", "validation"}


@pytest.mark.parametrize("top", ["", "photos/"])
def test_class_image(tmp_path: Path, top: str) -> None:
    source = read(write(tmp_path / "tree", {f"{top}{name}": content for name, content in classes(2).items()}))
    assert list(source.splits) == ["train"]
    assert source.splits["train"].labels.tolist() == [0, 0, 1, 1]


def test_images_in_folders_of_a_class_count_to_it(tmp_path: Path) -> None:
    source = read(write(tmp_path / "tree", classes(1) | {"cat/summer/june/1.png": picture(0)}))
    assert source.class_names == ["cat", "dog"]
    assert source.splits["train"].labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": b""}, "holds no images"),
        ({"cat/1.png": b""}, r"has 1 class\(es\) \(cat\)"),
        ({"1.png": b"", "cat/2.png": b"", "dog/1.png": b""}, "'1.png' lies in no class folder"),
        ({"train/1.png": b"", "train/cat/2.png": b"", "train/dog/1.png": b""}, "'train/1.png' lies in no class folder"),
        ({"cat/1.png": b"", "Cat/2.png": b"", "dog/1.png": b""}, "class names clash: Cat, cat"),
        (
            {"train/cat/1.png": b"", "train/dog/1.png": b"", "test/Cat/1.png": b"", "test/dog/1.png": b""},
            "clash: Cat, cat",
        ),
        (
            {"cat/1.png": b"", "dog/1.png": b"", "bird/readme.txt": b""},
            r"split 'train': no image of 1 class\(es\): bird",
        ),
        ({"train/cat/1.png": b"", "train/dog/1.png": b"", "test/cat/1.png": b""}, r"split 'test': no image .*: dog"),
        ({"train/cat/1.png": b"", "test/dog/1.png": b"", "test/cat/1.png": b""}, r"split 'train': no image .*: dog"),
        ({"test/cat/1.png": b"", "test/dog/1.png": b""}, "has no train split"),
        (
            {"train/cat/1.png": b"", "train/dog/1.png": b"", "extra/cat/1.png": b""},
            "'extra' lies beside the split folder",
        ),
        (
            {f"{c}/1.png": b"" for c in ("bus", "car", "train")},
            "'bus' lies beside the split folder 'train'. If 'train' is a class, put all class folders into one named",
        ),
        (
            {f"{s}/{c}/1.png": b"" for s in ("train", "val", "valid") for c in ("cat", "dog")},
            "two folders for one split",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_unfit_layouts_are_named(tmp_path: Path, kind: str, files: dict[str, bytes], message: str) -> None:
    root = write(tmp_path / "tree", files) if kind == "folder" else zipped(tmp_path / "tree.zip", files)
    with pytest.raises(SourceError, match=message) as error:
        read(root)
    assert "\n" not in str(error.value)
    assert str(root) in str(error.value)


def test_pictures_of_no_class_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=r"'00\.png' lies in no class folder; .*in all\)\. Layouts: .*dataset\.labels"
    ) as told:
        read(write(tmp_path / "tree", classes(2) | {f"{number:02d}.png": b"" for number in range(14)}))
    assert str(told.value).count("lies in no class folder") == 10 and "(14 in all)" in str(told.value)


def test_a_folder_without_classes_is_left_out_with_a_word(tmp_path: Path) -> None:
    files = classes(2, splits=("train", "val")) | {f"test/{number}.png": b"" for number in range(3)}
    source = read(write(tmp_path / "tree", files | {"test/readme.md": b""}))
    assert set(source.splits) == {"train", "validation"} and source.class_names == ["cat", "dog"]
    assert source.left_out == ["3 images of test/, which has no class folders", "1 .md (endings not read)"]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = read(write(tmp_path / "tree", {f"train/{c}/1.png": b"" for c in ("bus", "car", "train")}))
    assert source.class_names == ["bus", "car", "train"] and list(source.splits) == ["train"]


@pytest.mark.parametrize(
    ("link", "target", "told"),
    [
        ("test", "train", "'test/cat' and 'train/cat'|'train/cat' and 'test/cat'"),
        ("val", "train", "'val/cat' and 'train/cat'|'train/cat' and 'val/cat'"),
        ("test/cat", "../train/cat", "'test/cat' and 'train/cat'|'train/cat' and 'test/cat'"),
        ("train/cow", "cat", "'train/cow' and 'train/cat'"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_that_a_link_shows_twice_are_refused(
    tmp_path: Path, kind: str, link: str, target: str, told: str
) -> None:
    files = classes(2, splits=("train",)) | ({"test/dog/1.png": b""} if "test/" in link else {})
    if kind == "folder":
        root = write(tmp_path / "tree", files)
        (root / link).symlink_to(target)
    else:
        root = tarred(tmp_path / "tree.tar", files)
        with tarfile.open(root, "a") as archive:
            member = tarfile.TarInfo(link)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    with pytest.raises(SourceError, match=f"({told}) are the same folder") as error:
        read(root)
    assert "\n" not in str(error.value)


def test_validation_and_test_may_be_one_folder(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", classes(2, splits=("train", "val")))
    (root / "test").symlink_to("val")
    source = read(root)
    assert {split: len(part) for split, part in source.splits.items()} == {"train": 4, "validation": 4, "test": 4}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_names_that_are_no_text_are_refused_for_classes_only(tmp_path: Path, kind: str) -> None:
    odd = os.fsdecode(b"caf\xe9")
    pack = (lambda path, files: write(path, files)) if kind == "folder" else tarred
    source = read(pack(tmp_path / f"a.{kind}", {f"{c}/{odd}.png": b"" for c in ("cat", "dog")}))
    assert names(source)["train"] == [f"cat/{odd}.png", f"dog/{odd}.png"]
    with pytest.raises(SourceError, match=r"the class name 'caf\\xe9' is not UTF-8 text: rename") as error:
        read(pack(tmp_path / f"b.{kind}", {f"{c}/1.png": b"" for c in ("cat", odd)}))
    str(error.value).encode()


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", classes(1))
    (root / "bird").mkdir()
    with pytest.raises(SourceError, match="bird"):
        read(root)


def test_labels_outside_the_classes_are_refused() -> None:
    images = np.zeros((3, 1, 4, 4), dtype=np.uint8)
    with pytest.raises(SourceError, match="labels reach from 0 to 2, classes are 2"):
        Source("digits", ["a", "b"], {"train": Labelled(images, np.array([0, 1, 2]))})


def test_take_keeps_images_and_labels_together(tmp_path: Path) -> None:
    labelled = Labelled(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), np.array([0, 1, 0, 1, 0])).take(
        np.array([3, 0])
    )
    assert isinstance(labelled.images, np.ndarray)
    assert labelled.images.ravel().tolist() == [3, 0]
    assert labelled.labels.tolist() == [1, 0]
    files = Labelled(Files(open_tree(tmp_path), ["a", "b"]), np.array([0, 1])).take(np.array([1]))
    assert isinstance(files.images, Files)
    assert files.images.names == ["b"]


def test_below_finds_the_folder_of_a_marker(tmp_path: Path) -> None:
    tree = open_tree(write(tmp_path / "tree", {"a/b/m.txt": b"", "c/m.txt": b"", "n.txt": b""}))
    assert below(tree, "m.txt") == "c/"
    assert below(tree, "b/m.txt") == "a/"
    assert below(tree, "n.txt") == ""
    assert below(tree, "m.txt", top="c") == "c/"
    with pytest.raises(SourceError, match=r"has no file 'd/m.txt'"):
        below(tree, "m.txt", top="d")
