"""Devkits as folders and archives, one year or several, under any name."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from devkits import devkit
from epsd.datasets import DEVKITS
from epsd.datasets import devkit as module
from epsd.datasets.devkit import Devkit
from epsd.datasets.digit_scenes import DigitScenes
from epsd.datasets.downloads import DownloadError, Published
from epsd.files.archives import ArchiveError
from epsd.registry import ParamsError, choose
from epsd.voc.annotations import read_index
from epsd.voc.scenes import VocError
from pictures import tarred, write, zipped

THINGS = [("cat", (2, 2, 20, 12))]
TRAIN, TEST = {"trainval": {"000001": THINGS}}, {"test": {"000002": THINGS}}
YEAR_2012 = {"trainval": {"2008_000003": [("bird", (2, 2, 20, 12))]}}


def ids(kit: Devkit, folder: Path) -> dict[str, list[str]]:
    index = read_index(kit(folder, seed=0), seed=0, **kit.reading)
    return {split: [scene.id for scene in scenes] for split, scenes in index.scenes.items()}


FOUND = {"train": ["000001"], "validation": [], "test": ["000002"]}


@pytest.mark.parametrize("prefix", ["VOCdevkit/VOC2007", "VOC2007", "some/where/VOC2007"])
def test_folder_is_read_in_place(tmp_path: Path, prefix: str) -> None:
    root = write(tmp_path / "root", devkit(TRAIN | TEST, prefix=prefix))
    assert ids(Devkit(root=str(root)), tmp_path / "out") == FOUND
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["voc.zip", "voc.tar", "voc.tar.gz"])
def test_archive_is_unpacked(tmp_path: Path, name: str) -> None:
    pack = zipped if name.endswith("zip") else tarred
    files = devkit(TRAIN | TEST) | {"VOCdevkit/VOC2007/SegmentationClass/000001.png": b"not needed"}
    root = pack(tmp_path / name, files)
    assert ids(Devkit(root=str(root)), tmp_path / "out") == FOUND
    assert not list((tmp_path / "out").rglob("*.png"))


def test_folder_of_the_published_archives(tmp_path: Path) -> None:
    """VOC 07+12 -> 07 test, as three tar files beside each other."""
    tarred(tmp_path / "VOCtrainval_06-Nov-2007.tar", devkit(TRAIN))
    tarred(tmp_path / "VOCtest_06-Nov-2007.tar", devkit(TEST))
    tarred(tmp_path / "VOCtrainval_11-May-2012.tar", devkit(YEAR_2012, prefix="VOCdevkit/VOC2012"))
    kit = Devkit(root=str(tmp_path), train=["VOC2007/trainval", "VOC2012/trainval"], test=["VOC2007/test"])
    assert ids(kit, tmp_path / "out") == FOUND | {"train": ["000001", "2008_000003"]}


def test_what_was_there_before_is_not_read(tmp_path: Path) -> None:
    out = tmp_path / "out"
    DigitScenes(train=1, validation=1, test=1)(out, seed=0)
    write(out, {"mine.txt": b"kept"})
    old = devkit(TRAIN | {"train": {"000009": THINGS}} | TEST, prefix="VOCdevkit/VOC2006")
    for name, files in (("old", old), ("voc", devkit(TRAIN | TEST))):
        kit = Devkit(root=str(zipped(tmp_path / f"{name}.zip", files)), train=["trainval"], test=["test"])
        assert ids(kit, out) == FOUND
    with pytest.raises(ArchiveError, match=r"has no image set 'train' .*It has: VOC2007/test, VOC2007/trainval\.$"):
        Devkit(root=kit.root, train=["train"])(out, seed=0)
    assert sorted(path.name for path in out.iterdir()) == ["VOCdigits", "mine.txt", "unpacked"]


def test_a_damaged_archive_leaves_what_was_unpacked(tmp_path: Path) -> None:
    out, root = tmp_path / "out", zipped(tmp_path / "voc.zip", devkit(TRAIN | TEST))
    assert ids(Devkit(root=str(root)), out) == FOUND
    before = sorted(path.relative_to(out) for path in out.rglob("*"))
    sound = root.read_bytes()
    root.write_bytes(sound.replace(b"<annotation>", b"<ANNOTATION>"))
    with pytest.raises(VocError, match="cannot be read"):
        ids(Devkit(root=str(root)), out)
    assert sorted(path.relative_to(out) for path in out.rglob("*")) == before


def test_own_devkit_with_own_classes(tmp_path: Path) -> None:
    things = {"mine": {"a": [("screw", (1, 1, 9, 9))]}, "yours": {"b": [("nut", (1, 1, 9, 9))]}}
    root = write(tmp_path / "root", devkit(things, prefix="Workshop"))
    kit = Devkit(root=str(root), train=["mine"], test=["Workshop/yours"], class_names=["nut", "screw", "washer"])
    index = read_index(kit(tmp_path, seed=0), **kit.reading)
    assert index.class_names == ["nut", "screw", "washer"]
    assert (index.scenes["train"][0].labels.tolist(), index.scenes["test"][0].labels.tolist()) == ([1], [0])


def test_root_may_be_the_devkit_folder_itself(tmp_path: Path) -> None:
    root = write(tmp_path, devkit(TRAIN | TEST)) / "VOCdevkit/VOC2007"
    assert ids(Devkit(root=str(root), train=["trainval"], test=["test"]), tmp_path / "out") == FOUND
    assert ids(Devkit(root=str(root)), tmp_path / "out") == FOUND


def test_missing_set_lists_what_is_there(tmp_path: Path) -> None:
    root = write(tmp_path, devkit(TRAIN))
    with pytest.raises(ArchiveError, match=r"has no image set 'VOC2007/test' .*VOC2007/trainval") as caught:
        Devkit(root=str(root), test=["VOC2007/test"])(tmp_path / "out", seed=0)
    assert "\n" not in str(caught.value)


def test_ambiguous_set(tmp_path: Path) -> None:
    root = write(tmp_path, devkit(TRAIN | TEST) | devkit(YEAR_2012, prefix="VOCdevkit/VOC2012"))
    with pytest.raises(ArchiveError, match="more than one image set 'trainval'"):
        Devkit(root=str(root), train=["trainval"])(tmp_path / "out", seed=0)


def test_missing_root_and_archive_without_a_devkit(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"nowhere: no such folder"):
        Devkit(root=str(tmp_path / "nowhere"))(tmp_path / "out", seed=0)
    root = zipped(tmp_path / "other.zip", {"readme.txt": b"hello"})
    with pytest.raises(VocError, match=r"other\.zip: has neither lists .* nor annotations"):
        Devkit(root=str(root))(tmp_path / "out", seed=0)
    with pytest.raises(ArchiveError, match=r"other\.zip: has no image set .*It has: \(none\)"):
        Devkit(root=str(root), train=["train"])(tmp_path / "out", seed=0)


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "a/../../JPEGImages/evil.jpg"])
def test_entries_that_point_outside_are_refused(tmp_path: Path, name: str) -> None:
    root = zipped(tmp_path / "evil.zip", devkit(TRAIN | TEST) | {name: b"x"})
    with pytest.raises(ArchiveError, match="points outside"):
        Devkit(root=str(root))(tmp_path / "out", seed=0)
    assert not list(tmp_path.rglob("evil.[tj]*"))


def test_truncated_archive_is_named(tmp_path: Path) -> None:
    root = zipped(tmp_path / "voc.zip", devkit(TRAIN | TEST))
    root.write_bytes(root.read_bytes()[:500])
    with pytest.raises(ArchiveError, match=r"voc\.zip: truncated"):
        Devkit(root=str(root))(tmp_path / "out", seed=0)


@pytest.mark.parametrize(
    "settings", [{}, {"root": 1}, {"root": "x", "train": []}, {"root": "x", "limit": 0}, {"root": "x", "empty": "drop"}]
)
def test_bad_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ParamsError, match=r"^voc"):
        choose(DEVKITS, {"name": "devkit", **settings}, "voc")


class Site(http.server.BaseHTTPRequestHandler):
    """Serves the archives of the test by name and counts what is asked for."""

    archives: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.asked.append(name)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.archives[name])))
        self.end_headers()
        self.wfile.write(self.archives[name])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Site]]:
    made = {"2007": devkit(TRAIN), "2007-test": devkit(TEST), "2012": devkit(YEAR_2012, prefix="VOCdevkit/VOC2012")}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    Site.asked.clear()
    for part, files in made.items():
        content = tarred(tmp_path / f"made-{part}.tar", files).read_bytes()
        name = module.PUBLISHED[part].name
        Site.archives[name] = content
        url = f"http://127.0.0.1:{server.server_address[1]}/{name}"
        published = Published(name, url, f"md5:{hashlib.md5(content).hexdigest()}")
        monkeypatch.setitem(module.PUBLISHED, part, published)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Site
    server.shutdown()


def test_what_is_asked_for_is_fetched_once(tmp_path: Path, site: type[Site]) -> None:
    kit = Devkit(
        root=str(tmp_path / "voc"),
        train=["VOC2007/trainval", "VOC2012/trainval"],
        download=["2007", "2007-test", "2012"],
    )
    expected = FOUND | {"train": ["000001", "2008_000003"]}
    assert ids(kit, tmp_path / "out") == expected
    assert ids(kit, tmp_path / "again") == expected
    assert sorted(site.asked) == sorted(site.archives), "the second time nothing was fetched"


def test_an_unpacked_devkit_is_not_fetched(tmp_path: Path, site: type[Site]) -> None:
    root = write(tmp_path / "voc", devkit(TRAIN | TEST))
    assert ids(Devkit(root=str(root), download=["2007", "2007-test"]), tmp_path / "out") == FOUND
    assert site.asked == []


def test_a_wrong_checksum_is_refused(tmp_path: Path, site: type[Site]) -> None:
    site.archives[module.PUBLISHED["2007"].name] += b"changed"
    with pytest.raises(DownloadError, match="checksum"):
        Devkit(root=str(tmp_path / "voc"), download=["2007"])(tmp_path / "out", seed=0)


def test_without_download_the_message_names_the_files_to_place(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"VOCtrainval_06-Nov-2007\.tar.*voc\.download"):
        Devkit(root=str(tmp_path / "voc"))(tmp_path / "out", seed=0)
