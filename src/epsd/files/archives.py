"""A folder, a .zip or a .tar(.gz|.bz2|.xz) read as one thing: a tree of named files. Nothing is run, nothing escapes.

A .zip is read where it is, a .tar unpacked into a scratch folder, both under clean names (`./a//b` is `a/b`). An entry
that would leave the archive (an absolute path, `..`, a link to outside) makes the whole archive refused when it is
opened, before any entry is used.
"""

import codecs
import errno
import os
import posixpath
import shutil
import stat
import tarfile
import tempfile
import threading
import weakref
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from epsd.files.images import Shortage
from epsd.files.regular import LARGEST, read_bytes, refused, too_large
from epsd.types import EpsdError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MOST = 5_000_000
"""Entries of an archive that is read: ImageNet with all its annotations has two million."""

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of the system that say nothing about the file."""

T = TypeVar("T")
Listing = tuple[tuple[str, ...], frozenset[str]]
"""Files, sorted, and folders."""

_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)


class ArchiveError(EpsdError):
    """A folder or archive that is missing, truncated, corrupt, or that points outside itself."""


class Tree(ABC):
    """Named files under one root, read only. `names` are sorted posix paths relative to the root, files only.

    Hidden files (`.DS_Store`, `._x`) and `__MACOSX` are left out.
    """

    lasting = True
    """Whether the files stay where they are when this process is gone (those of a .tar are unpacked for a while)."""

    def __init__(self, where: Path) -> None:
        self.where = where

    @abstractmethod
    def _listing(self) -> Listing:
        """Every file, sorted; every folder below the root, also those that hold nothing."""

    @property
    def names(self) -> tuple[str, ...]:
        """Every file, sorted."""
        return self._listing()[0]

    @property
    def folders(self) -> frozenset[str]:
        """Every folder below the root, also those that hold nothing."""
        return self._listing()[1]

    @abstractmethod
    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of each name, once each, in whatever order is fastest.

        Raises ArchiveError naming the file that is missing or cannot be read.
        """

    def resolved(self, folder: str) -> str:
        """Where links lead a folder, the same for two names of one folder; its own name where there are none."""
        return folder

    def read(self, name: str) -> bytes:
        """The content of one file."""
        return next(iter(self.read_many([name])))[1]

    def text(self, name: str) -> str:
        """The content of one text file: UTF-8, with or without the mark that Windows sets before it, or UTF-16 with."""
        content = self.read(name)
        try:
            return content.decode("utf-16" if content.startswith(_UTF_16) else "utf-8-sig")
        except UnicodeDecodeError:
            raise ArchiveError(f"{self.where}: '{name}' is not UTF-8 text.") from None

    def missing(self, name: str) -> ArchiveError:
        """The error for a file that is not there."""
        return ArchiveError(f"{self.where}: has no file '{name}'.")

    def broken(self, name: str, error: BaseException | str) -> EpsdError:
        """The error for a file that is there and cannot be read."""
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            return Shortage(f"{self.where}: '{name}' cannot be read now ({error.strerror}).")
        reason = error.strerror or error if isinstance(error, OSError) else error or type(error).__name__
        return ArchiveError(f"{self.where}: '{name}' cannot be read ({reason}).")


class FolderTree(Tree):
    """A folder on disk. Links inside it are followed: it is the user's own."""

    def __init__(self, where: Path, root: Path | None = None) -> None:
        super().__init__(where)
        self.root = root or where
        self._listed: Listing | None = None

    def _listing(self) -> Listing:
        if self._listed is None:  # only when asked for: a loader that knows its names need not walk a million files
            self._listed = _walk(self.root)
        return self._listed

    def resolved(self, folder: str) -> str:
        """The real path."""
        return os.path.realpath(self.root / folder)

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """In the order given."""
        for name in names:
            path = self.root / name
            try:
                yield name, read_bytes(path)
            except FileNotFoundError:
                raise self.broken(name, "a link to nothing") if path.is_symlink() else self.missing(name) from None
            except OSError as error:
                raise self.broken(name, error) from None


