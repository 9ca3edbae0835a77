"""A folder, a .zip or a .tar(.gz|.bz2|.xz) read as one thing: a tree of named files. Nothing is run, nothing escapes.

Archives are read where they are, under clean names (`./a//b` is `a/b`). An entry that would leave the archive (an
absolute path, `..`, a link to outside) makes the whole archive refused when it is opened, before any entry is used.
"""

import errno
import os
import posixpath
import stat
import tarfile
import threading
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeVar

from epsd.files.images import Shortage
from epsd.files.regular import LARGEST, read_bytes, too_large
from epsd.types import EpsdError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MOST = 5_000_000
"""Entries of an archive that is read: ImageNet with all its annotations has two million."""
_LINKS = 40
"""Links followed one after another, as on Linux; more are taken for a circle."""

_SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of the system that say nothing about the file."""

T = TypeVar("T")
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

    def resolved(self, folder: str) -> str:
        """Where links lead a folder, the same for two names of one folder; its own name where there are none."""
        return folder

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

    def broken(self, name: str, error: BaseException | str) -> EpsdError:
        """The error for a file that is there and cannot be read."""
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            return Shortage(f"{self.where}: '{name}' cannot be read now ({error.strerror}).")
        reason = error.strerror or error if isinstance(error, OSError) else error or type(error).__name__
        return ArchiveError(f"{self.where}: '{name}' cannot be read ({reason}).")


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

    def resolved(self, folder: str) -> str:
        """The real path."""
        return os.path.realpath(self.where / folder)

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """In the order given."""
        for name in names:
            path = self.where / name
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
        self._names = tuple(sorted(name for name in wanted if not _hidden(name)))
        self._written = {name: entry for name, entry in wanted.items() if name != entry}  # as the archive spells it
        self._folders = _folders(self._names, (_clean(info.filename) for info in entries if info.is_dir()))

    def _open(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.where)
        except _BROKEN as error:
            raise ArchiveError(f"{self.where}: truncated, or not a zip archive ({error}).") from None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in ("where", "_names", "_written", "_folders")}

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
                entry = self._zip.getinfo(self._written.get(name, name))
                if entry.file_size > LARGEST:
                    raise self.broken(name, too_large(entry.file_size))
                content = self._zip.read(entry)
            except KeyError:
                raise self.missing(name) from None
            except _BROKEN as error:
                raise self.broken(name, error) from None
            yield name, content


class TarTree(Tree):
    """A .tar, compressed or not. Read front to back, whatever the order asked for.

    Links inside it are followed, to files and to folders. Of several members of one name the last counts, as wherever
    a tar is unpacked.
    """

    random_access = False

    def __init__(self, where: Path) -> None:
        super().__init__(where)
        with self._opened() as archive:
            try:
                members = list(_counted(self._sound(archive), where))
            except _BROKEN as error:
                raise ArchiveError(f"{where}: truncated or corrupt ({error}).") from None
        self._links: dict[str, str] = {}  # name -> where it leads
        self._replaced: set[int] = set()  # where members begin that a later one of the same name replaces
        files = self._listed(members)
        self._shown = _shown(files, self._links) if self._links else {}  # name -> the file that it stands for
        self._names = tuple(sorted(name for name in self._shown or files if not _hidden(name)))
        self._known = frozenset(self._names)
        self._folders = _folders(self._names, (_clean(member.name) for member in members if member.isdir()))

    def _sound(self, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """Every member. Raises at the header of one that is too large, before it is passed over."""
        for member in archive:
            if member.size > LARGEST:
                raise self.broken(member.name, too_large(member.size))
            yield member

    def _listed(self, members: Iterable[tarfile.TarInfo]) -> Iterable[str]:
        """The names of files that are no links; notes links, and which members count no more."""
        files: dict[str, int] = {}  # name -> where its member begins
        for member in members:
            name, target = _clean(member.name), _checked(member, self)
            if target == name or not (target or member.isfile()):
                continue
            self._links.pop(name, None)
            if name in files:
                self._replaced.add(files.pop(name))
            if target is not None:
                self._links[name] = target
            else:
                files[name] = member.offset
        return files

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

    def resolved(self, folder: str) -> str:
        """Where the archive's links lead."""
        return _followed(folder, self._links)

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """In the archive's own order, which is one pass over it."""
        wanted: defaultdict[str, list[str]] = defaultdict(list)  # file -> the names under which it is asked for
        for name in sorted(set(names)):
            if name not in self._known:
                raise self.missing(name)
            wanted[self._shown.get(name, name)].append(name)
        with self._opened() as archive:
            for member in archive:
                if not wanted:
                    return
                name = _clean(member.name)
                if name in wanted and member.isfile() and member.offset not in self._replaced:
                    content = self._content(archive, member)
                    yield from ((asked, content) for asked in wanted.pop(name))

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
    if not root.is_file():
        raise ArchiveError(f"{root}: neither a folder nor a regular file.")
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


def _checked(member: tarfile.TarInfo, tree: TarTree) -> str | None:
    """Where a link leads inside the archive; None for what is no link. Raises ArchiveError for what leads outside."""
    _inside(member.name, tree.where)
    if not (member.issym() or member.islnk()):
        return None
    target = _target(member)
    if target.startswith("..") or PurePosixPath(member.linkname).is_absolute():
        raise ArchiveError(f"{tree.where}: refused, its entry '{member.name}' links outside ('{member.linkname}').")
    return target


def _clean(name: str) -> str:
    """`./a//b` -> `a/b`, as some tools write names."""
    return posixpath.normpath(name)


def _target(member: tarfile.TarInfo) -> str:
    """Where a link points inside the archive: a symbolic one from its own folder, a hard one from the top."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(member.name) if member.issym() else "", member.linkname))


def _followed(path: str, links: Mapping[str, str]) -> str:
    """Where a path inside an archive ends, link after link. One that leads in a circle ends at a link."""
    for _ in range(_LINKS):
        parts = path.split("/")
        starts = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        link = next((start for start in starts if start in links), None)
        if link is None:
            break
        path = _clean(links[link] + path[len(link) :])
    return path


def _shown(files: Iterable[str], links: Mapping[str, str]) -> dict[str, str]:
    """Every name that leads to a file, also by way of links -> the file's own name."""
    files = frozenset(files)
    inside: defaultdict[str, set[str]] = defaultdict(set)  # folder -> the names in it
    for name in (*files, *links):
        while name and name not in inside[parent := name.rpartition("/")[0]]:
            inside[parent].add(name)
            name = parent

    def found(folder: str, start: str, above: frozenset[str]) -> Iterator[tuple[str, str]]:
        for name in inside[folder]:
            shown, real = start + name.rpartition("/")[2], _followed(name, links)
            if real in files:
                yield shown, real
            elif real in inside and real not in above:  # a link to a folder that it lies in: else for ever
                yield from found(real, f"{shown}/", above | {real})

    return dict(found("", "", frozenset()))


def _folders(names: Iterable[str], explicit: Iterable[str]) -> frozenset[str]:
    """All folders that hold the named files or are named themselves (clean names), with those that they are in."""
    found: set[str] = set()
    for folder in {name.rpartition("/")[0] for name in names}.union(explicit):
        while folder and folder not in found:
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return frozenset(name for name in found if not _hidden(name))


def _walk(root: Path) -> tuple[tuple[str, ...], frozenset[str]]:
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
