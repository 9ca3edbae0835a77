"""A folder, a .zip or a .tar(.gz|.bz2|.xz) read as one thing: a tree of named files. Nothing is run, nothing escapes.

Archives are read where they are. An entry that would leave the archive (an absolute path, `..`, a link to
outside) makes the whole archive refused when it is opened, before any entry is used.
"""

import os
import posixpath
import stat
import tarfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from epsd.types import EpsdError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError)


class ArchiveError(EpsdError):
    """A folder or archive that is missing, truncated, corrupt, or that points outside itself."""


class Tree(ABC):
    """Named files under one root, read only. `names` are sorted posix paths relative to the root, files only.

    Hidden files (`.DS_Store`, `._x`) and `__MACOSX` are left out.
    """

    random_access = True
    """Whether files can be read in any order at the same cost (in a .tar they cannot)."""

    def __init__(self, where: Path) -> None:
        self.where = where

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Every file, sorted."""

    @property
    @abstractmethod
    def folders(self) -> frozenset[str]:
        """Every folder below the root, also those that hold nothing."""

    @abstractmethod
    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """(name, content) of each name, once each, in whatever order is fastest.

        Raises ArchiveError naming the file that is missing or cannot be read.
        """

    def read(self, name: str) -> bytes:
        """The content of one file."""
        return next(iter(self.read_many([name])))[1]

    def text(self, name: str) -> str:
        """The content of one UTF-8 text file."""
        try:
            return self.read(name).decode("utf-8")
        except UnicodeDecodeError:
            raise ArchiveError(f"{self.where}: '{name}' is not UTF-8 text.") from None

    def missing(self, name: str) -> ArchiveError:
        """The error for a file that is not there."""
        return ArchiveError(f"{self.where}: has no file '{name}'.")

    def broken(self, name: str, error: BaseException) -> ArchiveError:
        """The error for a file that is there and cannot be read."""
        return ArchiveError(f"{self.where}: '{name}' cannot be read ({error or type(error).__name__}).")


class FolderTree(Tree):
    """A folder on disk. Links inside it are followed: it is the user's own."""

    def __init__(self, where: Path) -> None:
        super().__init__(where)
        self._listed: tuple[tuple[str, ...], frozenset[str]] | None = None

    def _listing(self) -> tuple[tuple[str, ...], frozenset[str]]:
        if self._listed is None:  # only when asked for: a loader that knows its names need not walk a million files
            self._listed = _walk(self.where)
        return self._listed

    @property
    def names(self) -> tuple[str, ...]:
        """Every file, sorted."""
        return self._listing()[0]

    @property
    def folders(self) -> frozenset[str]:
        """Every folder."""
        return self._listing()[1]

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """In the order given."""
        for name in names:
            try:
                yield name, (self.where / name).read_bytes()
            except FileNotFoundError:
                raise self.missing(name) from None
            except OSError as error:
                raise self.broken(name, error) from None


class ZipTree(Tree):
    """A .zip archive. Safe in threads, and in processes: each opens the file for itself."""

    def __init__(self, where: Path) -> None:
        super().__init__(where)
        self._lock = threading.Lock()
        self._open()
        entries = self._zip.infolist()
        self._names = tuple(sorted(info.filename for info in entries if _wanted_zip(info, self)))
        self._folders = _folders(self._names, [info.filename for info in entries if info.is_dir()])

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.where)
        except _BROKEN as error:
            raise ArchiveError(f"{self.where}: truncated, or not a zip archive ({error}).") from None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {"where": self.where, "_names": self._names, "_folders": self._folders}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._open()

    @property
    def names(self) -> tuple[str, ...]:
        """Every file, sorted."""
        return self._names

    @property
    def folders(self) -> frozenset[str]:
        """Every folder."""
        return self._folders

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """In the order given."""
        for name in names:
            with self._lock:
                if self._process != os.getpid():  # a forked child shares the parent's file position: take its own
                    self._open()
            try:
                content = self._zip.read(name)
            except KeyError:
                raise self.missing(name) from None
            except _BROKEN as error:
                raise self.broken(name, error) from None
            yield name, content