class ZipTree(Tree):
    """A .zip archive. Safe in threads, and in processes: each opens the file for itself.

    Of several entries of one name the last counts, as wherever a zip is unpacked.
    """

    def __init__(self, where: Path) -> None:
        super().__init__(where)
        self._lock = threading.Lock()
        self._open()
        entries = list(_counted(self._zip.infolist(), self.where))
        wanted = {_clean(info.filename): info.filename for info in entries if _wanted_zip(info, self)}
        names = tuple(sorted(name for name in wanted if not _hidden(name)))
        self._written = {name: entry for name, entry in wanted.items() if name != entry}  # as the archive spells it
        self._listed = names, _folders(names, (_clean(info.filename) for info in entries if info.is_dir()))

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.where)
        except _BROKEN as error:
            raise ArchiveError(f"{self.where}: truncated, or not a zip archive ({error}).") from None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in ("where", "_written", "_listed")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._open()

    def _listing(self) -> Listing:
        return self._listed

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """In the order given."""
        for name in names:
            with self._lock:
                if self._process != os.getpid():  # a forked child shares the parent's file position: take its own
                    self._open()
            try:
                entry = self._zip.getinfo(self._written.get(name, name))
                if entry.file_size > LARGEST:
                    raise self.broken(name, too_large(entry.file_size))
                content = self._zip.read(entry)
            except KeyError:
                raise self.missing(name) from None
            except _BROKEN as error:
                raise self.broken(name, error) from None
            yield name, content


