import errno
import gc
import io
import os
import pickle
import stat
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from epsd.files.archives import ArchiveError, open_tree, unpack
from pictures import tarred, write, zipped

FILES = {"set/a/1.txt": b"one", "set/b/2.txt": b"two" * 1000, "set/read me.txt": "grün".encode()}
SUFFIXES = ["", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"]


def made(folder: Path, suffix: str, files: dict[str, bytes]) -> Path:
    if not suffix:
        return write(folder / "tree", files)
    return (zipped if suffix == ".zip" else tarred)(folder / f"tree{suffix}", files)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_form_reads_alike(tmp_path: Path, suffix: str) -> None:
    tree = open_tree(made(tmp_path, suffix, FILES))
    assert tree.names == tuple(sorted(FILES))
    assert tree.folders == {"set", "set/a", "set/b"}
    assert dict(tree.read_many(reversed(tree.names))) == FILES
    assert tree.read("set/a/1.txt") == b"one"
    assert tree.text("set/read me.txt") == "grün"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_hidden_files_are_left_out(tmp_path: Path, suffix: str) -> None:
    junk = {"__MACOSX/set/._1.txt": b"", "set/.DS_Store": b"", "set/a/._1.txt": b"", ".git/config": b""}
    assert open_tree(made(tmp_path, suffix, FILES | junk)).names == tuple(sorted(FILES))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    tree = open_tree(made(tmp_path, suffix, FILES))
    with pytest.raises(ArchiveError, match=r"no file 'set/c/3.txt'"):
        tree.read("set/c/3.txt")


def test_a_missing_root_and_a_file_of_another_kind_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match="nowhere: no such folder or archive"):
        open_tree(tmp_path / "nowhere")
    (tmp_path / "tree.rar").write_bytes(b"Rar!")
    with pytest.raises(ArchiveError, match=r"tree.rar: neither a folder nor an archive. Read are: .zip"):
        open_tree(tmp_path / "tree.rar")


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
@pytest.mark.parametrize("keep", [0, 20, 0.5])
def test_truncated_archives_are_named(tmp_path: Path, suffix: str, keep: float) -> None:
    noise = {f"{i}.bin": os.urandom(30_000) for i in range(3)}
    path = made(tmp_path, suffix, noise)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(ArchiveError, match=f"tree{suffix}.*(truncated|cannot be read)"):
        dict(open_tree(path).read_many(noise))


def test_a_damaged_zip_entry_is_named(tmp_path: Path) -> None:
    path = zipped(tmp_path / "tree.zip", {"good.txt": b"good", "bad.txt": b"x" * 500})
    content = bytearray(path.read_bytes())
    place = content.index(b"x" * 100)
    content[place : place + 10] = b"y" * 10
    path.write_bytes(bytes(content))
    tree = open_tree(path)
    assert tree.read("good.txt") == b"good"
    with pytest.raises(ArchiveError, match=r"tree.zip: 'bad.txt' cannot be read"):
        tree.read("bad.txt")


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
@pytest.mark.parametrize("name", ["/etc/passwd", "../out.txt", "a/../../out.txt", "C:/out.txt", "a\\..\\..\\out.txt"])
def test_entries_that_point_outside_are_refused_before_any_is_read(tmp_path: Path, suffix: str, name: str) -> None:
    path = made(tmp_path, suffix, {"good.txt": b"good", name: b"bad"})
    with pytest.raises(ArchiveError, match=r"refused, its entry .* points outside"):
        open_tree(path)
    assert not (tmp_path.parent / "out.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../out.txt", "../../../etc/passwd"])
def test_tar_links_to_outside_are_refused(tmp_path: Path, kind: bytes, target: str) -> None:
    path = tmp_path / "tree.tar"
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("a/link")
        link.type, link.linkname = kind, target
        archive.addfile(link)
    with pytest.raises(ArchiveError, match="'a/link' links outside"):
        open_tree(path)


def test_tar_links_inside_are_followed_and_devices_left_out(tmp_path: Path) -> None:
    path = tarred(tmp_path / "tree.tar", {"./a/1.txt": b"one"})
    with tarfile.open(path, "a") as archive:
        for name, target in (("b/link", "../a/1.txt"), ("b/dangling", "../a/2.txt")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        pipe = tarfile.TarInfo("pipe")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
    tree = open_tree(path)
    assert tree.names == ("a/1.txt", "b/link")
    assert dict(tree.read_many(tree.names)) == {"a/1.txt": b"one", "b/link": b"one"}


def with_links(path: Path, links: dict[str, str], kind: bytes = tarfile.SYMTYPE) -> Path:
    """The archive with these links (name -> target) added at its end."""
    with tarfile.open(path, "a") as archive:
        for name, target in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)
    return path


