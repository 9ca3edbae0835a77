"""What is no regular file, or too large, is refused by name wherever files are read: nothing waits or fills up."""

import os
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from devkits import devkit
from epsd.datasets.downloads import Published, fetch
from epsd.evaluation.intake import Intake
from epsd.files import archives, digests, regular
from epsd.files.archives import ArchiveError, open_tree
from epsd.files.layouts import Reading, SourceError, folder_source
from epsd.masks import Mask
from epsd.preparing.write import prepare
from epsd.project import artifacts, params
from epsd.training import checkpoints
from epsd.types import EpsdError
from epsd.voc.annotations import read_index
from epsd.voc.devkits import Sets, from_sets
from pictures import classes, tarred, write, zipped


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A test that waits for a FIFO, or reads /dev/zero, fails instead."""

    def late(*anything: object) -> None:
        raise TimeoutError("it waits, or reads on and on")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


READERS: dict[str, Callable[[Path], Any]] = {
    "a.json": artifacts.read_json,
    "a.csv": artifacts.read_csv,
    "a.safetensors": artifacts.load_state,
    "mask.safetensors": Mask.load,
    "last.safetensors": lambda path: checkpoints.load(path, "mark"),
    "data.json": lambda path: checkpoints.fingerprint({}, [path]),
    "a.npy": lambda path: digests.check(path, "00000000"),
    "params.yaml": params.load,
    "a.png": Intake(["a", "b"], (1, 4, 4), [0.0], [1.0]).read,
    "a.tar.gz": lambda path: fetch(Published("a.tar.gz", "nowhere", "md5:0"), path.parent),
}
"""Name of a file -> what reads it."""


@pytest.mark.parametrize("make", [fifo, zeros, folder])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / name)
    with pytest.raises(EpsdError, match=name) as error:
        READERS[name](tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [fifo, zeros])
@pytest.mark.parametrize("suffix", [".zip", ".tar", ".tar.gz"])
def test_in_place_of_an_archive(tmp_path: Path, suffix: str, make: Callable[[Path], None]) -> None:
    make(tmp_path / f"a{suffix}")
    with pytest.raises(ArchiveError, match=f"a{suffix}: neither a folder nor a regular file"):
        open_tree(tmp_path / f"a{suffix}")


@pytest.mark.parametrize("make", [fifo, zeros])
def test_among_images(tmp_path: Path, make: Callable[[Path], None]) -> None:
    root = write(tmp_path / "tree", classes(8))
    make(root / "cat" / "x.png")
    with pytest.raises(SourceError, match=r"'cat/x.png' cannot be read \(no regular file\)"):
        prepare(folder_source(open_tree(root), Reading()), tmp_path / "out")
    index = prepare(folder_source(open_tree(root), Reading(unreadable="skip")), tmp_path / "out")
    assert index["left_out"] == ["1 unreadable (cat/x.png)"]


@pytest.mark.parametrize("make", [fifo, zeros])
@pytest.mark.parametrize("name", ["JPEGImages/a.jpg", "Annotations/a.xml", "ImageSets/Main/train.txt"])
def test_in_a_devkit(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    boxes = {"train": {"a": [("dog", (5, 5, 9, 9))]}, "test": {"b": [("dog", (1, 1, 9, 9))]}}
    root = write(tmp_path, devkit(boxes)) / "VOCdevkit" / "VOC2007"
    sets: Sets = {"train": [("", "train")], "test": [("", "test")]}
    (root / name).unlink()
    make(root / name)
    with pytest.raises(EpsdError, match=name.rpartition("/")[2].removesuffix(".jpg")):
        read_index(from_sets(open_tree(root), sets, tmp_path / "out"))


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_a_file_that_is_too_large_is_named_before_it_is_read(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (regular, archives):
        monkeypatch.setattr(module, "LARGEST", 1 << 20)
    files = classes(8) | {"cat/x.png": bytes(1 << 21)}
    made: Callable[[], Path] = {
        "folder": lambda: write(tmp_path / "tree", files),
        "zip": lambda: zipped(tmp_path / "tree.zip", files),
    }.get(kind, lambda: tarred(tmp_path / f"tree.{kind}", files))
    with pytest.raises(
        (ArchiveError, SourceError), match=r"'cat/x.png' cannot be read \(0.0 GiB; at most 0.0009\d+ are read\)"
    ):
        prepare(folder_source(open_tree(made()), Reading()), tmp_path / "out")


def test_the_size_that_a_zip_states_is_the_most_that_is_read(tmp_path: Path) -> None:
    """An entry that holds more than it says is damaged, and no more is unpacked of it."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 22))
    size = (1 << 22).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(ArchiveError, match=r"'a.png' cannot be read"):
        open_tree(path).read("a.png")


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_an_archive_of_too_many_names_is_named(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST", 10)
    make = zipped if suffix == "zip" else tarred
    open_tree(make(tmp_path / f"few.{suffix}", {f"{i}": b"" for i in range(10)}))
    with pytest.raises(ArchiveError, match=rf"many.{suffix}: refused, it has more than 10 entries"):
        open_tree(make(tmp_path / f"many.{suffix}", {f"{i}": b"" for i in range(11)}))


def test_a_compressed_giant_is_refused_at_its_header(tmp_path: Path) -> None:
    """A terabyte of zeros would be passed over for hours."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("cat/giant.png")
        member.size = 0
        archive.addfile(member)
        member.size = 1 << 40
        archive.fileobj.write(member.tobuf())  # type: ignore[union-attr]
    with pytest.raises(ArchiveError, match=r"'cat/giant.png' cannot be read \(1024.0 GiB; at most 2 are read\)"):
        open_tree(path)


def test_every_reader_of_the_package_is_one_of_these() -> None:
    """`read_text`, `read_bytes` and `open("rb")` of a path wait for a FIFO: what users or stages hand over goes by
    `epsd.files.regular`."""
    own = {
        "compute",
        "tracking",
        "studies",
        "tuning",
        "engine",
    }  # files of the system, of the store and of their own making
    found = set()
    for file in sorted((ROOT / "src" / "epsd").rglob("*.py")):
        text = file.read_text()
        if file.relative_to(ROOT / "src" / "epsd").parts[0] not in own and any(
            call in text for call in (".read_text(", ".read_bytes()", '.open("rb")', "np.load(", "safe_open(")
        ):
            found.add(file.relative_to(ROOT / "src" / "epsd").as_posix())
    assert found <= {
        "files/regular.py", "files/digests.py", "datasets/downloads.py", "data/prepared.py", "preparing/write.py",
        "project/presets.py", "project/runtime.py", "project/code.py", "pipeline/stage.py", "training/checkpoints.py",
    }  # fmt: skip