class TarTree(FolderTree):
    """A .tar, compressed or not. It is unpacked when it is opened, into a scratch folder that goes with this object.

    Links inside it are followed, to files and to folders; devices and links to nothing are left out. Of several
    members of one name the last counts.
    """

    lasting = False

    def __init__(self, where: Path) -> None:
        super().__init__(where, Path(tempfile.mkdtemp(prefix="epsd-")))
        weakref.finalize(self, _remove, self.root, os.getpid())
        self._links: list[Path] = []
        try:
            with tarfile.open(where) as archive:
                archive.extractall(self.root, _counted(archive, where), filter=self._wanted)
        except tarfile.FilterError as error:
            name = error.tarinfo.name
            raise ArchiveError(f"{where}: refused, its entry '{name}' links outside ({error}).") from None
        except _BROKEN as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                place = f"{tempfile.gettempdir()} (TMPDIR names another place)"
                raise ArchiveError(f"{where}: cannot be unpacked below {place}: {error.strerror}.") from None
            raise ArchiveError(f"{where}: truncated, or not a tar archive ({error}).") from None
        for link in self._links:
            if not os.path.exists(link):  # noqa: PTH110 (of a circle `Path.exists` may raise)
                link.unlink(missing_ok=True)

    def _wanted(self, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        """What of a member is unpacked: a file, a folder or a link as tar's filter `data` lets it be; else nothing."""
        _inside(member.name, self.where)
        if member.size > LARGEST:
            raise self.broken(member.name, too_large(member.size))
        path = Path(folder, member.name)
        link = member.issym() or member.islnk()
        if not (member.isfile() or member.isdir() or link) or (link and _clean(member.name) == _clean(member.linkname)):
            return None
        if member.issym():
            self._links.append(path)
        if path.is_symlink():  # a later member of this name replaces the link, not the file that it leads to
            path.unlink()
        return tarfile.data_filter(member, folder)


class Several(Tree):
    """Archives of one data set that lie in one folder, as one tree. Of several files of one name the last counts."""

    lasting = False

    def __init__(self, where: Path, trees: Iterable[Tree]) -> None:
        super().__init__(where)
        trees = list(trees)
        self._owner = {name: tree for tree in trees for name in tree.names}
        self._listed = tuple(sorted(self._owner)), frozenset[str]().union(*(tree.folders for tree in trees))

    def _listing(self) -> Listing:
        return self._listed

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """In the order given."""
        for name in names:
            if name not in self._owner:
                raise self.missing(name)
            yield name, self._owner[name].read(name)


def _remove(folder: Path, process: int) -> None:
    """Not at the end of a forked child, whose parent still reads there."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def is_archive(path: Path) -> bool:
    """Whether the file's name is that of an archive this module reads."""
    return path.name.lower().endswith(ARCHIVE_SUFFIXES)


def open_tree(root: Path) -> Tree:
    """The files of a folder, a .zip or a .tar(.gz|.bz2|.xz).

    Raises ArchiveError when `root` is missing, is no archive, is damaged, or has an entry that points outside.
    """
    if root.is_dir():
        return FolderTree(root)
    if not root.exists():
        raise ArchiveError(absent(root))
    if not root.is_file():
        raise ArchiveError(f"{root}: neither a folder nor a regular file.")
    if not is_archive(root):
        raise ArchiveError(f"{root}: neither a folder nor an archive. Read are: {', '.join(ARCHIVE_SUFFIXES)}.")
    return ZipTree(root) if root.name.lower().endswith(".zip") else TarTree(root)


def absent(root: Path) -> str:
    """What is said where nothing is at `root`; how to get it where DVC has it."""
    tracked = root.with_name(f"{root.name}.dvc")
    way_out = f" DVC has it: `dvc pull {tracked}` brings it here." if tracked.is_file() else ""
    return f"{root}: no such folder or archive.{way_out}"


def unpack(tree: Tree, names: Iterable[str], target: Path) -> None:
    """Write the named files of `tree` below `target`, keeping their relative paths; what is there is replaced.

    Raises ArchiveError when a name would leave `target`, or a file cannot be read or written.
    """
    names = list(names)
    for name in names:
        _inside(name, tree.where)
    for name, content in tree.read_many(names):
        path = target / name
        with refused(ArchiveError, path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def _counted(entries: Iterable[T], archive: Path) -> Iterable[T]:
    """The entries. Raises ArchiveError where there are more than MOST."""
    for number, entry in enumerate(entries):
        if number >= MOST:
            raise ArchiveError(f"{archive}: refused, it has more than {MOST:,} entries.")
        yield entry


def _inside(name: str, archive: Path) -> None:
    path = name.replace("\\", "/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or ".." in parts or (parts and parts[0].endswith(":")) or "\0" in name:
        raise ArchiveError(f"{archive}: refused, its entry '{name}' points outside the archive.")


def _hidden(name: str) -> bool:
    """Of a clean name: whether the file or a folder that it is in is hidden."""
    return "/." in f"/{name}" or "/__MACOSX/" in f"/{name}/"


def _wanted_zip(info: zipfile.ZipInfo, tree: ZipTree) -> bool:
    _inside(info.filename, tree.where)
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ArchiveError(f"{tree.where}: refused, its entry '{info.filename}' is a link.")
    return not info.is_dir()


def _clean(name: str) -> str:
    """`./a//b` -> `a/b`, as some tools write names."""
    return posixpath.normpath(name)


def _folders(names: Iterable[str], explicit: Iterable[str]) -> frozenset[str]:
    """All folders that hold the named files or are named themselves (clean names), with those that they are in."""
    found: set[str] = set()
    for folder in {name.rpartition("/")[0] for name in names}.union(explicit):
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return frozenset(name for name in found if not _hidden(name))


def _walk(root: Path) -> Listing:
    """Files and folders below `root`. Links are followed, but for one to a folder that it lies in: else for ever.

    Raises ArchiveError naming a folder that cannot be listed.
    """
    names: list[str] = []
    empty: list[str] = []
    known = {str(root): ("", frozenset[str]())}  # folder -> its name here, and the real paths of those that it is in
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_unlisted):
        start, above = known.pop(folder)
        real = os.path.realpath(folder)
        folders[:] = [] if real in above else sorted(name for name in folders if not _hidden(name))
        if real in above:
            continue
        known |= {os.path.join(folder, name): (f"{start}{name}/", above | {real}) for name in folders}  # noqa: PTH118
        empty.append(start[:-1])
        names += [f"{start}{name}" for name in files if not _hidden(name)]
    return tuple(sorted(names)), _folders(names, empty)


def _unlisted(error: OSError) -> None:
    raise ArchiveError(f"{error.filename}: cannot be listed ({error.strerror or error}).")
