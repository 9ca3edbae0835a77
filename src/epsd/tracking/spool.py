"""Events that could not be sent, kept on disk until they can: one file of JSON lines per session, fsynced per line.

A line that was acknowledged survives a SIGKILL or a power cut; a half-written last line never was acknowledged and is
ignored. The writer holds a lock that dies with it, so that nobody replays the file of a session that still writes.
"""

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from epsd.project.runtime import state_folder

Event = dict[str, Any]

LOCAL = "local-"
"""Prefix of the id of a run that began while the store was away."""

UNOPENED: set[str] = set()
"""Local ids that this process has just made and will open before any other: no store has a run of theirs yet."""


class Spool:
    """The events of one session in `folder`, held by this process until `close` or `discard`."""

    def __init__(self, path: Path) -> None:
        """Take `path` (which need not exist). Raises filelock.Timeout when another process holds it, OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = FileLock(path.with_suffix(".lock"))
        self._lock.acquire(timeout=0)
        self._kept = 0

    @classmethod
    def new(cls, folder: Path, session: str) -> "Spool":
        """A file whose name sorts after all earlier ones."""
        return cls(folder / f"{time.time_ns():020d}-{session}.jsonl")

    @property
    def files(self) -> Path:
        """Folder of the copied artifacts."""
        return self.path.with_suffix(".files")

    def append(self, event: Event) -> None:
        """On disk when this returns. Raises OSError (full disk)."""
        line = json.dumps(event, default=str).encode() + b"\n"
        with self.path.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(before)  # half a line would spoil the next one
                raise
        if not before:
            _sync_folder(self.path.parent)

    def keep(self, path: Path) -> Path:
        """Copy an artifact (file or folder) that may change later; returns the copy, named like the original."""
        self._kept += 1
        target = self.files / str(self._kept) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy2(path, target)
        return target

    def events(self) -> list[Event]:
        """What was appended, in order."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def close(self) -> None:
        """Let go: from now on another process may replay it."""
        self._lock.release()

    def set_aside(self) -> Path:
        """Never to be replayed, but kept with its artifacts; returns where."""
        aside = self.path.rename(self.path.with_suffix(".refused"))
        self._lock.release()
        return aside

    def discard(self) -> None:
        """Everything was sent: remove it."""
        self.path.unlink(missing_ok=True)
        shutil.rmtree(self.files, ignore_errors=True)
        self._lock.release()
        self.path.with_suffix(".lock").unlink(missing_ok=True)


def waiting(folder: Path) -> Iterator[Spool]:
    """Every session in `folder` that nobody holds, oldest first; close or discard each before the next."""
    for path in sorted(folder.glob("*.jsonl")):
        with contextlib.suppress(Timeout, OSError):
            spool = Spool(path)
            try:
                if path.exists():  # it may have been replayed between the listing and the lock
                    yield spool
            finally:
                spool.close()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def resolve(run_id: str) -> str:
    """The real id behind a local one, once it is known; any other id as it is."""
    path = state_folder("runs", run_id)
    if run_id.startswith(LOCAL) and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    return run_id


def remember(local: str, real: str) -> None:
    """Write down the real id, for `resolve`."""
    path = state_folder("runs", local)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(real, encoding="utf-8")
    temporary.replace(path)