def test_tar_links_to_folders_and_to_links_show_what_is_there(tmp_path: Path) -> None:
    cat, hidden = {"1.txt": b"one", "in/2.txt": b"two"}, {".kept/3.txt": b"three"}
    path = tarred(tmp_path / "tree.tar", {f"pool/cat/{name}": content for name, content in cat.items()} | hidden)
    links = {"train": "pool", "pool/dog": "cat", "last": "next", "next": "pool/cat/1.txt"}
    loops = {"top": ".", "here": "here", "pool/cat/up": "..", "circle": "round", "round": "circle"}
    tree = open_tree(with_links(path, links | loops | {"pool/three.txt": "../.kept/3.txt"}))
    pool = {f"{folder}/{name}": content for folder in ("cat", "dog") for name, content in cat.items()}
    pool["three.txt"] = b"three"
    expected = {f"{folder}/{name}": content for folder in ("pool", "train") for name, content in pool.items()}
    assert dict(tree.read_many(tree.names)) == expected | {"last": b"one", "next": b"one"}
    assert tree.resolved("train/dog/in") == tree.resolved("pool/cat/in") != tree.resolved("pool/cat")
    assert {"train/dog/in", "pool/cat"} <= tree.folders


def test_tar_hard_links_are_read_as_their_file(tmp_path: Path) -> None:
    path = with_links(tarred(tmp_path / "tree.tar", {"a/1.txt": b"one"}), {"b/1.txt": "a/1.txt"}, tarfile.LNKTYPE)
    tree = open_tree(path)
    assert dict(tree.read_many(tree.names)) == {"a/1.txt": b"one", "b/1.txt": b"one"}


