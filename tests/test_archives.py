import io
import os
import pickle
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from epsd.archives import ArchiveError, open_tree, unpack
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