class TarTree(Tree):
    """A .tar, compressed or not. Read front to back, whatever the order asked for."""

    random_access = False

    def __init__(self, where: Path) -> None:
        super().__init__(where)
        with self._opened() as archive:
            try:
                members = archive.getmembers()
            except _BROKEN as error:
                raise ArchiveError(f"{where}: truncated or corrupt ({error}).") from None
        kept = [member for member in members if _wanted_tar(member, self)]
        files = {_clean(member.name) for member in kept if not member.issym()}
        self._names = tuple(sorted(files | {_clean(member.name) for member in kept if _target(member) in files}))
        self._folders = _folders(self._names, [member.name for member in members if member.isdir()])

    def _opened(self) -> tarfile.TarFile:
        try:
            return tarfile.open(self.where)
        except _BROKEN as error:
            raise ArchiveError(f"{self.where}: truncated, or not a tar archive ({error}).") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Every file, sorted."""
        return self._names

    @property
    def folders(self) -> frozenset[str]:
        """Every folder."""
        return self._folders

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """In the archive's own order, which is one pass over it."""
        wanted = set(names)
        for name in sorted(wanted):
            if name not in self._names:
                raise self.missing(name)
        with self._opened() as archive:
            for member in archive:
                name = _clean(member.name)
                if name in wanted and not member.isdir():
                    wanted.discard(name)
                    yield name, self._content(archive, member)
                if not wanted:
                    return

    def _content(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
        try:
            handle = archive.extractfile(member)
            if handle is None:
                raise self.missing(member.name)
            return handle.read()
        except (*_BROKEN, KeyError) as error:
            raise self.broken(member.name, error) from None


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
        raise ArchiveError(f"{root}: no such folder or archive.")
    if not is_archive(root):
        raise ArchiveError(f"{root}: neither a folder nor an archive. Read are: {', '.join(ARCHIVE_SUFFIXES)}.")
    return ZipTree(root) if root.name.lower().endswith(".zip") else TarTree(root)


def unpack(tree: Tree, names: Iterable[str], target: Path) -> None:
    """Write the named files of `tree` below `target`, keeping their relative paths; what is there is replaced.

    Raises ArchiveError when a name would leave `target`, or a file cannot be read or written.
    """
    names = list(names)
    for name in names:
        _inside(name, tree.where)
    for name, content in tree.read_many(names):
        path = target / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise ArchiveError(f"{path}: cannot be written ({error.strerror or error}).") from None


def _inside(name: str, archive: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")) or "\0" in name:
        raise ArchiveError(f"{archive}: refused, its entry '{name}' points outside the archive.")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _wanted_zip(info: zipfile.ZipInfo, tree: ZipTree) -> bool:
    _inside(info.filename, tree.where)
    if stat.S_ISLNK(info.external_attr >> 16):
        raise ArchiveError(f"{tree.where}: refused, its entry '{info.filename}' is a link.")
    return not info.is_dir() and not _hidden(info.filename)


def _wanted_tar(member: tarfile.TarInfo, tree: TarTree) -> bool:
    _inside(member.name, tree.where)
    link = member.issym() or member.islnk()
    if link and (_target(member).startswith("..") or PurePosixPath(member.linkname).is_absolute()):
        raise ArchiveError(f"{tree.where}: refused, its entry '{member.name}' links outside ('{member.linkname}').")
    return (link or member.isfile()) and not _hidden(member.name)


def _clean(name: str) -> str:
    """`./a//b` -> `a/b`, as some tools write names."""
    return posixpath.normpath(name)


def _target(member: tarfile.TarInfo) -> str:
    """Where a link points inside the archive: a symbolic one from its own folder, a hard one from the top."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(member.name) if member.issym() else "", member.linkname))


def _folders(names: Iterable[str], explicit: Iterable[str]) -> frozenset[str]:
    found = {_clean(name) for name in explicit}
    for name in [*names, *found]:
        found.update(parent.as_posix() for parent in PurePosixPath(name).parents)
    return frozenset(name for name in found if name != "." and not _hidden(name))


def _walk(root: Path) -> tuple[tuple[str, ...], frozenset[str]]:
    seen: set[str] = set()  # real paths: a link to a parent folder must not be followed for ever
    names, empty = [], []
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        base = Path(folder).relative_to(root)
        empty.append(base.as_posix())
        names += [relative for name in files if not _hidden(relative := (base / name).as_posix())]
    return tuple(sorted(names)), _folders(names, empty)