def repeated_zip(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # of a name that is there already
        for name, content in entries:
            archive.writestr(name, content)
    return path


def repeated_tar(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("pack", [repeated_zip, repeated_tar])
@pytest.mark.parametrize("again", ["a/1.txt", "./a/1.txt", "a//1.txt"])
def test_of_entries_of_one_name_the_last_counts(
    tmp_path: Path, pack: Callable[[Path, list[tuple[str, bytes]]], Path], again: str
) -> None:
    path = tmp_path / ("tree.zip" if pack is repeated_zip else "tree.tar")
    tree = open_tree(pack(path, [("a/1.txt", b"old"), ("a/2.txt", b"two"), (again, b"new"), ("a/3.txt", b"three")]))
    assert tree.names == ("a/1.txt", "a/2.txt", "a/3.txt")
    assert list(tree.read_many(["a/1.txt"])) == [("a/1.txt", b"new")]
    assert dict(tree.read_many(tree.names)) == {"a/1.txt": b"new", "a/2.txt": b"two", "a/3.txt": b"three"}


def test_a_link_in_a_tar_replaces_a_file_of_its_name_and_the_other_way_round(tmp_path: Path) -> None:
    path = tarred(tmp_path / "tree.tar", {"a": b"a", "b": b"b"})
    with_links(path, {"a": "b", "c": "a"})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("c")
        archive.addfile(member, io.BytesIO())
    tree = open_tree(path)
    assert dict(tree.read_many(tree.names)) == {"a": b"b", "b": b"b", "c": b""}


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_names_are_clean_however_they_are_written(tmp_path: Path, suffix: str) -> None:
    files = {"./set/1.txt": b"one", "set//b//2.txt": b"two", "./.hidden/3.txt": b"", "./set/./4.txt": b"four"}
    tree = open_tree(made(tmp_path, suffix, files))
    clean = {"set/1.txt": b"one", "set/4.txt": b"four", "set/b/2.txt": b"two"}
    assert tree.names == tuple(clean)
    assert tree.folders == {"set", "set/b"}
    for copy in (tree, pickle.loads(pickle.dumps(tree))):
        assert dict(copy.read_many(clean)) == clean


def test_reading_a_tar_takes_time_in_proportion_to_it(tmp_path: Path) -> None:
    tree = open_tree(tarred(tmp_path / "tree.tar", {f"photos/{number:06d}.jpg": b"" for number in range(2000)}))

    class Counted(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    assert sum(1 for _ in tree.read_many(map(Counted, tree.names))) == 2000
    assert Counted.compared < 20 * 2000, "each name was looked for among all"


def test_what_a_tar_was_unpacked_to_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    tree = open_tree(tarred(tmp_path / "tree.tar", FILES))
    if not (child := os.fork()):
        del tree
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert dict(tree.read_many(tree.names)) == {name: FILES[name] for name in tree.names}
    del tree
    with pytest.raises(ArchiveError, match="refused"):
        open_tree(tarred(tmp_path / "bad.tar", {"good.txt": b"", "../out.txt": b""}))
    gc.collect()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_tar_that_does_not_fit_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(ArchiveError, match=r"tree\.tar: cannot be unpacked below .*TMPDIR.*: No space left"):
        open_tree(tarred(tmp_path / "tree.tar", FILES))


def test_zip_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tree.zip"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("a/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ArchiveError, match="'a/link' is a link"):
        open_tree(path)


def test_a_folder_that_links_to_itself_is_listed_once(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", {"a/1.txt": b"one"})
    (root / "a" / "again").symlink_to(root)
    assert open_tree(root).names == ("a/1.txt",)


@pytest.mark.parametrize(
    ("link", "target", "shown"),
    [("test", "val", "val/a"), ("test", "train", "train/a"), ("aaa", "train", "train/a"), ("train/b", "a", "train/a")],
)
def test_both_names_of_one_folder_are_listed(tmp_path: Path, link: str, target: str, shown: str) -> None:
    files = [f"{split}/a/{number}.txt" for split in ("train", "val") for number in range(2)]
    root = write(tmp_path / "tree", dict.fromkeys(files, b""))
    (root / link).symlink_to(target)
    folder = link if link == "train/b" else f"{link}/a"
    twice = [file.replace(shown, folder) for file in files if file.startswith(shown)]
    assert len(twice) == 2
    assert open_tree(root).names == tuple(sorted(files + twice))
    assert {link, folder, shown} <= open_tree(root).folders


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", {"a/1.txt": b"", "b/2.txt": b""})
    (root / "a" / "b").symlink_to("../b")
    (root / "b" / "a").symlink_to("../a")
    assert open_tree(root).names == ("a/1.txt", "a/b/2.txt", "b/2.txt", "b/a/1.txt")


def test_resolved_follows_links(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", {"train/a/1.txt": b""})
    (root / "test").symlink_to("train")
    tree = open_tree(root)
    assert tree.resolved("test/a") == tree.resolved("train/a") != tree.resolved("train")
    assert open_tree(zipped(tmp_path / "tree.zip", FILES)).resolved("set/a") == "set/a"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write(tmp_path / "tree", {"a/1.txt": b"", "b/2.txt": b"", ".hidden/3.txt": b""})
    scandir = os.scandir

    def refusing(path: str) -> object:  # as for a folder of somebody else: root may read all
        if path in (str(root / "b"), str(root / ".hidden")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr("os.scandir", refusing)
    with pytest.raises(ArchiveError, match=r"tree/b: cannot be listed \(Permission denied\)\.$"):
        _ = open_tree(root).names
    (root / "b" / "2.txt").unlink()
    (root / "b").rmdir()
    assert open_tree(root).names == ("a/1.txt",), "hidden folders are nobody's business"


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    root = write(tmp_path / "tree", {"a/1.txt": b""})
    (root / "a" / "2.txt").symlink_to("nowhere")
    tree = open_tree(root)
    assert tree.names == ("a/1.txt", "a/2.txt")
    with pytest.raises(ArchiveError, match=r"'a/2.txt' cannot be read \(a link to nothing\)"):
        tree.read("a/2.txt")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_tree_travels_to_another_process(tmp_path: Path, suffix: str) -> None:
    tree = open_tree(made(tmp_path, suffix, FILES))
    assert pickle.loads(pickle.dumps(tree)).read("set/a/1.txt") == b"one"


def test_a_forked_child_and_its_parent_read_the_same_zip(tmp_path: Path) -> None:
    files = {f"{i}.bin": bytes([i]) * 5000 for i in range(50)}
    tree = open_tree(zipped(tmp_path / "tree.zip", files))
    child = os.fork()
    for _ in range(20):
        sound = dict(tree.read_many(files)) == files
    if not child:
        os._exit(0 if sound else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sound


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_unpack_keeps_paths_and_replaces(tmp_path: Path, suffix: str) -> None:
    tree, target = open_tree(made(tmp_path, suffix, FILES)), tmp_path / "out"
    write(target, {"set/a/1.txt": b"old and longer"})
    unpack(tree, tree.names[:2], target)
    assert {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*.txt")} == {
        name: FILES[name] for name in tree.names[:2]
    }


def test_unpack_stays_below_its_target_and_says_what_cannot_be_written(tmp_path: Path) -> None:
    tree = open_tree(write(tmp_path / "tree", FILES))
    with pytest.raises(ArchiveError, match="points outside"):
        unpack(tree, ["set/a/1.txt", "../tree/set/b/2.txt"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArchiveError, match=r"1.txt: cannot be written"):
        unpack(tree, ["set/a/1.txt"], tmp_path / "file")


def test_text_that_is_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"'a.txt' is not UTF-8"):
        open_tree(write(tmp_path / "tree", {"a.txt": io.BytesIO(b"\xff\xfe\x00").getvalue()})).text("a.txt")
