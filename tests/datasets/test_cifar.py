import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from epsd.datasets import cifar
from epsd.datasets.cifar import EDITIONS, Cifar
from epsd.datasets.downloads import DownloadError
from epsd.files.layouts import Source, SourceError
from epsd.preparing.write import prepare
from epsd.types import EpsdError
from pictures import tarred, write

NAMES = {10: [f"class {i}" for i in range(10)], 100: [f"fine {i}" for i in range(100)]}
TOPS = {10: "cifar-10-batches-py/", 100: "cifar-100-python/"}


def content(classes: int, part: int, per_class: int = 1) -> tuple[np.ndarray, list[int]]:
    labels = list(range(classes)) * per_class
    return np.random.default_rng(part).integers(0, 256, (len(labels), 3072), dtype=np.uint8), labels


def python_files(classes: int, protocol: int = 2, **more: Any) -> dict[str, bytes]:
    """As the authors' pickles: dictionaries with bytes as keys."""
    edition = EDITIONS[classes]
    files = {}
    for part, name in enumerate([*edition.train, edition.test]):
        data, labels = content(classes, part)
        batch = {b"data": data, edition.labels_key.encode(): labels, b"filenames": [b"a.png"] * len(labels), **more}
        files[TOPS[classes] + name] = pickle.dumps(batch, protocol)
    meta = {edition.names_key.encode(): NAMES[classes], b"num_vis": 3072}
    return files | {TOPS[classes] + edition.meta: pickle.dumps(meta, protocol)}


def binary_files(classes: int) -> dict[str, bytes]:
    edition = EDITIONS[classes]
    files = {}
    for part, name in enumerate([*edition.train, edition.test]):
        data, labels = content(classes, part)
        columns = [np.array(labels, dtype=np.uint8)[:, None], data]
        if classes == 100:
            columns.insert(0, np.full((len(labels), 1), 7, dtype=np.uint8))  # the coarse label
        files[f"bin/{name}.bin"] = np.hstack(columns).tobytes()
    names = [name.replace(" ", "_") for name in NAMES[classes]]
    return files | {f"bin/{edition.binary_meta}": "\n".join([*names, ""]).encode()}


def check(source: Source, classes: int) -> None:
    train, test = source.splits["train"], source.splits["test"]
    parts = 5 if classes == 10 else 1
    assert isinstance(train.images, np.ndarray) and isinstance(test.images, np.ndarray)
    assert train.images.shape == (parts * classes, 3, 32, 32)
    assert np.array_equal(train.images[:classes].reshape(classes, -1), content(classes, 0)[0])
    assert np.array_equal(test.images.reshape(classes, -1), content(classes, parts)[0])
    assert train.labels.tolist() == list(range(classes)) * parts
    assert test.labels.tolist() == list(range(classes))
    assert [name.replace("_", " ") for name in source.class_names] == NAMES[classes]


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("files", [python_files, binary_files])
@pytest.mark.parametrize("strip", [False, True])
def test_both_editions_in_both_forms_from_folders(tmp_path: Path, classes: Any, files: Any, strip: bool) -> None:
    made = {name.split("/")[1] if strip else name: data for name, data in files(classes).items()}
    check(Cifar(classes=classes, root=str(write(tmp_path / "root", made)))(), classes)


@pytest.mark.parametrize("classes", [10, 100])
def test_from_an_archive_of_any_name(tmp_path: Path, classes: Any) -> None:
    check(Cifar(classes=classes, root=str(tarred(tmp_path / "mine.tar.gz", python_files(classes))))(), classes)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_pickles_of_any_protocol(tmp_path: Path, protocol: int) -> None:
    check(Cifar(root=str(write(tmp_path / "root", python_files(10, protocol))))(), 10)


def test_the_published_archive_in_the_folder_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tarred(tmp_path / "cifar-10-python.tar.gz", python_files(10))
    with pytest.raises(
        DownloadError, match=r"cifar-10-python.tar.gz: its checksum is md5:\w+, published is md5:c58f30"
    ):
        Cifar(root=str(tmp_path))()
    checksum = f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"
    edition = EDITIONS[10]._replace(published=EDITIONS[10].published._replace(checksum=checksum))
    monkeypatch.setitem(EDITIONS, 10, edition)
    check(Cifar(root=str(tmp_path))(), 10)


def test_urls_and_checksums_are_torchvisions() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100

    for theirs, classes in ((CIFAR10, 10), (CIFAR100, 100)):
        ours = EDITIONS[classes].published
        assert (ours.url, ours.checksum, ours.name) == (theirs.url, f"md5:{theirs.tgz_md5}", theirs.filename)


def test_nothing_there_and_no_download_says_what_to_place(tmp_path: Path) -> None:
    with pytest.raises(
        DownloadError, match=r"Place cifar-100-python.tar.gz \(https://.*\) or its unpacked folder in it"
    ):
        Cifar(classes=100, root=str(tmp_path / "none"), download=False)()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_wants_to_run_something_is_refused_unrun(tmp_path: Path, protocol: int) -> None:
    files = python_files(10, protocol, extra=Evil(tmp_path / "owned"))
    with pytest.raises(SourceError, match=r"'data_batch_1' refused: it wants to run"):
        Cifar(root=str(write(tmp_path / "root", files)))()
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "call", [b"cos\nsystem\n(S'touch owned'\ntR.", b"cnumpy\nload\n(S'x'\ntR.", b"c_codecs\nencode\n(S'x'\nS'zip'\ntR."]
)
def test_other_callables_are_refused(call: bytes) -> None:
    with pytest.raises(cifar.Forbidden, match="it wants"):
        cifar.ArraysOnly(io.BytesIO(call), encoding="latin1").load()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data_batch_3", lambda data: data[:-500], "'data_batch_3' is truncated, or no CIFAR file"),
        ("data_batch_3", lambda data: b"", "'data_batch_3' is truncated"),
        ("test_batch", lambda data: pickle.dumps([1], 2), "'test_batch' is no CIFAR file .holds a list"),
        ("test_batch", lambda data: pickle.dumps({b"labels": [0]}, 2), "'test_batch' holds no 'data' of 3072 bytes"),
        (
            "test_batch",
            lambda data: pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}, 2),
            "'test_batch' holds no list of labels",
        ),
        ("batches.meta", lambda data: pickle.dumps({b"label_names": ["a"]}, 2), "names not 10 classes"),
        ("data_batch_5", None, "no file '.*data_batch_5'"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, change: Any, message: str) -> None:
    files = python_files(10)
    data = files.pop(TOPS[10] + name)
    if change:
        files[TOPS[10] + name] = change(data)
    with pytest.raises(EpsdError, match=message) as error:
        Cifar(root=str(write(tmp_path / "root", files)))()
    assert "\n" not in str(error.value)


def test_a_truncated_binary_file_is_named(tmp_path: Path) -> None:
    files = binary_files(10)
    files["bin/test_batch.bin"] = files["bin/test_batch.bin"][:-1]
    with pytest.raises(SourceError, match=r"'test_batch.bin' is truncated"):
        Cifar(root=str(write(tmp_path / "root", files)))()


def test_the_other_edition_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no file 'meta'"):
        Cifar(classes=100, root=str(write(tmp_path / "root", python_files(10))))()


def test_it_prepares(tmp_path: Path) -> None:
    index = prepare(Cifar(root=str(write(tmp_path / "root", python_files(10))))(), tmp_path / "out")
    assert index["sizes"] == {"train": 40, "validation": 10, "test": 10}
    assert index["image_shape"] == [3, 32, 32]
